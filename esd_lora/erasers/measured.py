"""Measured numbers: as an eraser's header and an evaluation's report hold them, and in words and Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from esd_lora.wording import in_one_line


class Interval(BaseModel):
    """A number, and the interval that holds the true one in 95 of 100 such measurements."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float


class Number(Interval):
    """A measured rate or mean with its interval: a rate has `hits`, a mean of counts has a `sum`."""

    of: int
    """Number of pictures."""
    hits: int | None = None
    """Number of pictures that count, where the number is a rate."""
    sum: int | None = None
    """Sum over all pictures, where they were counted in whole numbers."""
    difference: Interval | None = None
    """Difference from the base on the same prompts and seeds."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `summary.json` holds: what does not apply is left out."""
        fields = self.model_dump(exclude_none=True)
        return {name: fields[name] for name in ("value", "low", "high", "hits", "of", "sum", "difference") if name in fields}

    def text(self) -> str:
        """Return the number with its interval in words: `5.0 % (1.7 to 13.7)`, `0.25 (0 to 0.75), 1 in all`."""
        if self.hits is not None:
            return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"
        total = "" if self.sum is None else f", {self.sum} in all"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g}){total}"

    def difference_text(self) -> str:
        """Return the difference from the base in words, in points for rates; empty where there is none."""
        if self.difference is None:
            return ""
        scale, unit, form = (1, "", "+.4g") if self.hits is None else (100, " points", "+.1f")
        value, low, high = (format(scale * x, form) for x in (self.difference.value, self.difference.low, self.difference.high))
        return f"{value}{unit} ({low} to {high})"


Numbers = dict[str, dict[str, dict[str, Number]]]
"""Three names to a number: of a report variant, role of the prompts and metric, or label, variant and metric."""


class Measured(BaseModel):
    """The part of a report that travels in an eraser's header: see `evaluation.report.report`."""

    model_config = ConfigDict(frozen=True)

    suite: str
    """Name of the suite."""
    date: str
    """ISO 8601, UTC."""
    concepts: tuple[str, ...]
    """What counted as erased."""
    variants: Numbers
    """Variant (`base`, `erased`, ...) to role of the prompts to metric to number."""
    worst: Numbers = {}
    """What lost most, of neighbours and the rest: part of a label, worst first, to `base` and `erased` to metric to rate."""
    not_run: dict[str, str] = {}
    """Metric or prompts to the reason why they were not measured."""
    record: dict[str, Any]
    """All that the numbers depend on."""


TITLES = {
    "target": "Target: prompts about what was erased",
    "paraphrase": "Paraphrase: the same in other words",
    "neighbour": "Neighbour: what lies close to it",
    "general": "General: everything else",
}
"""Role of a prompt to a heading that says what it means."""
INTERVALS = (
    "Rates have Wilson's interval, their differences Tango's, means and theirs a bootstrap one, all of 95 %. Differences are"
    " paired by prompt and seed, and several seeds of a prompt count as one group."
)
"""Sentence under every table of numbers."""
REST = (
    "`rest` is how often a target shows everything else that its prompt asks for: the style of what has no cat in it any more."
)
"""Sentence beside a table in which that metric stands."""
NOTHING = "Nothing was measured: no detector ran."
"""Sentence in place of all tables where there is no number."""
HEAD = ("model", "metric", "measured", "beside the base", "pictures")
"""Head of a table whose rows are `cells`."""


def cells(model: str, metric: str, number: Number) -> list[str]:
    """Return a row of a table of numbers, under `HEAD`."""
    return [markdown_cell(model), markdown_cell(metric), number.text(), number.difference_text(), str(number.of)]


def role_rows(variants: Mapping[str, Mapping[str, Mapping[str, Number]]], role: str) -> list[tuple[str, str, Number]]:
    """Return variant, metric and number of everything measured on one role, variants of a metric side by side."""
    metrics = dict.fromkeys(metric for roles in variants.values() for metric in roles.get(role, {}))
    rows = ((name, metric, variants[name].get(role, {}).get(metric)) for metric in metrics for name in variants)
    return [(name, metric, number) for name, metric, number in rows if number]


def worst_line(worst: Mapping[str, Mapping[str, Mapping[str, Number]]]) -> str:
    """Return what lost most in a line: `Hurt most: fox 11 of 18 (base 18 of 18), owl ...`."""
    parts: list[str] = []
    for label, models in worst.items():
        before, after = (next(iter(models[name].values())) for name in ("base", "erased"))
        parts.append(f"{label} {after.hits} of {after.of} (base {before.hits} of {before.of})")
    return f"Hurt most: {', '.join(parts)}."


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; cells must be escaped already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_cell(text: str) -> str:
    """Return a user's text escaped for Markdown: no line breaks, HTML, links, pictures, emphasis or controls are left in it."""
    return re.sub(r"([\\|\[\]*`~]|(?<!\w)_|_(?!\w))", r"\\\1", in_one_line(text)).replace("<", "&lt;")
