"""What is taught: the lessons of a recipe, erased prompts and preserved ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from esd_lora.bases.base import Base
from esd_lora.built_in import read_prompts
from esd_lora.errors import EsdLoraError
from esd_lora.recipe import Concept, Neighbours, Recipe


class Lesson(NamedTuple):
    """One prompt of the student and the rule for its target.

    A preserved prompt is the lesson whose anchor is the prompt itself and whose eta is 0: its target is the teacher's own
    prediction.
    """

    prompt: str
    """The prompt that the student reads, and that `x_t` is drawn under."""
    concept: str
    """The prompt to push away from."""
    anchor: str
    """The prompt of what should appear instead."""
    eta: float
    """Strength of the push, measured from the anchor."""

    @property
    def preserves(self) -> bool:
        """Whether the prompt's predictions should stay what they are."""
        return self.eta == 0 and self.anchor == self.prompt


def plan(recipe: Recipe, keep: Sequence[str] = (), near: Sequence[str] = ()) -> list[Lesson]:
    """Return the lessons of a recipe, erased prompts first.

    Args:
        recipe: Its pools and its `preserve` list.
        keep: The base's keep list, used by `preserve: default`; prompts that name a concept are dropped from it.
        near: Further prompts to preserve, from `nearest_prompts`.

    Raises:
        EsdLoraError: If there is nothing to erase, or the user's own preserve list names a concept that is to be erased.
    """
    lessons = [Lesson(*texts, recipe.eta) for concept in recipe.concepts for texts in concept.lessons()]
    if all(lesson.preserves for lesson in lessons):
        raise EsdLoraError("nothing to erase: with eta 0, every prompt is its own anchor. Raise eta or give another anchor.")
    erased = {lesson.prompt for lesson in lessons}
    listed = keep if recipe.preserve == "default" else recipe.preserve
    clashes = {prompt: concept.name for concept in recipe.concepts for prompt in listed if concept.named_in(prompt)}
    clashes |= {prompt: prompt for prompt in listed if prompt in erased}
    if clashes and recipe.preserve != "default":
        prompt, name = next(iter(clashes.items()))
        raise EsdLoraError(f"preserve holds {prompt!r}, which names {name!r}, a concept to erase. Take it out.")
    preserved = [prompt for prompt in listed if prompt not in clashes] + [prompt for prompt in near if prompt not in erased]
    return lessons + [Lesson(prompt, prompt, prompt, 0.0) for prompt in dict.fromkeys(preserved)]


def nearest_prompts(neighbours: Neighbours, concepts: Sequence[Concept], base: Base) -> list[str]:
    """Return the prompts of a vocabulary that the text encoder puts nearest to the concepts: what erasing hurts first.

    Nearness is the cosine between `Base.directions`. Prompts that name a concept are no neighbours of it.

    Raises:
        EsdLoraError: If the vocabulary's file cannot be read, or holds nothing else.
    """
    words = neighbours.vocabulary
    if isinstance(words, str):
        words = read_prompts(words)
    words = [word for word in dict.fromkeys(words) if not any(concept.named_in(word) for concept in concepts)]
    if not words:
        raise EsdLoraError("neighbours: the vocabulary holds no prompt that names no erased concept. Give a longer one.")
    erased = [concept.pairs()[0][0] for concept in concepts]
    directions = base.directions([*erased, *words])
    likeness = directions[: len(erased)] @ directions[len(erased) :].T
    order = likeness.argsort(dim=1, descending=True)[:, : neighbours.count]
    return [words[i] for i in dict.fromkeys(order.T.flatten().tolist())]
