"""The strength of the push as ESD's 2025 scripts say it, in the place of eta."""

from __future__ import annotations

from esd_lora.errors import EsdLoraError
from esd_lora.recipe import Recipe


def with_negative_guidance(recipe: Recipe, guidance: float) -> Recipe:
    """Return the recipe with the eta that gives the target of ESD's 2025 scripts at a negative guidance.

    `esd_sd.py` of github.com/rohitgandikota/erasing trains on `start - guidance * (concept - null)`, where `start` is the
    prompt `erase_from` and, without one, the concept itself. Measured from the anchor,

        eta = guidance - 1    for the empty anchor, as concept - g (concept - null) = null - (g - 1) (concept - null)
        eta = guidance        for an `erase_from`, which is its own anchor

    and no eta gives it for another anchor, which the scripts do not know.

    Args:
        recipe: What to train; its eta does not matter, and no anchor is chosen for it.
        guidance: The scripts' `negative_guidance`; 2 for SD and 1 for SDXL there.

    Raises:
        EsdLoraError: If a prompt has another anchor, or prompts of both kinds stand side by side.
    """
    etas: set[float] = set()
    for start, prompt, anchor in (lesson for concept in recipe.concepts for lesson in concept.lessons()):
        if not (empty := anchor == "" and start == prompt) and (anchor != start or recipe.objective != "esd"):
            raise EsdLoraError(
                f"negative guidance {guidance:g}: ESD's scripts know no anchor, so no eta gives their target for {prompt!r},"
                f" which is anchored at {anchor!r}. Leave out the anchor, or give eta instead, as measured from it: -s eta=1."
            )
        etas.add(guidance - 1 if empty else guidance)
    if len(etas) > 1:
        raise EsdLoraError(
            f"negative guidance {guidance:g} is eta {min(etas):g} for prompts that are erased from themselves, and"
            f" {max(etas):g} for those that are erased from another. Train them apart, or give one eta: -s eta=1."
        )
    return recipe.model_copy(update={"eta": etas.pop(), "anchor": None})
