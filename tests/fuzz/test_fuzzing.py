"""Every reader of strangers' files, fuzzed in a process of its own by `fuzzing.py`, and guided by coverage by `guided.py`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fuzzing import CORPUS, mutate
from readers import READERS

TESTS = Path(__file__).parents[1]
BASES = ("denoiser", "text encoder", "vae", "whole index", "whole schedule")
SLOW = {**dict.fromkeys(BASES, 150), "checkpoint": 600, "pt": 1200}
"""Readers of which a case takes longer, and their number of cases in the whole run."""
CASES = {name: SLOW.get(name, 1000) for name in READERS}
GUIDED = {name: number // 4 for name, number in CASES.items()}
STAND_IN = """
import sys, types
from collections import namedtuple
Reader = namedtuple("Reader", "file read seeds documents write beside")
sys.modules["readers"] = types.SimpleNamespace(READERS={}, Reader=Reader)
"""
"""What a script begins with that brings readers of its own; the real ones take long to import."""
needs_atheris = pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has wheels for Linux on x86-64 alone")


def start(folder: Path, script: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this directory in a fresh process, with what it keeps for itself in a folder."""
    paths = os.pathsep.join([str(TESTS / "fuzz"), str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(TESTS / "fuzz" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)


def run(folder: Path, cases: dict[str, int], seed: int = 0, script: str = "fuzzing.py") -> dict[str, dict[str, int]]:
    """Fuzz readers in a fresh process, and return their counts."""
    done = start(folder, script, "--seed", f"{seed}", str(folder), *(f"{name}={number}" for name, number in cases.items()))
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(counts: dict[str, dict[str, int]], cases: dict[str, int]) -> None:
    """See that every reader had its cases, and that some were read and some refused."""
    assert counts.keys() == cases.keys()
    for name, number in counts.items():
        assert number["cases"] >= cases[name]
        assert number["cases"] == number["loads"] + number["refusals"]
        assert number["loads"], name
        assert number["refusals"], name


def test_some_cases_of_every_reader(tmp_path: Path) -> None:
    cases = {name: 4 if name in BASES else 15 for name in READERS}
    check(run(tmp_path, cases), cases)


@pytest.mark.slow
def test_all_cases_of_every_reader(tmp_path: Path) -> None:
    assert sum(CASES.values()) >= 20_000
    check(run(tmp_path, CASES, seed=1), CASES)


@needs_atheris
def test_some_cases_guided_by_coverage(tmp_path: Path) -> None:
    cases = dict.fromkeys(("recipe", "report", "schedule"), 15)
    check(run(tmp_path, cases, script="guided.py"), cases)


@needs_atheris
@pytest.mark.slow
def test_all_cases_guided_by_coverage(tmp_path: Path) -> None:
    check(run(tmp_path, GUIDED, seed=1, script="guided.py"), GUIDED)


@needs_atheris
def test_fault_of_guided_fuzzing_is_shown(tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(f"""{STAND_IN}
import guided
read = lambda folder: int((folder / "x").read_bytes())
guided.fuzzing.READERS["bad"] = Reader("x", read, lambda _: [b"1", b"y"], [], None, lambda _: None)
guided.main()
""")
    done = start(tmp_path, script, str(tmp_path / "cases"), "bad=50")
    assert done.returncode == 1
    assert f"bad: {tmp_path / 'cases/bad/faults/bad-'}" in done.stderr
    assert "ValueError: invalid literal for int()" in done.stderr


def test_kept_inputs_have_a_reader() -> None:
    kept = {path.name for path in CORPUS.iterdir()}
    assert kept <= READERS.keys()
    assert all(path.stat().st_size < 6000 for path in CORPUS.glob("*/*"))


def test_same_cases_for_the_same_seed() -> None:
    sources = [b"abc" * 20, b"[1, 2]"]
    first, second = ([mutate(sources[0], sources, random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert first == second
    assert len(set(first)) > 40


BAD = {
    "a crash": ("int('x')", "ValueError"),
    "a message that goes on and on": ("raise EsdLoraError('x' + '\\n' * 99)", "message of 99 lines"),
    "a process": ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
    "a process that is hushed up": (
        "import os, contextlib\nwith contextlib.suppress(Exception): os.system('true')",
        "os.system",
    ),
    "a socket": ("import socket; socket.create_connection(('127.0.0.1', 9))", "socket"),
    "writing elsewhere": ("open('/tmp/esd-lora-fuzz-outside', 'w')", "open"),
    "removing elsewhere": ("import os; os.remove('/tmp/esd-lora-fuzz-outside')", "os.remove"),
    "code of the case": ("exec(compile('1', str(folder / 'x.py'), 'exec'))", "compile"),
    "memory": ("bytearray(2**30)", "MemoryError"),
    "a hang": ("while True: pass", "more than 1 s"),
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is written of readers that break a rule, all in one process of its own, as an audit hook stays for good."""
    folder = tmp_path_factory.mktemp("bad")
    script = f"""{STAND_IN}
import json, signal
from pathlib import Path
import fuzzing
from esd_lora.errors import EsdLoraError
fuzzing.SECONDS = 1
signal.signal(signal.SIGALRM, fuzzing._too_slow)
folder, codes, messages = Path({str(folder)!r}), json.loads(sys.argv[1]), {{}}
guard = fuzzing.Guard(folder / "case")
for name, code in codes.items():
    def read(folder):
        if (folder / "x").read_bytes() != b"good":
            exec(code, {{"folder": folder, "EsdLoraError": EsdLoraError}})
    fuzzing.READERS["bad"] = Reader("x", read, lambda _: [b"good"], [], None, lambda _: None)
    try:
        fuzzing.fuzz("bad", 20, 0, folder, guard)
    except fuzzing.FaultError as fault:
        messages[name] = str(fault)
print(json.dumps(messages))
"""
    paths = os.pathsep.join([str(TESTS / "fuzz"), str(TESTS.parent)])
    command = [sys.executable, "-c", script, json.dumps({name: code for name, (code, _) in BAD.items()})]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.read_bytes() != b"good" for path in (folder / "faults").iterdir())
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", BAD)
def test_reader_that_breaks_a_rule_is_seen(name: str, faults: dict[str, str]) -> None:
    assert BAD[name][1] in faults[name]
    assert not Path("/tmp/esd-lora-fuzz-outside").exists()
