"""The report of an evaluation: all its numbers, typed, as `summary.json` holds them, and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from esd_lora.erasers.measured import (
    HEAD,
    INTERVALS,
    NOTHING,
    REST,
    TITLES,
    Number,
    Numbers,
    cells,
    markdown_cell,
    markdown_table,
    role_rows,
    worst_line,
)
from esd_lora.errors import EsdLoraError, shortened
from esd_lora.faults import first_fault
from esd_lora.files import read_bounded
from esd_lora.wording import in_one_line, printable_lines

_MOST_ROWS = 60  # of a table by label that anyone reads
_LARGEST = 2**24  # bytes of a report; one of a thousand labels has a tenth of it


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Distance(_Frozen):
    """Distance of a variant's pictures as a whole from the base's, or from photos."""

    value: float
    """Frechet distance, from 0."""
    of: int
    """Number of the variant's pictures."""


class MemberNumbers(_Frozen):
    """Rates on the targets of one member of a stack; `None` where the suite has no target of it."""

    name: str
    """The concepts it erases."""
    base: Number | None
    """On the base."""
    alone: Number | None
    """With the member alone."""
    together: Number | None
    """With all members on."""


class StackNumbers(_Frozen):
    """Numbers of the members of a stack, alone and together, by one metric that is a rate."""

    metric: str
    """Name of the metric."""
    members: tuple[MemberNumbers, ...]
    """The members, in the order of the stack."""
    matrix: tuple[tuple[Number | None, ...], ...]
    """Rate on the targets of member i (row) under member j alone (column), and under all (last column)."""
    kept: tuple[Number | None, ...]
    """Rate on neighbours and the rest by number of members, from 0."""


class GateOutcome(_Frozen):
    """A condition under which the evaluation counts as failed, and whether it holds."""

    gate: str
    """The condition, as given."""
    failed: bool


