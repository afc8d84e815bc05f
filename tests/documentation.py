"""The code blocks of README and docs: where they stand, which are not run and why, and how the others are."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner

from esd_lora.cli import main

PROJECT = Path(__file__).parents[1]
RUN = ("sh", "python")
"""Languages of blocks that are run unless a comment before them says why not."""
SHOWN = ("text", "yaml", "toml", "json", "csv")
"""Languages of blocks to look at."""
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_HERE = re.compile(r"<<'?(?P<end>\w+)'?")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run; `None` where it is, or where it is only to look at."""


def pages() -> list[Path]:
    """Return README and every page of docs that a person wrote."""
    return [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """Return a page's path inside the project."""
    return (page.relative_to(PROJECT) if page.is_relative_to(PROJECT) else page).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    text = page.read_text("utf-8")
    return [
        Block(name_of(page), 1 + text.count("\n", 0, match.start("text")), *match.group("language", "text", "reason"))
        for match in _FENCE.finditer(text)
    ]


def unfenced(page: Path) -> str:
    """Return what stands outside of a page's fenced blocks."""
    return _FENCE.sub("", page.read_text("utf-8"))


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a shell block: a line each, and what it goes on in or reads from."""
    lines = iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        command = line
        while command.endswith("\\"):
            command = command[:-1] + next(lines).lstrip()
        if match := _HERE.search(command):
            for more in lines:
                command += f"\n{more}"
                if more == match["end"]:
                    break
        yield command


def words_of(command: str) -> list[str]:
    """Return the words of a command, without its comment; what a shell reads between them (`|`, `>`) is a word of its own."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def is_operator(word: str) -> bool:
    """Return whether a word is the shell's: `|`, `>`, `&&`."""
    return re.fullmatch(r"[();<>|&]+", word) is not None


def run_blocks(page: Path, folder: Path) -> int:
    """Run a page's blocks in their order, in the working directory, and return how many there were.

    Args:
        page: The page.
        folder: The working directory, empty at first; the caller has changed into it.

    Raises:
        AssertionError: If a command fails, with the page, its line and what it printed.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for block in blocks(page):
        if block.language not in RUN or block.reason:
            continue
        count += 1
        if block.language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("default")  # as for a reader; pytest makes errors of them
                exec(compile(block.text, f"{block.page}:{block.line}", "exec"), names)
            continue
        for command in commands(block.text):
            code, output = _run(command, folder)
            assert code == 0, f"{block.page}:{block.line}: {command}\n{output}"
    return count


def _run(command: str, folder: Path) -> tuple[int, str]:
    """Run a command and return its exit code and output: one of ours in this process, anything else in bash."""
    words = words_of(command)
    if words[0] == "esd-lora" and "$" not in command and not any(map(is_operator, words)):
        result = CliRunner().invoke(main, words[1:], catch_exceptions=False)
        return result.exit_code, result.output
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr
