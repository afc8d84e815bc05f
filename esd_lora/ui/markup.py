"""Pieces of HTML: tables, heat maps, pictures side by side, documents in frames. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment

from esd_lora.wording import printable_lines, printable_value

_PIECES = Environment(autoescape=True, finalize=printable_value, trim_blocks=True, lstrip_blocks=True).from_string(
    Path(__file__).with_name("pieces.html").read_text("utf-8")
)
PIECES_CSS = Path(__file__).with_name("pieces.css").read_text("utf-8")
"""How the pieces look."""
_ASKS_FOR_NOTHING = (
    '<!doctype html><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src'
    ' \'unsafe-inline\'"><base target="_blank">'
)
"""What goes before a document: whatever is in it, it fetches nothing, and its links, which a frame keeps from opening, lead
nowhere."""


class Shown(NamedTuple):
    """A picture as it is shown."""

    title: str
    data: str
    """Its address, with all of it inside: from `pictures.data_uri`."""
    caption: str = ""
    alt: str = ""
    small: bool = False
    """Whether it has so few pixels that they stay pixels."""


class Cell(NamedTuple):
    """A cell of a table that says more by its colour."""

    text: str
    mark: str = ""
    """`good`, `bad` or `soft`; nothing for none."""


def _render(piece: str, **values: Any) -> str:
    return str(getattr(_PIECES.module, piece)(**values)).strip()


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """Return a table, which scrolls by itself where it is wider than the page.

    Args:
        caption: What it shows, in a few words; read out, and shown above it.
        head: Titles of its columns.
        rows: As many cells each.
    """
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    return _render("table", caption=caption, head=head, rows=cells)


def heat_map(caption: str, scale: str, names: Sequence[str], matrix: Sequence[Sequence[float]], last_column: str = "") -> str:
    """Return a matrix as a table that is coloured: white at 0, red to 1 and above, blue below 0.

    Args:
        caption: What it shows.
        scale: What its numbers mean, in a few words.
        names: What rows and columns stand for.
        matrix: A row for each name.
        last_column: Name of one more column, if there is one.
    """
    rows = [[(f"{value:.2f}", _colour(value)) for value in row] for row in matrix]
    head = [*names, *([last_column] if last_column else [])]
    return _render("heat_map", caption=caption, scale=scale, head=head, rows=list(zip(names, rows, strict=True)))


def _colour(value: float) -> str:
    shade = int(255 - 160 * min(1.0, abs(value)))
    return f"rgb(255 {shade} {shade})" if value >= 0 else f"rgb({shade} {shade} 255)"


def picture_rows(rows: Sequence[tuple[str, str, Sequence[Shown]]], *, veiled: bool = False) -> str:
    """Return pictures side by side, row by row.

    Args:
        rows: Heading, a line in smaller letters, and pictures of each row.
        veiled: Whether pictures are blurred until they are clicked.
    """
    return _render("picture_rows", rows=rows, veiled=veiled)


def figures(rows: Mapping[str, str | Cell]) -> str:
    """Return names and what belongs to them, one a line."""
    return _render("figures", rows={name: cell if isinstance(cell, Cell) else Cell(cell) for name, cell in rows.items()})


def frame(document: str, title: str) -> str:
    """Return a document in a frame of its own, in which no script runs and nothing is fetched.

    Args:
        document: HTML, maybe a stranger's.
        title: What it shows, for whoever hears the page.
    """
    content = escape(_ASKS_FOR_NOTHING + document)
    return f'<iframe class="framed" sandbox="" title="{escape(title)}" srcdoc="{content}"></iframe>'


def note(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(printable_lines(text))}</p>"


def faults(message: str) -> str:
    """Return what is wrong, of which there may be several things, as a list that is read out at once.

    Args:
        message: Of an `EsdLoraError`: one sentence, or one and further lines that are indented.
    """
    first, *others = message.split("\n  ")
    return _render("faults", first=first[:1].upper() + first[1:], others=others)