class Report(_Frozen):
    """All numbers of an evaluation: `evaluate` and `score_pictures` return it, and `summary.json` holds it.

    `report.variants["erased"]["target"]["accuracy"].value` is how often the judge still sees what was erased.
    """

    suite: str
    """Name of the suite; `custom` where it was not loaded from a file."""
    concepts: tuple[str, ...]
    """What counts as erased."""
    variants: Numbers
    """Variant (`base`, `erased`, ...) to role of the prompts to metric to number."""
    labels: Numbers
    """Part of a label to variant to metric to number; empty where labels are too many to be classes."""
    worst: Numbers = {}
    """What lost most, of neighbours and the rest: part of a label, worst first, to `base` and `erased` to metric to rate."""
    layout: dict[str, dict[str, float]]
    """Rows of a paper's table, for suites that follow one: row to column to share from 0 to 1."""
    stack: StackNumbers | None
    """Members alone and together, where that was measured."""
    distances: dict[str, dict[str, Distance]]
    """Distance to variant to its value."""
    not_run: dict[str, str]
    """Metric, prompts or variant to the reason why it was not measured."""
    record: dict[str, Any]
    """All that the numbers depend on, as JSON: suite, files, versions, base, variants, sampler, detectors."""
    gates: tuple[GateOutcome, ...]
    """Conditions under which it fails, in the order given."""

    @field_validator("stack", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return value or None

    @model_validator(mode="after")
    def _is_whole(self) -> Report:
        rows, detectors = list(self.layout.values()), self.record.get("detectors")
        if any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError("the rows of its layout have different columns")
        for name in self.distances:
            record = detectors.get(name) if isinstance(detectors, dict) else None
            if not isinstance(record, dict) or not {"metric", "beside"} <= record.keys():
                raise ValueError(f"its record does not say what the distance {shortened(name)} is measured by")
        return self

    @property
    def has_numbers(self) -> bool:
        """Whether anything was measured."""
        return bool(self.variants or self.distances)

    def to_json(self) -> str:
        """Return the text of `summary.json`."""
        return json.dumps(_plain(self) | {"stack": _plain(self.stack) or {}}, indent=1, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """Return the report as tables in Markdown: one for each role, then one by label for each metric."""
        variants, labels = list(self.variants), self.labels
        heads = list(map(markdown_cell, variants))
        parts = [f"# {markdown_cell(self.suite)}: {', '.join(map(markdown_cell, self.concepts)) or 'the base alone'}"]
        for role, title in TITLES.items():
            if rows := role_rows(self.variants, role):
                parts += [f"## {title}", markdown_table(HEAD, [cells(*row) for row in rows])]
                parts += [REST] * any(metric == "rest" for _, metric, _ in rows)
        if self.worst:
            parts.append(markdown_cell(worst_line(self.worst)))
        if self.layout:
            columns = list(next(iter(self.layout.values())))
            rows = [
                [markdown_cell(name), *(f"{100 * row[column]:.1f} %" for column in columns)]
                for name, row in self.layout.items()
            ]
            parts.append(markdown_table(["model", *columns], rows))
        for metric, rows in label_rows(labels, variants).items():
            head = [f"{markdown_cell(metric)} by label", *heads]
            parts.append(markdown_table(head, [[markdown_cell(label), *shares] for label, *shares in rows]))
        if self.stack:
            metric, kept = self.stack.metric, self.stack.kept
            rows = [[markdown_cell(name), *numbers] for name, *numbers in member_rows(self.stack)]
            parts += [
                "## Alone and together",
                markdown_table([f"{markdown_cell(metric)} on targets of", "base", "alone", "all together"], rows),
            ]
            rows = [[str(count), number.text() if number else ""] for count, number in enumerate(kept)]
            parts.append(markdown_table(["erasers", f"{markdown_cell(metric)} on neighbours and the rest"], rows))
        for name, distances in self.distances.items():
            record = self.record["detectors"][name]
            rows = [
                [markdown_cell(variant), f"{distance.value:g}", str(distance.of)] for variant, distance in distances.items()
            ]
            parts += [
                f"## {record['metric']}, beside {record['beside']}",
                markdown_table(["model", markdown_cell(name), "pictures"], rows),
            ]
        if self.not_run:
            parts += ["## Not run", "\n".join(f"- {in_one_line(f'{name}: {reason}')}" for name, reason in self.not_run.items())]
        return printable_lines("\n\n".join([*parts, INTERVALS if self.has_numbers else NOTHING])) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Return the report of an evaluation that lies in a directory, or in a `summary.json`.

        Raises:
            EsdLoraError: If there is none, or it is damaged or too large.
        """
        file = Path(path) / "summary.json" if Path(path).is_dir() else Path(path)
        try:
            return cls.model_validate(json.loads(read_bounded(file, _LARGEST).decode("utf-8")))
        except (OSError, ValueError, RecursionError) as error:  # no file, no text, no JSON, or not of this shape
            reason = first_fault(error) if isinstance(error, ValidationError) else in_one_line(str(error))
            raise EsdLoraError(f"no report can be read from {file} ({reason}). Expected an evaluation's directory.") from error


def _plain(value: Any) -> Any:
    """Return a value as JSON takes it."""
    if isinstance(value, Number):
        return value.to_dict()
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def member_rows(stack: StackNumbers) -> list[list[str]]:
    """Return members of a stack: name, and the rate of its targets on the base, alone and together."""
    rates = [(member.name, (member.base, member.alone, member.together)) for member in stack.members]
    return [[name, *(number.text() if number else "" for number in numbers)] for name, numbers in rates]


def label_rows(labels: Numbers, variants: list[str]) -> dict[str, list[list[str]]]:
    """Return for each metric that is a rate, and label that it was measured on: label, then hits and pictures of every variant.

    None where labels are too many.
    """
    if len(labels) > _MOST_ROWS:
        return {}
    rates = dict.fromkeys(
        metric
        for by_variant in labels.values()
        for metrics in by_variant.values()
        for metric, number in metrics.items()
        if number.hits is not None
    )

    def share(label: str, variant: str, metric: str) -> str:
        number = labels[label].get(variant, {}).get(metric)
        return f"{number.hits}/{number.of}" if number else ""

    rows = {metric: [[label, *(share(label, v, metric) for v in variants)] for label in labels] for metric in rates}
    return {metric: [row for row in own if any(row[1:])] for metric, own in rows.items()}
