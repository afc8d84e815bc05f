"""What a training chooses by itself on a base, and why: what appears instead of a concept, and what is kept near it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from esd_lora.bases.base import Base
from esd_lora.closed_form import TriedAnchor, plain_prompts, try_anchors
from esd_lora.lessons import by_influence, pools
from esd_lora.recipe import AUTO, Recipe
from esd_lora.training import prepare_prompts

_NAMED = 5  # neighbours in a sentence
_OTHERS = 3  # anchors that came next


class Choices(NamedTuple):
    """What a training would choose."""

    recipe: Recipe
    """The recipe with its anchors, and the prompts that are guarded."""
    tried: dict[str, list[TriedAnchor]]
    """Concept to the prompts that could take its place, the best first; nothing where the recipe names one."""
    kept: list[str]
    """Prompts that are kept, those that erasing would move furthest first."""

    def lines(self) -> list[str]:
        """Return the choices as sentences."""
        lines = [self._anchor_of(concept.name) for concept in self.recipe.concepts]
        if guarded := self.recipe.guarded:
            lines.append(f"No update touches the text of {', '.join(map(repr, guarded))}.")
        if self.kept:
            plain = {*plain_prompts(self.kept)}
            nearest = ", ".join([repr(prompt) for prompt in self.kept if prompt in plain][:_NAMED])
            lines.append(
                f"{len(self.kept)} prompts are kept. Of the plain ones, erasing would move {nearest} furthest: these are what"
                " it hurts first."
            )
        return lines

    def _anchor_of(self, name: str) -> str:
        tried = self.tried.get(name)
        if not tried:
            anchors = {anchor for concept in self.recipe.concepts if concept.name == name for _, _, anchor in concept.lessons()}
            instead = ", ".join(sorted(map(repr, anchors - {""}))) or "nothing in particular (the empty prompt)"
            return f"Instead of {name!r} appears {instead}, as the recipe says."
        best, others = tried[0], tried[1 : 1 + _OTHERS]
        return (
            f"Instead of {name!r} appears {best.anchor!r}: of {len(tried)} kept prompts near it, the one reached best"
            f" and moving least of what is kept. The closed form gets {1 - best.left:.0%} of the way and moves kept text by"
            f" {best.moved:.1%}. Next come {', '.join(repr(each.anchor) for each in others) or 'none'}."
        )


def explain_choices(recipe: Recipe, base: Base, *, allow_code: Collection[str] = ()) -> Choices:
    """Return what training a recipe on a base would choose; prompts are encoded, and nothing is trained.

    Args:
        recipe: What to train.
        base: The loaded base, with its text encoders.
        allow_code: As `train` takes it.

    Raises:
        EsdLoraError: As `train` does where the recipe and the base do not fit each other.
    """
    encode = base.remembering(recipe.train.distilled_guidance)
    tried = try_anchors(recipe, base, encode) if recipe.anchor == AUTO else {}
    anchored = recipe.anchored({name: ranked[0].anchor for name, ranked in tried.items()})
    prepared = prepare_prompts(base, anchored, allow_code)
    kept = [lesson.prompt for lesson in prepared.planned if lesson.preserves]
    pairs = [texts[1:] for pool in pools(anchored, base.keep) for texts in pool]
    order = by_influence(pairs, kept, base.as_read(encode)) if kept else []
    return Choices(prepared.teacher.recipe, tried, [kept[i] for i in order])
