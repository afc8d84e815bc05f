"""What the system refuses, whatever the command: one sentence for a path, the disk or the machine, a traceback for a bug."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from esd_lora.cli import main
from esd_lora.cli.commands import Commands
from esd_lora.cli.printing import going_on_in
from esd_lora.errors import EsdLoraError
from esd_lora.weights import merging

LONG = "n" * 300
REFUSALS = (
    "ENAMETOOLONG",
    "ELOOP",
    "EACCES",
    "EPERM",
    "ENOTDIR",
    "EISDIR",
    "EROFS",
    "ENOSPC",
    "EDQUOT",
    "EMFILE",
    "ESTALE",
    "EIO",
)
COMMAND = [sys.executable, "-m", "esd_lora"]
SUITE = """description: Nothing.
prompts:
  all: {role: general, templates: ["a {c}"], fill: {c: [cat, dog]}, label: "{c}"}
detectors: {clip: {}}
steps: 1
"""


def failing(error: BaseException) -> Result:
    """Return what a command prints that raises an error."""

    @click.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(Commands("esd-lora", commands={"fail": fail}), ["fail"])


def sentence(result: Result) -> str:
    """Return the one line of a command that was refused."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], result.stderr
    assert "Traceback" not in result.stderr
    return lines[-1]


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_system_refuses(name: str) -> None:
    number = getattr(errno, name)
    line = sentence(failing(OSError(number, os.strerror(number), "some/\x1b[31mfile")))
    assert (
        line == f"error: the system refuses some/\\x1b[31mfile: {os.strerror(number)}. Choose another path, or mend this one."
    )
    assert "what was to be done" in sentence(failing(OSError(number, os.strerror(number))))
    assert os.fsdecode(b"x") in sentence(failing(OSError(number, os.strerror(number), b"x")))


def test_interruption_is_a_sentence(tmp_path: Path) -> None:
    assert sentence(failing(KeyboardInterrupt())) == (
        "error: interrupted. Nothing half-written was left; the same command begins again."
    )
    with (
        pytest.raises(EsdLoraError, match=r"interrupted; the same command goes on in .*measured\."),
        going_on_in(tmp_path / "measured"),
    ):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        OSError(errno.EBADF, "Bad file descriptor"),
        OSError("no number"),
        RuntimeError("shapes do not match"),
        ImportError("cannot import name"),
        KeyError("x"),
        ValueError("x"),
    ],
)
def test_bug_keeps_its_traceback(error: Exception) -> None:
    assert failing(error).exception is error


def too_much_for_torch() -> None:
    torch.empty(2**50)


def too_much_for_python() -> None:
    bytearray(2**60)


