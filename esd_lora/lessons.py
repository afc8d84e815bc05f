"""What is taught: the lessons of a recipe, erased prompts and preserved ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.built_in import read_prompts
from esd_lora.errors import EsdLoraError
from esd_lora.recipe import AUTO, Recipe
from esd_lora.seeds import Stream, stream_generator
from esd_lora.text_rows import influence, rows_of
from esd_lora.trajectory import Encode
from esd_lora.wording import frames_of, mentions

Item = TypeVar("Item")
_COMPARED_AT_ONCE = 64  # prompts
FRAMES_FILE = Path(__file__).parent / "prompts" / "frames.txt"
"""Frames that suit a picture of anything."""


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

    @property
    def replaces(self) -> bool:
        """Whether something of its own appears instead, and not just what the prompt says without the concept."""
        return bool(set(self.anchor.split()) - set(self.prompt.split()))


def plan(recipe: Recipe, keep: Sequence[str] = (), near: Sequence[str] = ()) -> list[Lesson]:
    """Return the lessons of a recipe, erased prompts first.

    Args:
        recipe: Its pools and its `preserve` list.
        keep: The base's keep list, used by `preserve: default`; prompts that name a concept are dropped from it.
        near: Further prompts to preserve, from `find_neighbours`.

    Raises:
        EsdLoraError: If there is nothing to erase, or the user's own preserve list names a concept that is to be erased.
    """
    listed = listed_prompts(recipe, keep)
    eta = first_eta(recipe) if recipe.eta == AUTO else recipe.eta
    lessons = [Lesson(*texts, eta) for pool in pools(recipe, keep) for texts in pool]
    if all(lesson.preserves for lesson in lessons):
        raise EsdLoraError("nothing to erase: with eta 0, every prompt is its own anchor. Raise eta or give another anchor.")
    erased = {lesson.prompt for lesson in lessons}
    clashes = {prompt: concept.name for concept in recipe.concepts for prompt in listed if concept.named_in(prompt)}
    clashes |= {prompt: prompt for prompt in listed if prompt in erased}
    for prompt in recipe.guarded:
        if name := next((c.name for c in recipe.concepts if c.named_in(prompt)), prompt if prompt in erased else None):
            raise EsdLoraError(f"guard holds {prompt!r}, which names {name!r}, a concept to erase. Take it out.")
    if clashes and recipe.preserve != "default":
        prompt, name = next(iter(clashes.items()))
        raise EsdLoraError(f"preserve holds {prompt!r}, which names {name!r}, a concept to erase. Take it out.")
    preserved = [*recipe.guarded, *(prompt for prompt in listed if prompt not in clashes)]
    preserved += [prompt for prompt in near if prompt not in erased and not mentions(prompt, recipe.avoid)]
    return lessons + [Lesson(prompt, prompt, prompt, 0.0) for prompt in dict.fromkeys(preserved)]


def listed_prompts(recipe: Recipe, keep: Sequence[str]) -> list[str]:
    """Return the prompts of a recipe's preserve list, or of the base's, that name nothing which other erasers erase."""
    listed = keep if recipe.preserve == "default" else recipe.preserve
    return [prompt for prompt in listed if not mentions(prompt, recipe.avoid)]


def first_eta(recipe: Recipe) -> float:
    """Return the eta with which a training begins that measures its own: 0 where something else replaces the concept, or 1.

    What a prompt says without the concept may still be drawn with it, so it takes a push to leave it: the paper's. Something
    else is a place to arrive at; pushed beyond it, a dog that stands for a cat is no dog any more.
    """
    lessons = [Lesson(*texts, 0.0) for concept in recipe.concepts for texts in concept.lessons()]
    return 0.0 if all(lesson.replaces for lesson in lessons) else 1.0


def pools(recipe: Recipe, keep: Sequence[str] = ()) -> list[list[tuple[str, str, str]]]:
    """Return what is erased of each concept, as `Concept.lessons` does, and in the recipe's frames where that is one prompt.

    What stands for pictures is put into frames as well, but for captions, which are whole prompts.

    Args:
        recipe: Its concepts and frames.
        keep: The base's keep list, used by `preserve: default`.
    """
    listed = listed_prompts(recipe, keep)
    frames = frames_for(recipe, listed)[0] if recipe.frames else []
    erased: list[list[tuple[str, str, str]]] = []
    for concept in recipe.concepts:
        pool = framed = concept.lessons()
        if len(pool) > 1:
            framed = [texts for texts in pool if concept.images and len(texts[1].split()) <= _SHORT]
        erased.append([*pool, *(in_frame(frame, texts) for texts in framed for frame in frames)])
    return erased


def in_frame(frame: str, texts: tuple[str, str, str]) -> tuple[str, str, str]:
    """Return prompt, concept and anchor in a frame; nothing stays nothing."""
    prompt, concept, anchor = (frame.replace("{}", text) if text else "" for text in texts)
    return prompt, concept, anchor


def frames_for(recipe: Recipe, listed: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the frames to erase a concept in, and others to probe it in, each with `{}` in its place.

    With `frames: auto` these are what stands around at least two of the listed prompts, and some that suit any picture; every
    fourth is for the probe. Frames that a recipe names are all trained on, and probed by those that suit any picture.

    Args:
        recipe: Its `frames`.
        listed: Prompts to preserve.
    """
    anywhere = list(read_prompts(FRAMES_FILE))
    if recipe.frames != AUTO:
        return list(recipe.frames), [frame for frame in anywhere if frame not in recipe.frames]
    around = [frame for frame, count in frames_of(listed).items() if count > 1]
    # In turn, so that both parts hold frames of both kinds.
    return (
        [frame for frames in (around, anywhere) for i, frame in enumerate(frames) if i % 4 != 3],
        [frame for frames in (around, anywhere) for i, frame in enumerate(frames) if i % 4 == 3],
    )


