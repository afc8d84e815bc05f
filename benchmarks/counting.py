"""Counting on learned bases of emoji: what their judge sees on pictures of cases, and what that amounts to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.built_in import domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.evaluation.cases import Case, fill_template, object_cases, pair_cases, style_cases
from esd_lora.evaluation.detectors.judge import Judge, Verdict
from esd_lora.pictures import paint

SHOTS = 120
"""Pictures of what is erased."""
HIGH = 1.9
"""Times the base's guidance is a high one."""
NEAREST, SHOTS_OF_NEAREST = 4, 6
"""Objects that are nearest to an erased one, and pictures of each of their prompts."""


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


def every_object() -> list[Case]:
    """Return three cases of every object, no style named: a neighbour has least to hold on to there."""
    names = domain("emoji")["objects"]
    return [Case(f"{name}-{seed}", "general", fill_template("{a}", name), seed, name) for name in names for seed in (7, 8, 9)]


def nearest_objects(base: Base, name: str) -> list[Case]:
    """Return cases of the objects whose prompts the base's text encoder puts nearest to that of an erased one."""
    prompts = {other: fill_template("{a}", other) for other in domain("emoji")["objects"] if other != name}
    likeness = (base.directions([fill_template("{a}", name)]) @ base.directions(list(prompts.values())).T)[0]
    others = [list(prompts)[i] for i in likeness.argsort(descending=True)[:NEAREST].tolist()]
    return [
        Case(f"{other}-{number}-{seed}", "neighbour", prompt, seed, other)
        for other in others
        for number, prompt in enumerate((prompts[other], other))
        for seed in range(SHOTS_OF_NEAREST)
    ]


@contextmanager
def replaced(base: Base, weights: Mapping[str, Tensor]) -> Generator[None]:
    """Replace weights of a base's denoiser for the length of a `with` block."""
    own = dict(base.model.named_parameters())
    before = {name: own[name].detach().clone() for name in weights}
    try:
        for name, weight in weights.items():
            own[name].data.copy_(weight)
        yield
    finally:
        for name, weight in before.items():
            own[name].data.copy_(weight)


