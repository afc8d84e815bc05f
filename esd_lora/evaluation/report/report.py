"""The report of an evaluation: all its numbers, typed, as `summary.json` holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from esd_lora.erasers.measured import Number, Numbers
from esd_lora.errors import EsdLoraError


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Distance(_Frozen):
    """How far a variant's pictures as a whole are from the base's, or from photos."""

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
    """How the members of a stack do alone and together, by one metric that is a rate."""

    metric: str
    members: tuple[MemberNumbers, ...]
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
    """What `evaluate` and `score_pictures` return, and `summary.json` holds.

    `report.variants["erased"]["target"]["accuracy"].value` is how often the judge still sees what was erased.
    """

    suite: str
    """Name of the suite; `custom` where it was not loaded from a file."""
    concepts: tuple[str, ...]
    """What counts as erased."""
    variants: Numbers
    labels: Numbers
    """Part of a label to variant to metric to number; empty where labels are too many to be classes."""
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

    @field_validator("stack", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return value or None

    def to_json(self) -> str:
        """Return the text of `summary.json`."""
        return json.dumps(_plain(self) | {"stack": _plain(self.stack) or {}}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Return the report of an evaluation that lies in a directory, or in a `summary.json`.

        Raises:
            EsdLoraError: If there is none, or it is damaged.
        """
        file = Path(path) / "summary.json" if Path(path).is_dir() else Path(path)
        try:
            return cls.model_validate(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError) as error:  # no file, no text, no JSON, or not of this shape
            reason = " ".join(str(error).split())
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
