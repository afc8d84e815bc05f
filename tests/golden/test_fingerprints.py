"""What the commands make on the built-in base is the same to the bit in every process, whatever the hash seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys, tempfile
from pathlib import Path
from fingerprints import fingerprints
with tempfile.TemporaryDirectory() as folder:
    result = fingerprints(Path(folder), steps=2, scopes=("xattn",), seed=int(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result))
"""


def in_a_process(seed: int, out: Path, hash_seed: str) -> dict[str, str]:
    """Return the fingerprints that a fresh interpreter gets."""
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", CODE, str(seed), str(out)], check=True, capture_output=True, env=env)
    return json.loads(out.read_text("utf-8"))


@pytest.mark.slow
def test_everything_comes_out_the_same_twice_and_hangs_on_the_seed(tmp_path: Path) -> None:
    first, second = (in_a_process(0, tmp_path / f"{i}.json", str(i)) for i in (1, 2))
    assert first == second
    other = in_a_process(1, tmp_path / "other.json", "1")
    assert other.keys() == first.keys()
    # An evaluation's numbers may be the same for two erasers of two steps; its record is not.
    assert not [name for name in first if first[name] == other[name]]
