"""What is taught: the lessons of a recipe, erased prompts and preserved ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.built_in import read_prompts
from esd_lora.errors import EsdLoraError
from esd_lora.recipe import Concept, Neighbours, Recipe
from esd_lora.seeds import Stream, stream_generator


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
    turns: int = 1
    """How often its trajectory is walked while every other preserved prompt has one turn."""

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


def share_turns(lessons: Sequence[Lesson], walks: int, base: Base, seed: int) -> list[Lesson]:
    """Return the lessons that a training walks, those of preserved prompts with their turns.

    What erasing hurts first is near the concept, so the nearest quarter takes two turns where every prompt can have one. Where
    walks do not suffice for that, half of them go to the nearest prompts and half to others at random; the rest is left out.

    Args:
        lessons: From `plan`.
        walks: Number of trajectories that the training walks for preserved prompts, in all.
        base: Whose text encoder says what is near.
        seed: Of the choice.
    """
    erased = [lesson for lesson in lessons if not lesson.preserves]
    preserved = [lesson for lesson in lessons if lesson.preserves]
    if not preserved or not walks:
        return erased
    likeness = likeness_to([lesson.concept for lesson in erased], [lesson.prompt for lesson in preserved], base)
    ranked = likeness.max(0).values.argsort(descending=True).tolist()
    near = len(ranked) // 4
    if walks >= len(ranked) + near:
        twice = set(ranked[:near])
        return erased + [lesson._replace(turns=1 + (i in twice)) for i, lesson in enumerate(preserved)]
    order = torch.randperm(len(ranked), generator=stream_generator(seed, Stream.CHOICE)).tolist()
    chosen = set(list(dict.fromkeys([*ranked[: walks // 2], *order]))[:walks])
    return erased + [lesson for i, lesson in enumerate(preserved) if i in chosen]


def likeness_to(erased: Sequence[str], prompts: Sequence[str], base: Base) -> Tensor:
    """Return the cosines between `Base.directions` of erased prompts and of others, [erased, prompts]."""
    directions = base.directions([*erased, *prompts])
    return directions[: len(erased)] @ directions[len(erased) :].T


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
    order = likeness_to(erased, words, base).argsort(dim=1, descending=True)[:, : neighbours.count]
    return [words[i] for i in dict.fromkeys(order.T.flatten().tolist())]
