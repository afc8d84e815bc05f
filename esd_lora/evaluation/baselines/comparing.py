"""Comparing: the variants that `--against` names, ways to block a concept and other bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeAlias

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.header import ErasedConcept
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.evaluation.baselines.blocking import block_by_checker, block_by_negative_prompt, block_by_words
from esd_lora.evaluation.baselines.sld import SLD_STRENGTHS, block_by_sld
from esd_lora.evaluation.variants import Variant, base_record, make_painter
from esd_lora.wording import slug

Blocking: TypeAlias = "Callable[[Base, Sequence[ErasedConcept], int, float], Variant]"
"""Function from base, concepts to block, steps and guidance to a variant."""
BLOCKING: dict[str, Blocking] = {
    "negative-prompt": block_by_negative_prompt,
    **{f"sld-{strength}": block_by_sld(strength) for strength in SLD_STRENGTHS},
    "safety-checker": block_by_checker,
    "black-list": block_by_words,
}
"""Ways to block a concept, from the literature, by their names for `--against`."""
_ALIASES = {"sld": "sld-medium"}


def resolve_names(against: Sequence[str]) -> list[str]:
    """Return what to compare with: aliases in full, and without the base, which is always there."""
    return [_ALIASES.get(kind, kind) for kind in against if kind != "base"]


def baseline_name(kind: str) -> str:
    """Return the name of a variant to compare with: that of the way to block, or the last part of a base's path."""
    return kind if kind in BLOCKING else slug(Path(kind).name)


def baseline(kind: str, base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:
    """Return another way to keep concepts out, or another base altogether.

    Args:
        kind: One of `BLOCKING`, or a base's name, path or Hub id (the paper's filtered retraining: Stable Diffusion 2).
        base: Base that the concepts are blocked on.
        concepts: What to block.
        steps: Denoising steps.
        guidance: Guidance scale.

    Raises:
        EsdLoraError: If it is neither, or there is nothing to block.
        NotRun: If it is the safety checker, and the base has none.
    """
    if kind not in BLOCKING:
        near = did_you_mean(kind, BLOCKING)
        if near and not Path(kind).exists():
            raise EsdLoraError(f"no way to compare with is called {kind!r}{near}. Known: {', '.join(BLOCKING)}, or a base.")
        other = load_base(kind, device=str(base.model.device), dtype=base.model.dtype)
        record = {"base": base_record(other)}
        return Variant(baseline_name(kind), record, lambda: nullcontext(make_painter(other, steps, guidance)))
    if not concepts:
        raise EsdLoraError(f"{kind} needs something to block: give an eraser or --concept.")
    return BLOCKING[kind](base, concepts, steps, guidance)
