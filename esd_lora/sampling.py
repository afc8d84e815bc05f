"""Generating pictures with erasers on."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from esd_lora.eraser import Eraser, LoraPair
from esd_lora.errors import EsdLoraError
from esd_lora.families import Base, load_base
from esd_lora.manifests import load_eraser
from esd_lora.pictures import paint
from esd_lora.stacking import Strength, stack


def generate(
    base: str | Path | Base,
    prompts: Sequence[str],
    *,
    erasers: Sequence[Eraser | str | Path] = (),
    weights: Sequence[float | Strength] | None = None,
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
        seeds: Of the noise; the same seed with and without erasers starts from the same noise.
        steps: Denoising steps; the base's habit unless given.
        guidance: Classifier-free guidance scale; the base's habit unless given.

    Raises:
        EsdLoraError: If the base or an eraser cannot be loaded, or they do not fit each other.
    """
    found = sweep(base, prompts, (1.0,), erasers=erasers, weights=weights, seeds=seeds, steps=steps, guidance=guidance)
    return found[1.0]


def sweep(
    base: str | Path | Base,
    prompts: Sequence[str],
    strengths: Sequence[float],
    *,
    erasers: Sequence[Eraser | str | Path] = (),
    weights: Sequence[float | Strength] | None = None,
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
    pictures: dict[float, list[Image]] = {}
    with applied(base, loaded, weights) as fused:
        for strength in dict.fromkeys(strengths):
            fused.set_strength(strength)
            pictures[strength] = paint(base, [p for p, _ in asked], [s for _, s in asked], steps=steps, guidance=guidance)
    return pictures


class Fused:
    """A stack added to a base's weights: it costs nothing at inference, and its strength can still be changed.

    The weights it touches are kept as they were, on the CPU, so every strength is summed anew in float32 and rounded once,
    and taking the stack off gives the base back bit for bit.
    """

    def __init__(self, base: Base, stacked: Eraser | None):
        pairs = stacked.pairs if stacked else {}
        self._layers: list[tuple[Tensor, Tensor, LoraPair]] = [
            (weight.data, weight.detach().to("cpu", copy=True), pairs[path]) for path, weight in base.weights(pairs)
        ]

    @torch.no_grad()
    def set_strength(self, strength: float) -> None:
        """Applies the stack at a factor on top of its members' weights; 0 is the base itself."""
        for weight, original, pair in self._layers:
            weight.copy_(original)
            if strength:
                precise = torch.promote_types(weight.dtype, torch.float32)
                delta = LoraPair(*(factor.to(weight.device, precise) for factor in pair)).delta()
                weight.copy_((weight.to(precise) + strength * delta).to(weight.dtype))


@contextmanager
def applied(base: Base, erasers: Sequence[Eraser], weights: Sequence[float | Strength] | None = None) -> Generator[Fused]:
    """Has erasers on the base, fused into its weights as one stack, for the length of a `with` block.

    Yields:
        The fused stack, whose strength may be changed on the way.

    Raises:
        EsdLoraError: If an eraser is of another family or has layers the base lacks, or the base carries an adapter.
    """
    if not erasers:
        if weights:
            raise EsdLoraError(f"{len(weights)} weights and no erasers: give a weight for each eraser.")
        yield Fused(base, None)
        return
    base.require_bare()
    stacked = stack(erasers, weights)
    base.check(stacked)
    fused = Fused(base, stacked)
    try:
        fused.set_strength(1.0)
        yield fused
    finally:
        fused.set_strength(0.0)
