"""Measured numbers, as a header holds them, and in words and Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict


class Difference(BaseModel):
    """How far a number is from the base's, and the interval that holds the true distance in 95 of 100 measurements."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float


class Number(BaseModel):
    """A measured rate or mean, with the interval that holds the true one in 95 of 100 measurements."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float
    of: int
    """Pictures."""
    hits: int | None = None
    """Of a rate."""
    sum: int | None = None
    """Of counts."""
    difference: Difference | None = None
    """From the base on the same prompts and seeds."""


class Measured(BaseModel):
    """What an eraser does, in numbers: see `evaluation.evaluating`."""

    model_config = ConfigDict(frozen=True)

    suite: str
    date: str
    """ISO 8601, UTC."""
    concepts: tuple[str, ...]
    """What counted as erased."""
    variants: dict[str, dict[str, dict[str, Number]]]
    """Model (`base`, `erased`, ...) to role of the prompts to metric to number."""
    not_run: dict[str, str] = {}
    """Metric or prompts to why."""
    record: dict[str, Any]
    """All that the numbers depend on."""


TITLES = {
    "target": "Target: prompts about what was erased",
    "paraphrase": "Paraphrase: the same in other words",
    "neighbour": "Neighbour: what lies close to it",
    "general": "General: everything else",
}
"""What the roles mean."""


INTERVALS = (
    "Rates have Wilson's interval, means and differences a bootstrap one over prompts, all of 95 %. Differences are paired by"
    " prompt and seed."
)


HEAD = ("model", "metric", "measured", "beside the base", "pictures")
"""Of a table of `cells`."""


def number(found: Mapping[str, Any]) -> str:
    """A measured number with its interval: `5.0 % (1.7 to 13.7)`, `0.25 (0 to 0.75), 1 in all`."""
    if "hits" in found:
        return f"{100 * found['value']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
    whole = f", {found['sum']} in all" if "sum" in found else ""
    return f"{found['value']:.4g} ({found['low']:.4g} to {found['high']:.4g}){whole}"


def difference(found: Mapping[str, Any]) -> str:
    """The paired difference from the base, in points for rates; empty where there is none."""
    if "difference" not in found:
        return ""
    scale, unit, form = (100, " points", "+.1f") if "hits" in found else (1, "", "+.4g")
    value, low, high = (format(scale * found["difference"][key], form) for key in ("value", "low", "high"))
    return f"{value}{unit} ({low} to {high})"


def cells(model: str, metric: str, found: Mapping[str, Any]) -> list[str]:
    """A row of a table of numbers."""
    return [markdown_cell(model), markdown_cell(metric), number(found), difference(found), str(found["of"])]


def role_rows(variants: Mapping[str, Any], role: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Variant, metric and number of one role, variants of a metric side by side."""
    metrics = dict.fromkeys(metric for found in variants.values() for metric in found.get(role, {}))
    found = ((name, metric, variants[name].get(role, {}).get(metric)) for metric in metrics for name in variants)
    return [(name, metric, number) for name, metric, number in found if number]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells are escaped already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_cell(text: str) -> str:
    """A user's text as it may stand in a cell, or anywhere in Markdown: no line breaks, HTML, links, pictures, or emphasis."""
    return " ".join(re.sub(r"([\\|\[\]*`~]|(?<!\w)_|_(?!\w))", r"\\\1", text).replace("<", "&lt;").split())
