"""Counting on the built-in base: what its judge sees on pictures of cases, and what that amounts to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from esd_lora.bases.base import Base
from esd_lora.built_in import domain
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.detectors.judge import Judge, Verdict
from esd_lora.pictures import paint


def object_of(case: Case) -> str | None:
    """Return the object that a case should show; `None` where its prompt names none."""
    return next((part for part in case.parts if part in domain("emoji")["objects"]), None)


def style_of(case: Case) -> str | None:
    """Return the style that a case should be in; `None` where its prompt names none."""
    return next((part for part in case.parts if part in domain("emoji")["styles"]), None)


class Scored(NamedTuple):
    """A case and what the judge saw on its picture."""

    case: Case
    verdict: Verdict

    @property
    def object_right(self) -> bool:
        """Whether the judge names the object."""
        return object_of(self.case) == self.verdict.object

    @property
    def style_right(self) -> bool:
        """Whether the judge names the style."""
        return style_of(self.case) == self.verdict.style

    @property
    def right(self) -> bool:
        """Whether everything the prompt names is there."""
        return {self.verdict.object, self.verdict.style}.issuperset(self.case.parts)


def score(base: Base, judge: Judge, cases: Sequence[Case], **sampling: Any) -> list[Scored]:
    """Paint the cases with the base as it stands and let the judge name them."""
    pictures = paint(base, [case.prompt for case in cases], [case.seed for case in cases], **sampling)
    return [Scored(case, verdict) for case, verdict in zip(cases, judge(pictures), strict=True)]


class Count(NamedTuple):
    """A share with what it was counted from."""

    hits: int
    of: int

    @property
    def share(self) -> float:
        """Share from 0 to 1."""
        return self.hits / self.of if self.of else float("nan")


def count(flags: Iterable[bool]) -> Count:
    """Return how many flags are true."""
    listed = list(flags)
    return Count(sum(listed), len(listed))


def kept(scored: Sequence[Scored], before: Sequence[Scored], objects: Collection[str], styles: Collection[str]) -> float:
    """Return the accuracy on what was not erased, relative to the base's own on the same prompts and seeds.

    Args:
        scored: With erasers on.
        before: The same cases on the base.
        objects: Erased objects; cases of them do not count.
        styles: Erased styles.
    """
    erased = {*objects, *styles}
    outside = [(a.right, b.right) for a, b in zip(scored, before, strict=True) if erased.isdisjoint(a.case.parts)]
    return count(a for a, _ in outside).share / count(b for _, b in outside).share
