"""Erasers on a loaded base: one stack added to its weights, adjustable, taken off again bit for bit."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from esd_lora.eraser import Eraser, LoraPair
from esd_lora.errors import EsdLoraError
from esd_lora.families import Base
from esd_lora.stacking import Strength, stack


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
