"""Generating pictures with erasers on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL.Image import Image

from esd_lora.eraser import Eraser
from esd_lora.families import Base, load_base, quiet_libraries
from esd_lora.pictures import paint
from esd_lora.stacking import stack

_ADAPTER = "esd_applied"


def generate(
    base: str | Path | Base,
    prompts: Sequence[str],
    *,
    erasers: Sequence[Eraser | str | Path] = (),
    weights: Sequence[float] | None = None,
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
    base = base if isinstance(base, Base) else load_base(base)
    asked = [(prompt, seed) for prompt in prompts for seed in seeds]
    loaded = [eraser if isinstance(eraser, Eraser) else Eraser.load(eraser) for eraser in erasers]
    with applied(base, loaded, weights):
        return paint(base, [p for p, _ in asked], [s for _, s in asked], steps=steps, guidance=guidance)


@contextmanager
def applied(base: Base, erasers: Sequence[Eraser], weights: Sequence[float] | None = None) -> Iterator[None]:
    """Has erasers on the base, as one adapter loaded by diffusers itself, for the length of a `with` block.

    Raises:
        EsdLoraError: If an eraser is of another family or has layers the base lacks, or the base carries an adapter.
    """
    if not erasers:
        yield
        return
    base.require_bare()
    stacked = stack(erasers, weights)
    base.check(stacked)
    with quiet_libraries():  # diffusers remarks that an eraser has nothing for the text encoder
        base.pipe.load_lora_weights(stacked.state_dict(), adapter_name=_ADAPTER)
    try:
        yield
    finally:
        base.model.unload_lora()  # takes the wrapped layers out too, so that the base is as it came
