"""Runs the tables of README and docs again, keeps them in benchmarks/results/ and writes the pages: `make benchmark`.

    python benchmarks/everything.py [--out out/benchmark] [--only start_up,erasing]

What counts pictures runs in two lanes of one thread each; what counts seconds comes after that, alone. Runs in `--out` are not
repeated. Tables that take hours or gigabytes of random weights have commands of their own with `--publish` and are not run
here: `calibration.py`, `stacking.py`, `peers.py`, `perturbing.py`, `eraser_files.py`, `real_size.py`,
`painting.py --only sd15`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tables

FOLDER = Path(__file__).parent
LANES = (
    ("erasing.py --only object",),
    ("erasing.py --only style", "teacher_cache.py"),
)
"""One thread each, at the same time."""
ALONE = (
    "start_up.py",
    "hot_loop.py",
    "ranks.py --steps 60",
    "painting.py --only emoji",
    "memory_plan.py",
    "estimates.py --only instant,fast,thorough,paper,pictures,evaluation,fusing,harmonising",
)
PLACES = {"erasing.py": "erasing", "estimates.py": "estimates"}
"""Scripts that keep runs, and the folder of those in `--out`."""


def run(command: str, out: Path, log: Path, *, threads: int | None = None) -> float:
    """Run a script with `--publish`, its output in a file, and return how many seconds that took.

    Raises:
        SystemExit: If it fails.
    """
    script, *arguments = shlex.split(command)
    if script in PLACES:
        arguments += ["--out", os.path.relpath(out / PLACES[script])]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, str(FOLDER / script), *arguments, "--publish"],
            stdout=file,
            stderr=file,
            env=environment,
            check=False,
        )
    seconds = time.monotonic() - started
    print(f"{seconds:5.0f} s  {command}", flush=True)
    if done.returncode:
        raise SystemExit(f"{command} failed: see {log}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/benchmark"))
    parser.add_argument("--only", default="", help="scripts, without .py")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = {f"{name}.py" for name in options.only.split(",") if name}

    def chosen(commands: Sequence[str]) -> list[str]:
        return [command for command in commands if not wanted or command.split()[0] in wanted]

    started = time.monotonic()

    def lane(number: int) -> None:
        for command in chosen(LANES[number]):
            run(command, options.out, options.out / f"lane-{number}.log", threads=1)

    with ThreadPoolExecutor(len(LANES)) as pool:
        list(pool.map(lane, range(len(LANES))))
    for command in chosen(ALONE):
        run(command, options.out, options.out / "alone.log")
    tables.main()
    print(f"{time.monotonic() - started:5.0f} s  in all")


if __name__ == "__main__":
    main()
