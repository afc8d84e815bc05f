"""Generating pictures with erasers on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.manifests import load_eraser
from esd_lora.erasers.stacking import Strength, strengths_of
from esd_lora.gating import Gate
from esd_lora.pictures import paint


def generate(
    base: str | Path | Base,
    prompts: Sequence[str],
    *,
    erasers: Sequence[Eraser | str | Path] = (),
    weights: Sequence[float | Strength] | None = None,
    gate: Gate | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance: float | None = None,
) -> list[Image]:
    """Generates one picture for each prompt and seed, prompts first: `[p0 s0, p0 s1, ..., p1 s0, ...]`.

    Args:
        base: A base name, directory or Hub id, or a loaded base.
        prompts: What to paint.
        erasers: Erasers or their paths, applied together as one exact stack.
        weights: Strength of each eraser, 1 by default.
        gate: Says for every prompt how far each eraser is on, on top of `weights`; without one all are on for all.
        seeds: Of the noise; the same seed with and without erasers starts from the same noise.
        steps: Denoising steps; the base's habit unless given.
        guidance: Classifier-free guidance scale; the base's habit unless given.

    Raises:
        EsdLoraError: If the base or an eraser cannot be loaded, or they do not fit each other.
    """
    asked: dict[str, Any] = {"seeds": seeds, "steps": steps, "guidance": guidance}
    return sweep(base, prompts, (1.0,), erasers=erasers, weights=weights, gate=gate, **asked)[1.0]


def sweep(
    base: str | Path | Base,
    prompts: Sequence[str],
    strengths: Sequence[float],
    *,
    erasers: Sequence[Eraser | str | Path] = (),
    weights: Sequence[float | Strength] | None = None,
    gate: Gate | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance: float | None = None,
) -> dict[float, list[Image]]:
    """Generates the same pictures at several strengths of the whole stack.

    Args:
        base: As in `generate`.
        prompts: As in `generate`.
        strengths: Factors on top of `weights`: 0 the base, 1 the erasers as they are, beyond 1 stronger than trained, below 0
            the concepts amplified. 0 to 1.5 is usual.
        erasers: As in `generate`.
        weights: As in `generate`.
        gate: As in `generate`.
        seeds: As in `generate`.
        steps: As in `generate`.
        guidance: As in `generate`.

    Returns:
        Strength to pictures, in `generate`'s order.

    Raises:
        EsdLoraError: As `generate` does.
    """
    base = base if isinstance(base, Base) else load_base(base)
    asked = [(prompt, seed) for prompt in prompts for seed in seeds]
    loaded = [eraser if isinstance(eraser, Eraser) else load_eraser(eraser) for eraser in erasers]
    given = strengths_of(loaded, weights)
    factors = {prompt: (1.0,) * len(loaded) for prompt in prompts}
    if gate is not None:
        factors = {prompt: tuple(gate(prompt)) for prompt in factors}
    pictures: dict[float, list[Image]] = {strength: [Image()] * len(asked) for strength in strengths}
    for alike in dict.fromkeys(factors.values()):
        places = [i for i, (prompt, _) in enumerate(asked) if factors[prompt] == alike]
        on = [(e, s.after(Strength(factor))) for e, s, factor in zip(loaded, given, alike, strict=True) if factor]
        with applied(base, [e for e, _ in on], [s for _, s in on]) as fused:
            for strength in pictures:
                fused.set_strength(strength)
                texts, numbers = zip(*(asked[i] for i in places), strict=True)
                painted = paint(base, texts, numbers, steps=steps, guidance=guidance)
                for place, picture in zip(places, painted, strict=True):
                    pictures[strength][place] = picture
    return pictures
