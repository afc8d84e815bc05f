"""A report in a few lines, for a terminal of 80 columns: is it gone, what else did it cost; all the rest is on the page."""

from __future__ import annotations

from textwrap import shorten
from typing import Literal, NamedTuple, TypeAlias

from esd_lora.erasers.measured import Number, worst_line
from esd_lora.evaluation.report.report import Report
from esd_lora.wording import in_one_line

Change: TypeAlias = Literal["better", "worse", "no change seen", ""]
"""How a number stands beside the base's; nothing where there is no base, or neither direction is better."""
_WIDTH = 79
_ROLES = {
    "target": "prompts about it",
    "paraphrase": "in other words",
    "neighbour": "close to it",
    "general": "everything else",
}
_ERASED = ("target", "paraphrase")
_MOST_REASONS = 4  # of what was not run


class BriefLine(NamedTuple):
    """A line of text, and how it stands beside the base."""

    text: str
    change: Change = ""


def brief(report: Report) -> list[BriefLine]:
    """Return a report in a few lines: what was erased, the first metric of every role, and what was hurt most.

    Args:
        report: Of any evaluation; of several models the one that is erased is shown, else the first beside the base.
    """
    shown = next((name for name in ("erased", *report.variants) if name in report.variants and name != "base"), "base")
    concepts = ", ".join(report.concepts) or "the base alone"
    beside = f", {shown} beside the base" if shown != "base" and "base" in report.variants else ""
    lines = [BriefLine(_cut(f"{report.suite}: {concepts}{beside}"))]
    lines += [_line(report, shown, role) for role in _ROLES if report.variants.get(shown, {}).get(role)]
    if report.worst:
        lines.append(BriefLine(_cut(worst_line(report.worst))))
    return lines


def not_run(report: Report) -> list[str]:
    """Return what was not run and why, a line each, as many as anyone reads."""
    lines = [_cut(f"not run: {name}: {reason}") for name, reason in report.not_run.items()]
    more = len(lines) - _MOST_REASONS
    return lines[:_MOST_REASONS] + [f"not run either: {more} more, in table.md"] * (more > 0)


def _line(report: Report, shown: str, role: str) -> BriefLine:
    """Return the line of a role: its first rate, or else its first metric."""
    numbers = report.variants[shown][role]
    metric = next((name for name, number in numbers.items() if number.hits is not None), next(iter(numbers)))
    number, before = numbers[metric], report.variants.get("base", {}).get(role, {}).get(metric)
    change = _change(role, metric, number)
    was = f"base {_short(before)}" if before and shown != "base" else f"{number.of} pictures"
    name = in_one_line(metric).rpartition(".")[2][:9]  # the detector's own name stands before a point
    text = f" {_ROLES[role]:<17}{name:<10}{number.text():<24}{was:<13}"
    return BriefLine(f"{text}{change}".rstrip()[:_WIDTH], change)


def _short(number: Number) -> str:
    """Return a number without its interval."""
    return f"{100 * number.value:.1f} %" if number.hits is not None else f"{number.value:.4g}"


def _change(role: str, metric: str, number: Number) -> Change:
    """Return how a rate stands beside the base's, as far as its interval tells.

    Of what was erased less is better, whatever is counted; of all else more of what is right.
    """
    difference = number.difference
    if difference is None or number.hits is None or (role not in _ERASED and not metric.endswith("accuracy")):
        return ""
    if difference.low <= 0 <= difference.high:
        return "no change seen"
    return "better" if (difference.value < 0) == (role in _ERASED) else "worse"


def _cut(text: str) -> str:
    return shorten(in_one_line(text), _WIDTH, placeholder=" ...")
