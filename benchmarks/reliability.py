"""Trials of faults and hostile files, counted: how often every verb was stopped, and every reader fed, and what survived.

    python benchmarks/reliability.py                # everything: about three quarters of an hour on two cores
    python benchmarks/reliability.py --stride 10 --pairs 5 --share 0.05

writes benchmarks/reliability.md. The trials are those of `tests/faults` and `tests/fuzz`, which fail where anything is lost.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

READING = (
    *("erasers/tensor_files.py", "erasers/header.py", "erasers/eraser.py", "erasers/manifests.py", "formats/importing.py"),
    *("yaml_files.py", "json_files.py", "recipe_files.py", "recipe.py", "evaluation/suites/suite_files.py"),
    *("evaluation/suites/prompt_files.py", "families/__init__.py", "bases/single_file.py", "bases/stored.py", "pictures.py"),
    *("evaluation/scoring.py", "evaluation/cases.py", "evaluation/report/report.py", "evaluation/report/attaching.py"),
    *("bases/configurations.py", "erasers/fetching.py", "erasers/hub_answers.py", "erasers/hub_errors.py"),
)
"""Modules in which strangers' files are read."""
PROJECT = Path(__file__).parents[1]
TESTS = PROJECT / "tests"
sys.path += [str(TESTS), str(TESTS / "fuzz")]


def run(*command: object) -> str:
    """Run a script of the tests in a process of its own, and return what it printed."""
    paths = [str(PROJECT), str(TESTS), str(TESTS / "fuzz"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *map(str, command)], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def stop_verbs(out: Path, stride: int, pairs: int) -> dict[str, Any]:
    """Return the counts and failures of verbs that were killed, refused and run two at a time."""
    options = ["--stride", stride, "--randomly", 10, "--pairs", pairs]
    run(TESTS / "faults" / "harness.py", out / "faults.json", *options)
    return json.loads((out / "faults.json").read_text("utf-8"))


def feed_readers(out: Path, share: float) -> dict[str, dict[str, int]]:
    """Return reader to its counts; a case that breaks a rule ends the run."""
    counts = fed("fuzzing.py", out / "fuzz", share)
    guided = fed("guided.py", out / "guided", share / 4)
    return {name: {**count, "guided": guided[name]["cases"]} for name, count in counts.items()}


def fed(script: str, out: Path, share: float) -> dict[str, dict[str, int]]:
    """Return reader to its counts by one of the scripts of `tests/fuzz`."""
    return json.loads(run(TESTS / "fuzz" / script, "--seed", 1, out, *shares(share)).splitlines()[-1])


def shares(share: float) -> list[str]:
    """Return the readers' numbers of cases, for the scripts of `tests/fuzz`."""
    from test_fuzzing import CASES

    return [f"{name}={max(20, round(share * number))}" for name, number in CASES.items()]


def cover_lines(out: Path, share: float) -> dict[str, tuple[int, int]]:
    """Return module to the number of its lines that the readers' cases ran, and of all its lines, where readers are."""
    data = ["--data-file", out / "lines"]
    include = ",".join(f"*/esd_lora/{name}" for name in READING)
    fuzz = [TESTS / "fuzz" / "fuzzing.py", "--seed", 2, out / "lines-fuzz", *shares(share)]
    run("-m", "coverage", "run", *data, "--include", include, *fuzz)
    run("-m", "coverage", "json", *data, "-o", out / "lines.json", "-q")
    files = json.loads((out / "lines.json").read_text("utf-8"))["files"]
    sums = {name.partition("esd_lora/")[2]: file["summary"] for name, file in files.items()}
    return {name: (lines["covered_lines"], lines["num_statements"]) for name, lines in sorted(sums.items())}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown with a sum below the counts."""
    total = ["all", *(sum(int(str(row[i]).replace(",", "")) for row in rows) for i in range(1, len(head)))]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows, total]
    cells = ([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def write(
    file: Path,
    faults: Mapping[str, Any],
    fuzz: Mapping[str, Mapping[str, int]],
    lines: Mapping[str, tuple[int, int]],
    command: str,
) -> None:
    """Write the page."""
    covered = [[f"`{name}`", f"{run} of {count}", f"{run / count:.0%}"] for name, (run, count) in lines.items()]
    coverage = "\n".join(f"| {' | '.join(row)} |" for row in [["module", "lines", "share"], ["---", "---:", "---:"], *covered])
    kinds = ("kills", "kills at random times", "refusals", "pairs", "pairs of which one was refused")
    verbs = [[name, *(counts.get(kind, 0) for kind in kinds)] for name, counts in faults["counts"].items()]
    fed_with = ("cases", "loads", "refusals", "guided")
    readers = [[name, *(counts[kind] for kind in fed_with)] for name, counts in fuzz.items()]
    versions = ", ".join(f"{name} {version(name)}" for name in ("esd-lora", "torch", "safetensors", "pillow", "pyyaml"))
    failures = "\n".join(f"- {failure}" for failure in faults["failures"]) or "None."
    text = f"""# Reliability

Written by `{command}` on {datetime.date.today()}, {platform.system()}, Python {platform.python_version()}, {versions}.

## Verbs that were stopped

Each trial runs a verb over nothing, or over an old result with `--force`, on the toy base; it is killed before a write
(SIGKILL, at every one in turn and at random times; a push, before and after every request), or the system refuses every write
from one on (ENOSPC, EROFS, EIO, EDQUOT, EMFILE, and files of a limited size). Afterwards the old result or the new one must be
whole, a refusal must be one sentence and leave nothing behind, and the verb, done again, must leave byte for byte what an
unbroken run does. In pairs, two variants run into one place at the same time: one result must be whole, and who is refused
must be told by whom.

{table(["verb", *kinds], verbs)}

Lost or mixed results, tracebacks, hangs and files left behind: {len(faults["failures"])}.

{failures}

## Readers that were fed

A third of the cases are mutated bytes, the others documents of the right structure with a value or two exchanged. Each case
loads or is refused in an `EsdLoraError` of a few lines, within 5 seconds and 512 MB; a socket, a process, code from the case's
folder or a write outside it ends the run, as any other exception does. Beyond these, atheris (libFuzzer) makes cases of bytes,
guided by what code of the package they reach, under the same rules.

{table(["reader", "cases", "read", "refused", "guided by coverage"], readers)}

The run went to its end, so no case broke a rule.

Lines of the modules with readers that a tenth as many cases ran, of all their lines, those among them that write or that serve
other ends:

{coverage}
"""
    file.write_text(text, "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stride", type=int, default=1, help="of the writes at which verbs are stopped")
    parser.add_argument("--pairs", type=int, default=100, help="of every verb")
    parser.add_argument("--share", type=float, default=1.0, help="of the readers' cases")
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks" / "reliability.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        faults = stop_verbs(Path(place), options.stride, options.pairs)
        fuzz = feed_readers(Path(place), options.share)
        lines = cover_lines(Path(place), options.share / 10)
    write(options.out, faults, fuzz, lines, " ".join(["python benchmarks/reliability.py", *sys.argv[1:]]))
    print(options.out.read_text("utf-8"))
    sys.exit(bool(faults["failures"]))
