"""Fuzzing that is guided by coverage: what reaches new code of a reader is kept and changed further.

    python tests/fuzz/guided.py --seed 0 FOLDER recipe=500 pt=500

runs cases as `fuzzing.py` does, under the same guards, and prints the same counts. Google's atheris (libFuzzer) makes the bytes,
beginning with the reader's seeds and the kept inputs, each reader in a fork of its own, since libFuzzer never returns.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["esd_lora"], enable_loader_override=False):
    import fuzzing

LARGEST = 100_000  # bytes of an input


def guide(name: str, cases: int, seed: int, folder: Path, results: int) -> None:
    """Run the cases of one reader, write its counts to a file descriptor, and end the process."""
    session = fuzzing.Session(name, folder, fuzzing.Guard(folder / "case"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, content in enumerate([*session.seeds, *session.kept]):
        (corpus / str(i)).write_bytes(content)
    session.run(session.seeds[0])  # whatever is imported or kept for later is there from now on

    def run(content: bytes) -> None:
        session.run(content)
        if session.counts["cases"] >= cases:
            os.write(results, json.dumps(session.counts).encode())
            os._exit(0)

    options = [f"-seed={seed + 1}", f"-max_len={LARGEST}", "-handle_alrm=0", "-timeout=0", "-rss_limit_mb=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(corpus)], run)
    with fuzzing.limited():
        atheris.Fuzz()


def main() -> None:
    """Fuzz the readers that the command line names, and print their counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("folder", type=Path)
    parser.add_argument("readers", nargs="+", metavar="READER=CASES")
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, fuzzing._too_slow)
    counts: dict[str, dict[str, int]] = {}
    for argument in arguments.readers:
        name, _, cases = argument.partition("=")
        place = (arguments.folder / name.replace(" ", "-")).resolve()
        place.mkdir(parents=True)
        answer, results = os.pipe()
        if not (child := os.fork()):
            guide(name, int(cases), arguments.seed, place, results)
        os.close(results)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{name}: an input breaks a rule; it lies in {place}")
        with os.fdopen(answer) as pipe:
            counts[name] = json.load(pipe)
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
