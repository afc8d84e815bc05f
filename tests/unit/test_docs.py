"""The documentation names what there is: every room has its page, every public name its row."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import click

import esd_lora
from esd_lora.cli import main

PACKAGE = Path(esd_lora.__file__).parent
DOCS = PACKAGE.parent / "docs"
tables = SimpleNamespace(**runpy.run_path(str(PACKAGE.parent / "benchmarks" / "tables.py")))


def test_every_room_stands_on_one_page_of_the_reference() -> None:
    pages = [page.read_text("utf-8") for page in (DOCS / "api").glob("*.md")]
    shown = [name for page in pages for name in re.findall(r"^::: esd_lora\.(\w+)$", page, re.MULTILINE)]
    rooms = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    rooms |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(shown) == sorted(rooms)


def test_every_public_name_has_a_row() -> None:
    rows = re.findall(r"^\| \[`(\w+)`\]\[(esd_lora\.[\w.]+)\]", (DOCS / "api" / "index.md").read_text("utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == esd_lora.__all__
    for name, place in rows:
        assert getattr(esd_lora, name).__module__ == place.rpartition(".")[0]


def test_every_page_of_the_reference_is_in_the_menu() -> None:
    menu = re.findall(r"api/\w+\.md", (PACKAGE.parent / "mkdocs.yml").read_text("utf-8"))
    assert sorted(menu) == sorted(f"api/{page.name}" for page in (DOCS / "api").glob("*.md"))


def test_every_command_stands_on_the_page_of_the_command_line() -> None:
    hook = SimpleNamespace(**runpy.run_path(str(DOCS / "cli_reference.py")))
    lines = list(hook.reference(main))
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    groups = [command for command in main.commands.values() if isinstance(command, click.Group)]
    below = [f"esd-lora {group.name} {name}" for group in groups for name in group.commands]
    assert sorted(headings) == sorted(["esd-lora", *(f"esd-lora {name}" for name in main.commands), *below])
    page = SimpleNamespace(file=SimpleNamespace(src_uri="cli.md"))
    text = hook.on_page_markdown("", page)
    for option in (
        option for command in main.commands.values() for option in command.params if isinstance(option, click.Option)
    ):
        assert option.opts[-1] in text
    assert hook.on_page_markdown("words", SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))) == "words"


def test_security_names_tests_that_there_are() -> None:
    text = (PACKAGE.parent / "SECURITY.md").read_text("utf-8")
    named = re.findall(r"`((?:tests|docs|benchmarks)/[\w./-]+)`", text)
    assert len(named) > 10
    assert [name for name in named if not (PACKAGE.parent / name).exists()] == []


def test_scripts_import_what_there_is() -> None:
    """Those of the benchmarks, the playground and the collection, which the type checker does not see."""
    missing: list[str] = []
    for script in (
        path for folder in ("benchmarks", "playground", "hub_upload") for path in (PACKAGE.parent / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(script.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("esd_lora"):
                module = importlib.import_module(str(node.module))
                missing += [f"{script.name}: {alias.name}" for alias in node.names if not hasattr(module, alias.name)]
    assert missing == []


def test_tables_are_what_their_commands_printed() -> None:
    """A figure in a table changes by the command that stands below it, or not at all."""
    kept = tables.kept()
    shown: set[str] = set()
    for page in tables.pages():
        text = page.read_text("utf-8")
        names = [place["name"] for place in tables.PLACE.finditer(text)]
        assert [name for name in names if name not in kept] == [], page.name
        assert tables.filled(text, kept) == text, f"{page.name}: run python benchmarks/tables.py"
        shown |= set(names)
    assert sorted(shown) == sorted(kept), "every table that is kept is shown"
    assert len(shown) > 3


def test_a_table_whose_figure_was_changed_by_hand_is_seen() -> None:
    table = {"command": "c", "date": "d", "machine": "m", "note": "", "head": ["a"], "rows": [["1"]]}
    page = f"text\n<!-- table x -->\n{tables.rendered(table)}<!-- end of table -->\nmore\n"
    assert tables.filled(page, {"x": table}) == page
    assert tables.filled(page.replace("| 1 |", "| 2 |"), {"x": table}) == page