@pytest.mark.parametrize("allocate", [too_much_for_torch, too_much_for_python])
@pytest.mark.parametrize("single", [False, True])
def test_merge_without_memory(
    tiny_dir: Path, cat_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocate: Callable[[], None], single: bool
) -> None:
    base, out = tiny_dir, tmp_path / "out"
    if single:
        from original_checkpoints import save_checkpoint
        from tiny import tiny_pipeline

        base, out = save_checkpoint(tiny_pipeline(), tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(merging, "write_merged", lambda *_: allocate())
    result = CliRunner().invoke(main, ["merge", str(cat_dir), "--base", str(base), "-o", str(out)])
    assert sentence(result).startswith("error: there is not enough memory")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("megabytes", [150, 300])
def test_merge_under_a_limit(tiny_dir: Path, cat_dir: Path, tmp_path: Path, megabytes: int) -> None:
    """Too little for torch's libraries, so that it ends before a tensor is read, on every machine."""
    done = subprocess.run(
        [*COMMAND, "merge", str(cat_dir), "--base", str(tiny_dir), "-o", str(tmp_path / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20,) * 2),
        **{"capture_output": True, "text": True, "check": False, "timeout": 120},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is not enough memory (")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


NAMES = {
    "recipe": "train {x} -o out",
    "base to train on": "train --concept cat --base {x} -o out",
    "output of train": "train --concept cat --base {tiny} -o {x}",
    "output to go on in": "train --concept cat --base {tiny} --resume -o {x}",
    "base to paint with": "generate cat --base {x} -o out",
    "eraser to paint with": "generate cat --base {tiny} --eraser {x} -o out",
    "output of generate": "generate cat --base {tiny} -o {x}",
    "eraser to stack": "stack {x} -o out",
    "output of stack": "stack {cat} -o {x}",
    "output of stack, by force": "stack {cat} -o {x} --force",
    "manifest to make": "stack {cat} -o {x}.yaml",
    "list of prompts": "stack {cat} --base {tiny} --keep {x} -o out",
    "base to stack on": "stack {cat} --base {x} -o out",
    "eraser to merge": "merge {x} --base {tiny} -o out",
    "base to merge into": "merge {cat} --base {x} -o out",
    "output of merge": "merge {cat} --base {tiny} -o {x}",
    "file to inspect": "inspect {x}",
    "file to compare": "diff {x} {cat}",
    "eraser to export": "export {x} --layout kohya -o out.safetensors",
    "output of export": "export {cat} --layout kohya -o {x}.safetensors",
    "directory of an adapter": "export {cat} --layout peft -o {x}",
    "file to import": "import {x} -o out",
    "output of import": "import {cat} -o {x}",
    "base to extract from": "extract --base {x} --tuned {tiny} --rank 2 -o out",
    "tuned weights": "extract --base {tiny} --tuned {x} --rank 2 -o out",
    "output of extract": "extract --base {tiny} --tuned {tiny} --rank 2 -o {x}",
    "eraser to push": "push {x} ada/x --dry-run",
    "output of pull": "pull ada/x -o {x}",
    "recipe to show": "recipes show {x}",
    "recipe to copy": "recipes copy {x} -o out.yaml",
    "copy of a recipe": "recipes copy fast -o {x}",
    "recipe to check": "recipes check {x}",
    "eraser to measure": "evaluate {x} --base {tiny} --suite {suite} -o out",
    "base to measure": "evaluate --base {x} --suite {suite} -o out",
    "suite": "evaluate --base {tiny} --suite {x} -o out",
    "prompt file": "evaluate --base {tiny} --suite nudity --prompts {x} -o out",
    "output of evaluate": "evaluate --base {tiny} --suite {suite} -o {x}",
    "pictures": "evaluate --suite {suite} --score-only {x} -o out",
    "other base": "evaluate --base {tiny} --suite {suite} --against {x} -o out",
}


@pytest.fixture
def names(tiny_dir: Path, cat_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What stands in the commands' places; every test works in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.yaml").write_text(SUITE)
    return {"tiny": tiny_dir, "cat": cat_dir, "suite": tmp_path / "suite.yaml"}


def refused(command: str, names: dict[str, object], name: str) -> str:
    return sentence(CliRunner().invoke(main, [word.format(**names, x=name) for word in command.split()]))


@pytest.mark.parametrize("command", NAMES.values(), ids=NAMES)
def test_names_that_no_file_can_have(command: str, names: dict[str, object], tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    refused(command, names, LONG)
    refused(command, names, f"{LONG}/x")
    (tmp_path / "loop").symlink_to("loop")
    refused(command, names, "loop/x")
    os.unlink("loop")  # noqa: PTH108
    # A command may have made its output's directory before it read the rest.
    left = {path.name for path in tmp_path.iterdir()} - set(before)
    assert left <= {"out"}, left
    assert not any((tmp_path / "out").glob("*"))


def test_argument_that_is_no_utf_8(cat_dir: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    os.symlink(os.fsencode(cat_dir), odd)  # noqa: PTH211
    for command in ([b"inspect", odd], [b"stack", odd, b"-o", b"out"], [b"stack", os.fsencode(cat_dir), b"-o", odd + b"2"]):
        done = subprocess.run(
            [*map(os.fsencode, COMMAND), *command], capture_output=True, check=False, timeout=120, cwd=tmp_path
        )
        assert done.returncode == 1
        assert done.stdout == b""
        assert done.stderr.startswith(b"error: argument '")
        assert rb"caf\udce9" in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_work_below_a_directory_that_is_no_utf_8(
    cat_dir: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is nowhere written, and where it is printed it is shown by its code."""
    home = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    (home / os.fsdecode(b"no-\xff")).mkdir(parents=True)
    shutil.copytree(cat_dir, home / os.fsdecode(b"no-\xff"), dirs_exist_ok=True)
    shutil.copytree(cat_dir, home / "cat")
    shutil.copytree(tiny_dir, home / "tiny")
    (home / "suite.yaml").write_text(SUITE)
    monkeypatch.chdir(home)
    for command in (
        "stack cat -o both",
        "stack cat -o both.yaml",
        "inspect both.yaml",
        "export both --layout kohya -o k.safetensors",
        "import k.safetensors -o again",
        "merge cat --base tiny -o merged",
        "generate cat --base tiny --steps 1 --eraser cat -o pictures",
        "evaluate cat --base tiny --suite suite.yaml -o measured --attach",
        "push cat ada/x --dry-run --base-model stable-diffusion-v1-5/stable-diffusion-v1-5",
    ):
        result = CliRunner().invoke(main, command.split())
        assert result.exit_code == 0, (command, result.output, result.exception)
    listed = CliRunner().invoke(main, ["catalog", "--no-cache"])
    assert "a cat" in listed.stdout  # safetensors opens no file below no-\xff, and a list is no place to stop at
    assert json.loads(CliRunner().invoke(main, ["catalog", "--no-cache", "--json"]).stdout)["erasers"]
    line = sentence(CliRunner().invoke(main, ["stack", "cat", str(home / "none")[-8:], "-o", "x"]))
    assert "none" in line


def test_file_system_of_few_characters() -> None:
    """Where the locale knows ASCII alone, a name that is not becomes no file."""
    code = r"""import click
from pathlib import Path
from esd_lora.cli.commands import Commands
make = click.command("make")(lambda: Path("caf\u00e9").mkdir())
Commands("esd-lora", commands={"make": make})(["make"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
        **{"capture_output": True, "text": True, "check": False, "timeout": 120},
    )
    assert done.returncode == 1
    expected = r"error: the system's encoding, ascii, has no '\xe9' for a file's name. Set PYTHONUTF8=1."
    assert done.stderr.splitlines()[-1] == expected
    assert failing(error := UnicodeEncodeError("ascii", "é", 0, 1, "no")).exception is error  # a bug on this system


@pytest.mark.parametrize("command", ["recipes list", "stack {cat} -o out", "generate cat --eraser {cat} -o out"])
def test_working_directory_that_is_gone(command: str, cat_dir: Path, tmp_path: Path) -> None:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    words = [word.format(cat=cat_dir) for word in command.split()]
    done = subprocess.run(
        ["sh", "-c", script, "sh", str(Path(sys.executable).with_name("esd-lora")), *words],
        **{"capture_output": True, "text": True, "check": False, "timeout": 120, "cwd": tmp_path},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: the working directory is gone. Change into one that exists."
    assert done.stdout == ""
