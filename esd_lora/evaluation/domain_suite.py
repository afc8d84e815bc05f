"""Measuring erasers on a built-in base: what to paint, what the judge said, what it amounts to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from esd_lora import built_in
from esd_lora.bases.base import Base
from esd_lora.evaluation.judge import Judge, Verdict
from esd_lora.pictures import paint


class Shot(NamedTuple):
    """One picture to paint, and what it should show; `None` where the prompt does not say."""

    prompt: str
    seed: int
    object: str | None
    style: str | None


class Scored(NamedTuple):
    """A shot and what the judge saw on its picture."""

    shot: Shot
    verdict: Verdict

    @property
    def object_right(self) -> bool:
        return self.shot.object == self.verdict.object

    @property
    def style_right(self) -> bool:
        return self.shot.style == self.verdict.style

    @property
    def right(self) -> bool:
        """Whether everything the prompt asked for is there."""
        return (self.shot.object is None or self.object_right) and (self.shot.style is None or self.style_right)


def wording(template: str, object: str = "", style: str = "") -> str:
    """A domain template filled in, with the object's article."""
    article = "an" if object[:1] in "aeiou" else "a"
    return template.format(a=f"{article} {object}", object=object, style=style)


def every_pair(base: str = "emoji", seed: int = 0) -> list[Shot]:
    """One shot of every object in every style, held-out pairs left out; wordings and seeds take turns."""
    known = built_in.domain(base)
    held_out = {tuple(pair) for pair in known["held_out"]}
    templates = known["templates"]["both"]
    pairs = [(o, s) for o in known["objects"] for s in known["styles"] if (o, s) not in held_out]
    return [Shot(wording(templates[i % len(templates)], o, s), seed + i, o, s) for i, (o, s) in enumerate(pairs)]


def of_object(name: str, trained: Collection[str], count: int, base: str = "emoji", seed: int = 0) -> list[Shot]:
    """`count` shots of one object on prompts that are not in `trained`, over wordings, styles and backgrounds."""
    known = built_in.domain(base)
    templates, background = known["templates"], known["templates"]["background"]
    held_out = {tuple(pair) for pair in known["held_out"]}
    prompts = [(wording(t, name, s), s) for t in templates["both"] for s in known["styles"] if (name, s) not in held_out]
    prompts += [(wording(t, name), None) for t in templates["object"]]
    prompts += [(wording(templates["object"][0], name) + background.format(background=b), None) for b in known["backgrounds"]]
    fresh = [(prompt, style) for prompt, style in prompts if prompt not in trained]
    return [Shot(fresh[i % len(fresh)][0], seed + i, name, fresh[i % len(fresh)][1]) for i in range(count)]


def of_style(style: str, trained: Collection[str], count: int, base: str = "emoji", seed: int = 0) -> list[Shot]:
    """`count` shots of every object in turn in one style, on prompts that are not in `trained`."""
    known = built_in.domain(base)
    held_out = {tuple(pair) for pair in known["held_out"]}
    prompts = [
        (wording(template, name, style), name)
        for template in known["templates"]["both"]
        for name in known["objects"]
        if (name, style) not in held_out
    ]
    fresh = [(prompt, name) for prompt, name in prompts if prompt not in trained]
    stride = 7  # coprime to the number of prompts in the shipped domain: wordings and objects mix early
    return [Shot(fresh[i * stride % len(fresh)][0], seed + i, fresh[i * stride % len(fresh)][1], style) for i in range(count)]


def score(base: Base, judge: Judge, shots: Sequence[Shot], **sampling: Any) -> list[Scored]:
    """Paints the shots with the base as it stands and lets the judge name them."""
    pictures = paint(base, [shot.prompt for shot in shots], [shot.seed for shot in shots], **sampling)
    return [Scored(shot, verdict) for shot, verdict in zip(shots, judge(pictures), strict=True)]


class Count(NamedTuple):
    """A share with what it was counted from."""

    hits: int
    of: int

    @property
    def share(self) -> float:
        return self.hits / self.of if self.of else float("nan")


def count(flags: Iterable[bool]) -> Count:
    """How many flags are true."""
    seen = list(flags)
    return Count(sum(seen), len(seen))


def kept(scored: Sequence[Scored], before: Sequence[Scored], objects: Collection[str], styles: Collection[str]) -> float:
    """Accuracy on what was not erased, relative to the base's own on the same prompts and seeds.

    Args:
        scored: With erasers on.
        before: The same shots on the base.
        objects: Erased objects; shots of them do not count.
        styles: Erased styles.
    """
    outside = [
        (a.right, b.right)
        for a, b in zip(scored, before, strict=True)
        if a.shot.object not in objects and a.shot.style not in styles
    ]
    return count(a for a, _ in outside).share / count(b for _, b in outside).share
