"""Whatever stops a verb, the old result or the new one is whole, and done again it leaves what an unbroken run does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks after torch was imported, and reads /proc")
HARNESS = Path(__file__).with_name("harness.py")
PAIRS = 25


def trials(out: Path, *options: object) -> dict[str, Any]:
    """Return the report of a harness in a process of its own, which holds no threads when it forks."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, HARNESS, out, *map(str, options)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text("utf-8"))


def test_a_process_killed_in_a_lock_does_not_hang_the_next() -> None:
    code = (
        "import os, signal, harness; from tqdm.auto import tqdm\n"
        "harness.keep_locks_apart(); tqdm.get_lock()\n"
        "for last in (False, True):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        with tqdm.get_lock():\n"
        "            os._exit(0) if last else os.kill(os.getpid(), signal.SIGKILL)\n"
        "    _, status = os.waitpid(pid, 0)\n"
        "assert status == 0"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HARNESS.parent), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)


def test_verbs_stopped_here_and_there(tmp_path: Path) -> None:
    """A verb that writes a file, and the registry's log; the slow test has every verb at every write."""
    options = ("--stride", 20, "--randomly", 1, "--pairs", 1)
    report = trials(tmp_path / "report.json", "--verbs", "merge a file", "requests", *options)
    assert report["failures"] == []
    merge, requests = report["counts"]["merge a file"], report["counts"]["requests"]
    assert merge["pairs"] == 1
    for counts in (merge, requests):
        assert counts["kills"]
        assert counts["refusals"]


@pytest.mark.slow
def test_every_verb_stopped_at_every_write(tmp_path: Path) -> None:
    lengthy = {"train", "generate", "import", "push"}  # about half of the time

    def part(verbs: Sequence[str]) -> dict[str, Any]:
        options = ("--stride", 1, "--slow-stride", 3, "--randomly", 10, "--pairs", PAIRS)
        return trials(tmp_path / f"{verbs[0]}.json", "--verbs", *verbs, *options)

    verbs = [*harness.VERBS, harness.PUSH, harness.REGISTRY]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(part, [[verb for verb in verbs if (verb in lengthy) == first] for first in (True, False)]))
    assert [failure for report in reports for failure in report["failures"]] == []
    counts = {verb: count for report in reports for verb, count in report["counts"].items()}
    assert sorted(counts) == sorted(verbs)
    kinds = ("kills", "kills at random times", "refusals", "pairs")
    total = {kind: sum(count.get(kind, 0) for count in counts.values()) for kind in kinds}
    assert total["kills"] + total["kills at random times"] >= 500
    assert total["refusals"] >= 500
    assert total["pairs"] == PAIRS * len(harness.VERBS)  # nothing is pushed in pairs
