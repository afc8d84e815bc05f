"""The same recipe and seed give the same files in every process, on one machine and as many threads.

Hash seed, locale, time zone, directory and terminal differ between the two runs. Equal to the byte is everything but the time
of day and how long it took: `created` and `date`, `seconds`, what kohya's metadata repeats of them, and the SHA-256 of files
that hold them.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

THREADS = "1"
"""Of torch in both runs: sums in parallel are added in another order on another number of threads."""
TIMES = re.compile(
    rb'"(?:seconds|ss_training_started_at|ss_training_finished_at)": ?"?[\d.e-]+'
    rb"|\d{4}-\d\d-\d\d(?:T\d\d:\d\d:\d\d(?:\.\d+)?\+00:00)?|\d+ s\b"
)
DIGESTS = re.compile(rb'(?:sha256|\.safetensors|\.json|\.yaml)"?: ?"?[0-9a-f]{64}')
CODE = """
import json, sys
from esd_lora.cli import main
for command in json.loads(sys.argv[1]):
    main(command, standalone_mode=False)
"""
SUITE = """description: Sizes.
prompts:
  all: {role: general, templates: ["a {c}"], fill: {c: [hat, dog]}, label: "{c}", count: 2}
detectors: {clip: {}}
distances: {efficientnet: {}}
steps: 2
"""


def commands(base: Path) -> list[list[str]]:
    """Return what both runs do: every verb that makes a file, at toy size."""
    quick = ("steps=3", "trajectories=2", "trajectory_steps=2", "preserve_trajectories=2", "preview_every=2", "probe_every=1")
    settings = [part for setting in quick for part in ("-s", f"train.{setting}")]
    on_base = ["--base", str(base)]
    return [
        ["train", "--concept", "İstanbul ß", *on_base, *settings, "--device", "cpu", "-o", "no-cat"],
        ["train", "paper", "--concept", "a hat", *on_base, *settings, "--device", "cpu", "--kohya", "-o", "no-hat"],
        ["stack", "no-cat:0.5", "no-hat", "--report", "-o", "sum"],
        ["stack", "no-cat", "no-hat", *on_base, "--device", "cpu", "--harmonise", "1", "-o", "fused"],
        ["stack", "no-cat", "no-hat", "-o", "stack.yaml"],
        ["merge", "fused", *on_base, "-o", "merged"],
        ["extract", *on_base, "--tuned", "merged", "--rank", "2", "-o", "extracted"],
        ["export", "sum", "--layout", "kohya", "-o", "kohya.safetensors"],
        ["export", "sum", "--layout", "peft", "-o", "peft"],
        ["import", "kohya.safetensors", "-o", "imported"],
        [
            "generate",
            "a cat",
            *on_base,
            "--device",
            "cpu",
            "--steps",
            "2",
            "--eraser",
            "sum",
            "--compare",
            "--gate",
            "-o",
            "pictures",
        ],
        ["evaluate", "no-cat", "no-hat", "--stack", *on_base, "--device", "cpu", "--suite", "suite.yaml", "-o", "measured"],
    ]


def made_in(folder: Path, base: Path, **environment: str) -> dict[str, bytes]:
    """Return file to content, without times, of what a fresh process makes in a directory."""
    folder.mkdir(parents=True)
    (folder / "suite.yaml").write_text(SUITE)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "TZ", "PYTHONUTF8"))}
    env |= {"OMP_NUM_THREADS": THREADS, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **environment}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(commands(base))],
        **{"cwd": folder, "env": env, "capture_output": True, "check": False, "timeout": 550},
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): timeless(path) for path in files}


def timeless(file: Path) -> bytes:
    """Return a file without the times in it; of safetensors the header is unpacked, whose length hangs on them."""
    content = file.read_bytes()
    if file.suffix == ".png":
        return content
    if file.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        own = {name: json.loads(metadata.pop(name)) for name in ("esd_lora", "esd_lora_merged") if name in metadata}
        text = json.dumps([header, own], separators=(",", ":")).encode()
        return TIMES.sub(b"", DIGESTS.sub(b"", text)) + content[8 + length :]
    return TIMES.sub(b"", DIGESTS.sub(b"", content))


@pytest.mark.slow
def test_same_files_whatever_the_process(tiny_dir: Path, tmp_path: Path) -> None:
    plain = made_in(tmp_path / "a", tiny_dir, PYTHONHASHSEED="1", LC_ALL="C.UTF-8", TZ="UTC", COLUMNS="200")
    odd = made_in(tmp_path / "else where" / "b", tiny_dir, PYTHONHASHSEED="2", LC_ALL="C", TZ="XXX-13:45", COLUMNS="40")
    assert plain.keys() == odd.keys()
    assert [name for name in plain if plain[name] != odd[name]] == []
    suffixes = {Path(name).suffix for name in plain}
    assert {".safetensors", ".md", ".yaml", ".jsonl", ".json", ".png", ".html"} <= suffixes
