"""Prints how long commands take to say something, and to do their first work, on the built-in base.

    python benchmarks/start_up.py [--rounds 3]

Each runs in a process of its own. *First sign* is the first output on a pseudo-terminal, as a person would see it; *done* is
the output that is named in `COMMANDS`, or the end. Medians; the first round, in which files come from the disk, counts too.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tables import add_publish, show

CLI = [sys.executable, "-m", "esd_lora"]
COMMANDS: dict[str, tuple[list[str], str | None, float]] = {
    "--help": (["--help"], None, 0.25),
    "recipes check": (["recipes", "check", "emoji-twemoji"], None, 0.6),
    "inspect": (["inspect", "{eraser}"], None, 2.5),
    "train, its bar": (["train", "paper", "--concept", "a cat", "-s", "train.steps=3", "-o", "{out}"], r"step/s", 4),
    "train, its first step": (
        ["train", "paper", "--concept", "a cat", "-s", "train.steps=3", "-o", "{out}"],
        r"\b1/3\b",
        8,
    ),
    "generate": (["generate", "a cat", "-o", "{out}"], None, 8),
}
"""Name to the arguments, the output that is waited for (`None`: the end), and the most seconds that are wanted."""


class Times(NamedTuple):
    """Seconds from the start of a command."""

    sign: float
    done: float


def run(arguments: list[str], until: str | None) -> Times:
    """Return when a command says something, and when it says what is waited for, on a pseudo-terminal."""
    controller, terminal = pty.openpty()
    started = time.perf_counter()
    process = subprocess.Popen([*CLI, *arguments], stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL)
    os.close(terminal)
    text, sign, done = "", 0.0, 0.0
    while True:
        try:
            part = os.read(controller, 4096).decode(errors="replace")
        except OSError:  # a pseudo-terminal whose other end is closed
            break
        text += part
        sign = sign or time.perf_counter() - started
        if until and not done and re.search(until, text):
            done = time.perf_counter() - started
    if process.wait() != 0:
        raise SystemExit(f"{arguments} failed:\n{text}")
    os.close(controller)
    return Times(sign, done or time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    add_publish(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        eraser = folder / "eraser"
        subprocess.run([*CLI, "train", "instant", "--concept", "a cat", "-o", eraser], check=True, capture_output=True)
        times: dict[str, list[Times]] = {name: [] for name in COMMANDS}
        for number in range(options.rounds):
            for name, (arguments, until, _) in COMMANDS.items():
                out = folder / f"{number}-{len(times[name])}-{name.replace(' ', '-').replace(',', '')}"
                words = [word.format(eraser=eraser, out=out) for word in arguments]
                times[name].append(run(words, until))
    rows: list[list[str]] = []
    for name, each in times.items():
        sign, done = (statistics.median(values) for values in zip(*each, strict=True))
        rows.append(
            [f"`{name}`" if name in ("--help", "inspect") else name, f"{sign:.2f}", f"{done:.2f}", f"{COMMANDS[name][2]:g}"]
        )
    show("start-up", ["command", "first sign, s", "done, s", "at most"], rows, publish=options.publish)


if __name__ == "__main__":
    main()
