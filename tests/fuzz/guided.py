"""Fuzzing that is guided by coverage: what reaches new code of a reader is kept and changed further.

    python tests/fuzz/guided.py --seed 0 FOLDER recipe=500 pt=500

runs cases as `fuzzing.py` does, under the same guards, and prints the same counts. Google's atheris (libFuzzer) makes the
bytes, beginning with the reader's seeds and the kept inputs, each reader in a fork of its own, since libFuzzer never returns.
What it says itself goes to FOLDER/READER/log.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import atheris

with atheris.instrument_imports(include=["esd_lora"], enable_loader_override=False):
    import fuzzing

LARGEST = 100_000  # bytes of an input


def guide(name: str, cases: int, seed: int, folder: Path, answer: int) -> NoReturn:
    """Run the cases of one reader, write its counts or its fault to a file descriptor, and end the process."""

    def end(result: dict[str, Any]) -> NoReturn:
        os.write(answer, json.dumps(result).encode())
        os._exit(0)

    def run(content: bytes) -> None:
        try:
            session.run(content)
        except fuzzing.FaultError as fault:
            end({"fault": str(fault)[-6000:]})
        if session.counts["cases"] >= cases:
            end({"counts": session.counts})

    session = fuzzing.Session(name, folder, fuzzing.Guard(folder / "case"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, content in enumerate([*session.seeds, *session.kept]):
        (corpus / str(i)).write_bytes(content)
    run(session.seeds[0])  # whatever is imported or kept for later is there from now on
    os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT), 2)
    options = [f"-seed={seed + 1}", f"-max_len={LARGEST}", "-rss_limit_mb=0", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], run)
    with fuzzing.limited():
        atheris.Fuzz()
    sys.exit("libFuzzer returned")


def main() -> None:
    """Fuzz the readers that the command line names, and print their counts."""
    folder, seed, readers = fuzzing.read_command()
    counts: dict[str, dict[str, int]] = {}
    for name, cases in readers.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        readable, writable = os.pipe()
        if not (child := os.fork()):
            guide(name, cases, seed, place, writable)
        os.close(writable)
        with os.fdopen(readable) as pipe:
            result = json.loads(pipe.read() or "{}")
        status = os.waitpid(child, 0)[1]
        if "counts" not in result:
            sys.exit(result.get("fault") or f"{name}: the process ended with status {status}; {place}/log says more")
        counts[name] = result["counts"]
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
