"""What the commands make on the built-in base is the same to the bit in every process, on one thread.

Hash seed, locale, time zone and directory differ between the runs.
"""

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


def in_a_process(seed: int, out: Path, **environment: str) -> dict[str, str]:
    """Return the fingerprints that a fresh interpreter gets, in a directory of its own."""
    out.parent.mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **environment}
    command = [sys.executable, "-c", CODE, str(seed), str(out)]
    subprocess.run(command, check=True, capture_output=True, env=env, cwd=out.parent)
    return json.loads(out.read_text("utf-8"))


@pytest.mark.slow
def test_everything_comes_out_the_same_twice_and_hangs_on_the_seed(tmp_path: Path) -> None:
    usual = {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    first = in_a_process(0, tmp_path / "a" / "1.json", **usual)
    second = in_a_process(0, tmp_path / "b c" / "2.json", PYTHONHASHSEED="2", LC_ALL="C", TZ="XXX-13:45")
    assert first == second
    other = in_a_process(1, tmp_path / "d" / "3.json", **usual)
    assert other.keys() == first.keys()
    # An evaluation's numbers may be the same for two erasers of two steps; its record is not.
    assert not [name for name in first if first[name] == other[name]]