class HeldOut(NamedTuple):
    """Prompts that no step trains on, for a probe."""

    erased: list[tuple[str, str, str]]
    """Prompts from which the concept should be gone, each with the prompt of the concept, and of what should appear instead."""
    kept: list[str]
    """Prompts that should draw what they drew."""
    concepts: Sequence[str] = ()
    """Concepts that are given by their names alone."""

    def prompts(self) -> list[str]:
        """Return all of them, anchors and concepts too."""
        return [*(text for texts in self.erased for text in texts), *self.kept, *self.concepts]


_HELD_OUT = 8
"""Number of held-out prompts of either kind, at most."""
_SHORT = 3
"""Words of a preserved prompt that can stand in a frame."""


def hold_out(recipe: Recipe, lessons: Sequence[Lesson], keep: Sequence[str], encode: Encode) -> HeldOut:
    """Return prompts of the concepts, and of what erasing reaches and what is far from it, that are in no lesson.

    Args:
        recipe: Its concepts and frames.
        lessons: What is trained on.
        keep: The base's keep list, used by `preserve: default`.
        encode: From prompts to their condition.
    """
    listed = listed_prompts(recipe, keep)
    trained = {text for lesson in lessons for text in lesson[:3]}
    frames = frames_for(recipe, listed)[1]
    short = [prompt for prompt in listed if len(prompt.split()) <= _SHORT]
    erased: list[tuple[str, str, str]] = []
    for concept in recipe.concepts:
        pool = concept.lessons()
        if concept.fill:
            # What fills the templates is listed, and some of it fills none.
            other = [text for text in short if text not in concept.fill and not concept.named_in(text)]
            erased += concept.model_copy(update={"fill": tuple(other[:: max(1, len(other) // _HELD_OUT)])}).lessons()
        else:
            erased += [in_frame(frame, pool[i % len(pool)]) for i, frame in enumerate(frames)]
    fresh = list(dict.fromkeys(texts for texts in erased if texts[0] not in trained)) or [
        (lesson.prompt, lesson.concept, lesson.anchor) for lesson in lessons if not lesson.preserves
    ]
    kept = [prompt for prompt in short if not any(concept.named_in(prompt) for concept in recipe.concepts)]
    if kept:
        pairs = (lesson[1:3] for lesson in lessons if not lesson.preserves)
        ranked = [kept[i] for i in by_influence(pairs, kept, encode)]
        half = _HELD_OUT // 2
        kept = list(dict.fromkeys([*ranked[:half], *ranked[half :: max(1, len(ranked) // half)]]))[:_HELD_OUT]
    probed = [frames[i % len(frames)].replace("{}", prompt) for i, prompt in enumerate(kept)]
    named = [concept.name for concept in recipe.concepts if not concept.prompts]
    return HeldOut(take_turns(fresh, min(len(fresh), _HELD_OUT)), [p for p in probed if p not in trained], named)


def take_turns(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` items, each in its turn; evenly spaced ones where there are more than that."""
    return [items[i * max(count, len(items)) // count % len(items)] for i in range(count)]


def share_turns(lessons: Sequence[Lesson], walks: int, encode: Encode, seed: int) -> list[Lesson]:
    """Return the lessons that a training walks, those of preserved prompts with their turns.

    What erasing reaches furthest is hurt first, so that quarter takes two turns where every prompt can have one. Where walks do
    not suffice for that, half of them go to what it reaches furthest and half to others at random; the rest is left out.

    Args:
        lessons: From `plan`.
        walks: Number of trajectories that the training walks for preserved prompts, in all.
        encode: From prompts to their condition.
        seed: Of the choice.
    """
    erased = [lesson for lesson in lessons if not lesson.preserves]
    preserved = [lesson for lesson in lessons if lesson.preserves]
    if not preserved or not walks:
        return erased
    ranked = by_influence((lesson[1:3] for lesson in erased), [lesson.prompt for lesson in preserved], encode)
    near = len(ranked) // 4
    if walks >= len(ranked) + near:
        twice = set(ranked[:near])
        return erased + [lesson._replace(turns=1 + (i in twice)) for i, lesson in enumerate(preserved)]
    order = torch.randperm(len(ranked), generator=stream_generator(seed, Stream.CHOICE)).tolist()
    chosen = set(list(dict.fromkeys([*ranked[: walks // 2], *order]))[:walks])
    return erased + [lesson for i, lesson in enumerate(preserved) if i in chosen]


def by_influence(pairs: Iterable[tuple[str, str]], prompts: Sequence[str], encode: Encode) -> list[int]:
    """Return the order of prompts by how far erasing would move them, furthest first.

    Args:
        pairs: What is erased, each with its anchor.
        prompts: To bring into an order.
        encode: From prompts to their condition.
    """
    return influence(rows_of(encode, "prompt_embeds"), list(dict.fromkeys(pairs)), prompts).argsort(descending=True).tolist()


def likeness_to(erased: Sequence[str], prompts: Sequence[str], base: Base, encode: Encode | None = None) -> Tensor:
    """Return the cosines between `Base.directions` of erased prompts and of others, [erased, prompts]."""
    directions = base.directions(erased, encode)
    # In parts: encoded by T5, a prompt takes megabytes.
    parts = [prompts[i : i + _COMPARED_AT_ONCE] for i in range(0, len(prompts), _COMPARED_AT_ONCE)]
    return torch.cat([directions @ base.directions(part, encode).T for part in parts], 1)


def find_neighbours(recipe: Recipe, keep: Sequence[str], encode: Encode) -> list[str]:
    """Return the prompts of a recipe's vocabulary that erasing its concepts would move furthest: what it hurts first.

    Prompts that name a concept are no neighbours of it.

    Args:
        recipe: Its `neighbours` and concepts.
        keep: The base's keep list, used by `preserve: default`.
        encode: From prompts to their condition.

    Raises:
        EsdLoraError: If the vocabulary's file cannot be read, or holds nothing else.
    """
    if not recipe.neighbours:
        return []
    words = recipe.neighbours.vocabulary
    if isinstance(words, str):
        words = read_prompts(words)
    words = [word for word in dict.fromkeys(words) if not any(concept.named_in(word) for concept in recipe.concepts)]
    if not words:
        raise EsdLoraError("neighbours: the vocabulary holds no prompt that names no erased concept. Give a longer one.")
    chosen: dict[str, None] = {}
    for pool in pools(recipe, keep):
        order = by_influence((texts[1:] for texts in pool), words, encode)
        chosen |= dict.fromkeys(words[i] for i in order[: recipe.neighbours.count])
    return list(chosen)
