"""Prints how long commands take to say something, and to do their first work, on the built-in base.

    python benchmarks/start_up.py [--rounds 3]

Each runs in a process of its own. *First sign* is the first output on a pseudo-terminal, as a person would see it; *reached* is
the output that is named in `COMMANDS`, or the end. Medians; the first round, in which files come from the disk, counts too.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

from tables import add_publish, show

CLI = [sys.executable, "-m", "esd_lora"]
LIBRARIES = """import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from peft import LoraConfig
"""
"""What a training on Stable Diffusion's classes imports, whoever writes it: nothing of ours can be ready before."""
END = "the end"
TRAIN = [*CLI, "train", "paper", "--concept", "a cat", "-s", "train.steps=3", "-o", "{out}"]
COMMANDS: dict[str, tuple[list[str], dict[str, tuple[str, float | None]]]] = {
    "`--help`": ([*CLI, "--help"], {END: ("", 0.25)}),
    "`recipes check`": ([*CLI, "recipes", "check", "emoji-twemoji"], {END: ("", 0.6)}),
    "`inspect`": ([*CLI, "inspect", "{eraser}"], {END: ("", 2.5)}),
    "`train`": (TRAIN, {"its bar": (r"\b0/3\b", 4), "its first step": (r"\b1/3\b", 8)}),
    "`generate`": ([*CLI, "generate", "a cat", "-o", "{out}"], {END: ("", 8)}),
    "importing torch, diffusers, transformers, peft": ([sys.executable, "-c", LIBRARIES], {END: ("", None)}),
}
"""Name to the command, and what is waited for: a pattern of the output, and the most seconds that are wanted."""


def run(command: list[str], patterns: dict[str, str]) -> dict[str, float]:
    """Return the seconds until a command's first sign, until its output has each pattern, and until its end.

    Raises:
        SystemExit: If it fails, or ends without one of them.
    """
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # a bar is as wide as its terminal
    started, text, seconds = time.perf_counter(), "", dict[str, float]()
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL)
    os.close(terminal)
    while True:
        try:
            part = os.read(controller, 4096)
        except OSError:  # the other end is closed
            break
        text += part.decode(errors="replace")
        now = time.perf_counter() - started
        seconds.setdefault("first sign", now)
        for name, pattern in patterns.items():
            if name not in seconds and re.search(pattern, text):
                seconds[name] = now
    os.close(controller)
    if process.wait() or not patterns.keys() <= seconds.keys():
        raise SystemExit(f"{command} failed, or never said {', '.join(patterns.values())}:\n{text}")
    ended = time.perf_counter() - started
    return {"first sign": ended, **seconds, END: ended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    add_publish(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        eraser = folder / "eraser"
        subprocess.run([*CLI, "train", "instant", "--concept", "a cat", "-o", eraser], check=True, capture_output=True)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in COMMANDS}
        for number in range(options.rounds):
            for name, (command, awaited) in COMMANDS.items():
                words = [word.format(eraser=eraser, out=folder / f"{name.strip('`')}-{number}") for word in command]
                patterns = {event: pattern for event, (pattern, _) in awaited.items() if event != END}
                times[name].append(run(words, patterns))
    rows: list[list[str]] = []
    for name, (_, awaited) in COMMANDS.items():
        for event, (_, most) in awaited.items():
            sign, reached = (statistics.median(each[key] for each in times[name]) for key in ("first sign", event))
            ours = most is not None
            rows.append([name, f"{sign:.2f}" if ours else "", event, f"{reached:.2f}", f"{most:g}" if ours else ""])
    show("start-up", ["command", "first sign, s", "until", "s", "at most"], rows, publish=options.publish)


if __name__ == "__main__":
    main()
