"""Tables of figures: printed, kept in benchmarks/results/ with what made them, and shown in README and docs.

    python benchmarks/tables.py

writes every table that is kept into its place again: between `<!-- table NAME -->` and `<!-- end of table -->`. A test fails
where a page and what is kept differ, so a figure changes by its command alone, or not at all.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PLACE = re.compile(r"(?<=<!-- table )(?P<name>[\w-]+)(?P<open> -->\n)(?P<shown>.*?)(?=<!-- end of table -->)", re.DOTALL)


def add_publish(parser: argparse.ArgumentParser) -> None:
    """Add the option that has `show` keep what it prints."""
    parser.add_argument("--publish", action="store_true", help="keep the table in benchmarks/results/ (benchmarks/tables.py)")


def show(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "", *, publish: bool = False) -> None:
    """Print a table, and keep it if asked to.

    Args:
        name: Of its place, words joined by `-`.
        head: Names of the columns.
        rows: Their cells.
        note: What the reader has to know about how it was measured.
        publish: Whether to keep it.
    """
    table = {"name": name, "note": note, **circumstances(), "head": list(head), "rows": [list(row) for row in rows]}
    print(f"\n{rendered(table)}", flush=True)
    if publish:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", "utf-8")


def circumstances() -> dict[str, Any]:
    """Return when, from what and on what a table is made."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    threads = os.environ.get("OMP_NUM_THREADS")
    given = list(sys.argv[1:])
    if "--out" in given:  # where runs are kept is nobody else's business
        del given[(place := given.index("--out")) : place + 2]
    given = [argument for argument in given if argument != "--publish"]
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *given]
    return {
        "command": " ".join([*([f"OMP_NUM_THREADS={threads}"] if threads else []), shlex.join(words)]),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "versions": {package: version(package) for package in ("torch", "diffusers", "peft", "transformers")},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def rendered(table: dict[str, Any]) -> str:
    """Return a table as Markdown, with a line below that says where it is from."""
    lines = [f"| {' | '.join(table['head'])} |", "|---" * len(table["head"]) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in table["rows"]]
    note = f" {table['note']}" if table["note"] else ""
    return "\n".join([*lines, "", f"`{table['command']}`, {table['date']}, {table['machine']}.{note}", ""])


def kept() -> dict[str, dict[str, Any]]:
    """Return every table that is kept, by name."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def pages() -> list[Path]:
    """Return the pages that may show tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: str, tables: dict[str, dict[str, Any]]) -> str:
    """Return a page with the tables in their places.

    Raises:
        KeyError: If it has a place for a table that is not kept.
    """
    return PLACE.sub(lambda place: f"{place['name']}{place['open']}{rendered(tables[place['name']])}", page)


def main() -> None:
    tables = kept()
    for path in pages():
        before = path.read_text("utf-8")
        if (after := filled(before, tables)) != before:
            path.write_text(after, "utf-8")
            print(f"{path.relative_to(ROOT)} changed")


if __name__ == "__main__":
    main()