class Yardstick:
    """What erasers of objects and styles leave and keep on a learned base.

    Args:
        base: That the erasers are for.
        folder: Where what was measured is kept, by the erasers' weights: the same file is not judged twice.
    """

    def __init__(self, base: Base, folder: Path):
        self.base, self.folder, self.judge = base, folder, Judge("emoji")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.before = score(base, self.judge, pair_cases())
        self.bare = score(base, self.judge, every_object())

    def measure(
        self, erasers: Sequence[Eraser], objects: Collection[str], styles: Collection[str], without: Collection[str] = ()
    ) -> dict[str, Any]:
        """Return erased and kept shares of erasers on the base, on prompts that they were not made with.

        Args:
            erasers: All of them at once.
            objects: That they erase.
            styles: That they erase.
            without: Further prompts that are not asked for, so that erasers made with different ones compare.
        """
        pairs = [pair for eraser in erasers for concept in eraser.header.concepts for pair in concept.pairs]
        # Of the products: factors, and layers that do nothing, differ by seed where what they do does not.
        updates = (eraser.pairs[path].delta() for eraser in erasers for path in sorted(eraser.pairs))
        return self._once(lambda: applied(self.base, erasers), updates, pairs, sorted(objects), sorted(styles), without)

    def measure_weights(
        self, weights: Mapping[str, Tensor], anchor: str, objects: Collection[str], without: Collection[str]
    ) -> dict[str, Any]:
        """Return the same of a denoiser of which some weights were replaced.

        Args:
            weights: Names in the denoiser's state dict to the new ones.
            anchor: What should appear instead.
            objects: That they erase.
            without: Prompts that are not asked for.
        """
        own = dict(self.base.model.named_parameters())
        updates = (weights[name] - own[name].detach() for name in sorted(weights))
        return self._once(lambda: replaced(self.base, weights), updates, [("", anchor)], sorted(objects), [], without)

    def _once(
        self,
        switch: Callable[[], AbstractContextManager[object]],
        updates: Iterable[Tensor],
        pairs: Sequence[tuple[str, str]],
        objects: Sequence[str],
        styles: Sequence[str],
        without: Collection[str],
    ) -> dict[str, Any]:
        """Return what was measured of these updates before, the same to three digits, or measure it."""
        digest = hashlib.sha256(repr((pairs, sorted(without))).encode())
        for update in updates:
            if update.any():
                flat = update.flatten(1).double()
                seen = flat @ torch.arange(1.0, flat.shape[1] + 1, dtype=flat.dtype).cos()
                digest.update(f"{float(flat.norm()):.2e} {float(seen.norm()):.2e} {float(seen.sum()):.2e}".encode())
        name = "-".join([Path(self.base.id).name, *objects, *styles, digest.hexdigest()[:16]])
        cache = self.folder / f"{name}.json"
        if not cache.exists():
            cache.write_text(json.dumps(self._measured(switch, pairs, objects, styles, without)))
        return json.loads(cache.read_text())

    def _measured(
        self,
        switch: Callable[[], AbstractContextManager[object]],
        pairs: Sequence[tuple[str, str]],
        objects: Sequence[str],
        styles: Sequence[str],
        without: Collection[str],
    ) -> dict[str, Any]:
        known = domain("emoji")
        listed = {name for name in known["objects"] if fill_template("{a}", name) in known["keep"]}
        made_with = {prompt for prompt, _ in pairs} | {*without}
        shown = {anchor.rpartition(" ")[2] for _, anchor in pairs} & set(known["objects"]) if not styles else set()
        louder = dataclasses.replace(self.base, guidance=HIGH * self.base.guidance)
        cases = [s.case for s in self.before]
        near = [score(self.base, self.judge, nearest_objects(self.base, name)) for name in objects]
        with switch():
            scored, scored_bare = self._score(cases), self._score([s.case for s in self.bare])
            scored_near = [self._score([s.case for s in part]) for part in near]
            of_objects = [object_cases(name, made_with, SHOTS) for name in objects]
            of_styles = [style_cases(name, made_with, SHOTS) for name in styles]
            low, low_styles = [self._score(part) for part in of_objects], [self._score(part) for part in of_styles]
            high = [score(louder, self.judge, part) for part in of_objects]
            high_styles = [score(louder, self.judge, part) for part in of_styles]
        unlisted = [i for i, case in enumerate(cases) if object_of(case) not in listed]
        right = [s.right for s in scored_bare]
        lost = [s.case.parts[0] for s, now in zip(self.bare, right, strict=True) if s.right and not now]
        return {
            "object_left": [count(s.object_right for s in part).share for part in low],
            "object_left_high": [count(s.object_right for s in part).share for part in high],
            "style_left": [count(s.style_right for s in part).share for part in low_styles],
            "style_left_high": [count(s.style_right for s in part).share for part in high_styles],
            "object_right": [count(s.object_right for s in part).share for part in low_styles],
            "anchor_shown": [count(s.verdict.object in shown for s in part).share for part in low] if shown else [],
            "kept": kept(scored, self.before, objects, styles),
            "kept_unlisted": kept([scored[i] for i in unlisted], [self.before[i] for i in unlisted], objects, styles),
            "kept_bare": kept(scored_bare, self.bare, objects, styles),
            "kept_nearest": [kept(now, then, objects, styles) for now, then in zip(scored_near, near, strict=True)],
            "lost_bare": sorted(set(lost) - set(objects)),
        }

    def _score(self, cases: Sequence[Case]) -> list[Scored]:
        return score(self.base, self.judge, cases)


def columns(cells: Sequence[Mapping[str, Any]], measures: Iterable[str]) -> list[str]:
    """Return a row's text for each measure, of the shares that its cells have: a share each, or several."""
    texts: list[str] = []
    for measure in measures:
        shares = [share for cell in cells for share in (cell[measure] if isinstance(cell[measure], list) else [cell[measure]])]
        texts.append(spread(shares, left="left" in measure))
    return texts


def spread(cells: Iterable[float], *, left: bool) -> str:
    """Return the mean of shares and, in brackets, the worst one; an empty text for none.

    Args:
        cells: Shares from 0 to 1.
        left: Whether they are of what is left, so that the highest is the worst.
    """
    values = list(cells)
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.1%}"
    return f"{mean} ({(max if left else min)(values):.1%})" if len(values) > 1 else mean
