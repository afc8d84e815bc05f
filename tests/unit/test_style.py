"""The shell is thin, and the code speaks the field's words: what a reader of the source is promised."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import esd_lora

PACKAGE = Path(esd_lora.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
LONGEST_BODY = 25
"""Lines of a command: it parses, calls one public function, and prints where the result is."""
DIALECT = {"told", "asked", "found", "said", "chance", "speaking", "wear", "company"}
"""Names that do not say what they hold: prompts, condition, metadata, generator, result."""


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text("utf-8"))


def commands() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield every command of the command line: its module and name, and its function."""
    for module in (name for name in MODULES if name.startswith("cli/")):
        for node in tree_of(module).body:
            if isinstance(node, ast.FunctionDef) and any(".command(" in ast.unparse(d) for d in node.decorator_list):
                yield f"{module}:{node.name}", node


def test_commands_are_seen() -> None:
    assert len(list(commands())) == 30


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else "")
def test_command_is_thin(name: str, command: ast.FunctionDef) -> None:
    first = command.body[1] if ast.get_docstring(command) else command.body[0]
    assert (command.end_lineno or 0) - first.lineno + 1 <= LONGEST_BODY, name


@pytest.mark.parametrize("module", MODULES)
def test_names_say_what_they_hold(module: str) -> None:
    names: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    assert not {name for name in names if name.strip("_") in DIALECT}


@pytest.mark.parametrize("module", MODULES)
def test_docstring_begins_with_what_is_done(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert not re.match(r"(Of|Has|As in)\b", node.value.value), f"{module}:{node.lineno}"


def test_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "esd_lora", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"esd-lora, version {esd_lora.__version__}"
