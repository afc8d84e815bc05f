"""The closed form: what a layer that reads text should do differently, solved instead of trained.

Let a layer with weights W read rows of text: `c` of an erased prompt, `a` of its anchor at the same place, `r` of what is
kept. It should make of c what it makes of a, and of r what it made before. The update that minimises

    mean |dW c - W (a - c)|^2  +  keep mean |dW r|^2  +  ridge s |dW|^2,        s = mean square of a kept value,

is

    dW = W D,    D = E[(a - c) c^T] (E[c c^T] + keep E[r r^T] + ridge s I)^-1

as UCE has it (Gandikota et al., WACV 2024, arXiv:2308.14761), there with one row a prompt. D knows nothing of W: it is one
linear change of the text, the same for all layers, and of low rank, for a concept's rows differ from its anchor's in few
directions. Where every row became the anchor's, the model would draw the anchor's picture, whatever the layers make of it.

An anchor that is what the prompt says without the concept ("a cat" for "a cat in ink style") may still be drawn with it, so
there the row to arrive at lies beyond: a + push (a - c).

Kept, with a weight of its own, are also prompts of the list with a pseudo-word in the place of what they are about: they stand
for all that no list names (`pseudo_words`).

Erased and kept rows are those of whole prompts, padding too, for attention reads it all, and of the concept in many frames:
what a text encoder makes of a word depends on what stands before it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import LoraPair
from esd_lora.erasers.header import Solved
from esd_lora.guarding import Guard
from esd_lora.lessons import Lesson, by_influence, frames_for, in_frame, likeness_to, listed_prompts, pools
from esd_lora.progress import advance, stage
from esd_lora.pseudo_words import PseudoWords
from esd_lora.recipe import ClosedFormSpec, Recipe
from esd_lora.text_rows import TEXT_TENSORS, Rows, TextMoments, moved_by, rows_of, second_moment, way_moments
from esd_lora.trajectory import Condition, Encode, in_float64, pick
from esd_lora.wording import mentions

_CANDIDATES = 12  # of an anchor, the nearest
_LONGEST_ANCHOR = 3  # words
_SPARE = 4  # times the rank of a layer are looked at, for weights see directions of the text differently
_PLAIN = 4  # times as much counts a prompt with nothing around it, which little holds in place
_PSEUDO = 64  # texts with a pseudo-word
_NAMED = 8  # kept prompts that are named because they move most


def solve_text(
    base: Base,
    encode: Encode,
    lessons: Sequence[Lesson],
    layers: Mapping[str, int],
    spec: ClosedFormSpec,
    guard: Guard | None = None,
    unlisted: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, LoraPair], Solved | None]:
    """Return the updates of layers that read text, and how far they get.

    Args:
        base: Whose weights are read.
        encode: From prompts to their condition; all of the lessons' texts are asked for, and what `kept_texts` adds.
        lessons: From `lessons.plan`. Those whose student reads another prompt than the erased one have no closed form.
        layers: Path of every layer that may change to the rank it may have; those that read no text are left out.
        spec: Weights of what is kept and of the ridge.
        guard: Has the texts that no update may touch.
        unlisted: From `unlisted_moments`, of what is in no list.
    """
    kept = kept_texts(lessons)
    updates: dict[str, LoraPair] = {}
    solved: Solved | None = None
    for name in TEXT_TENSORS:
        readers = {path: rank for path, rank in layers.items() if base.family.text_read_by(path) == name}
        if not readers or not replaced(lessons):
            continue
        rows = rows_of(encode, name, base)
        moments = moments_of(rows, lessons, spec)
        if unlisted:
            moments = moments._replace(kept=moments.kept + spec.unlisted * unlisted[name])
        free = guard.free(name) if guard else None
        change, root = moments.solve(spec, free)
        u, size, v = torch.linalg.svd(change @ root, full_matrices=False)
        most = _SPARE * max(readers.values())
        narrow, wide = u[:, :most] * size[:most], v[:most]  # change @ root, as far as any layer could use it
        down = torch.linalg.solve_triangular(root, wide, upper=False, left=False)
        if free is not None:
            change, down = change @ free.T, down @ free.T
        with stage("solving the layers that read text", len(readers), "layer"):
            for path, weight in base.weights(readers):
                up, strength, turn = torch.linalg.svd(in_float64(weight.detach().cpu()) @ narrow, full_matrices=False)
                rank = min(readers[path], len(strength))
                spread = strength[:rank].sqrt()
                updates[path] = LoraPair((spread[:, None] * (turn[:rank] @ down)).float(), (up[:, :rank] * spread).float())
                advance()
        if solved is None:  # what the pooled text does is much the same
            moved = moved_by(rows, change, kept)
            solved = Solved(
                left=moments.left(change),
                moved=moments.moved(change),
                anchors=tuple(dict.fromkeys(lesson.anchor for lesson in replaced(lessons))),
                kept=len(kept),
                most_moved=tuple((kept[i], float(moved[i])) for i in moved.argsort(descending=True)[:_NAMED].tolist()),
            )
    return updates, solved


def replaced(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Return the lessons that have a closed form: the student reads the erased prompt itself, and should draw another."""
    return [lesson for lesson in lessons if lesson.prompt == lesson.concept != lesson.anchor]


def moments_of(rows: Rows, lessons: Sequence[Lesson], spec: ClosedFormSpec) -> TextMoments:
    """Return the moments of lessons, `kept_texts` beside the erased ones; those with nothing around them weigh more.

    Args:
        rows: From N prompts to their rows.
        lessons: From `lessons.plan`.
        spec: How far to go beyond an anchor.
    """
    kept = kept_texts(lessons)
    second = second_moment(rows, [*kept, *plain_prompts(kept) * (_PLAIN - 1)])
    beyond = [0.0 if lesson.replaces else min(spec.push, lesson.eta) for lesson in replaced(lessons)]
    return way_moments(rows, [lesson[1:3] for lesson in replaced(lessons)], second, beyond)


def unlisted_moments(base: Base, kept: Sequence[str]) -> dict[str, Tensor]:
    """Return `E[r r^T]` of each tensor of text over kept texts about something that nobody listed, [width, width].

    Args:
        base: Whose text encoders are still there.
        kept: From `kept_texts`; some of them get a pseudo-word.
    """
    chosen = list(dict.fromkeys(kept[i * len(kept) // _PSEUDO] for i in range(_PSEUDO)))
    if not (chosen := [text for text in chosen if text]):  # the empty one has no word to replace
        return {}
    condition = PseudoWords(base, chosen).encode(chosen, torch.Generator().manual_seed(0))

    def encode(texts: Sequence[str]) -> Condition:
        return pick(condition, torch.tensor([chosen.index(text) for text in texts]))

    return {name: second_moment(rows_of(encode, name, base), chosen) for name in TEXT_TENSORS if name in condition}


def kept_texts(lessons: Sequence[Lesson]) -> list[str]:
    """Return the texts that the closed form leaves alone: preserved prompts, anchors, the empty one."""
    preserved = [lesson.prompt for lesson in lessons if lesson.preserves]
    anchors = [lesson.anchor for lesson in lessons if not lesson.preserves]
    return list(dict.fromkeys([*preserved, *anchors, ""]))


class TriedAnchor(NamedTuple):
    """A kept prompt that could take a concept's place, as the closed form finds it."""

    anchor: str
    score: float
    """What it costs and leaves: the lower the better."""
    distance: float
    """How far the concept's text is from it."""
    left: float
    """Share of that way which is left, from 0 to 1."""
    moved: float
    """How far kept text moves, in units of its size."""


def choose_anchors(recipe: Recipe, base: Base, encode: Encode) -> dict[str, str]:
    """Return the anchor of every concept that has none, the best that `try_anchors` finds, by the concept's name.

    Where no kept prompt could be one, there is none: the anchor is the empty prompt.
    """
    return {name: tried[0].anchor for name, tried in try_anchors(recipe, base, encode).items()}


def try_anchors(recipe: Recipe, base: Base, encode: Encode) -> dict[str, list[TriedAnchor]]:
    """Return the kept prompts that could take the place of every concept without an anchor, by its name, the best first.

    Of the prompts near the concept it is the one for which the closed form leaves least to do and moves least of what is kept:
    the smallest product of `TextMoments.moved`, the size of D, which stands for all that no list names, and the root of `left`,
    for getting there matters less than what it costs. Something far away moves much; what lies at less than half of the usual
    distance from the concept is taken for another word for it.

    Args:
        recipe: Its concepts, frames and preserve list; without a list that of the base is looked through.
        base: Has the default keep list, and a text encoder that says what is near.
        encode: From prompts to their condition.

    Returns:
        Nothing for a concept that has an anchor, or that no kept prompt could stand for.
    """
    listed = _known_prompts(recipe, base.keep)
    candidates = plain_prompts(listed)
    unanchored = [concept for concept in recipe.concepts if concept.unanchored]
    if not candidates or not unanchored:
        return {}
    frames = ["{}", *frames_for(recipe, listed)[0]]
    rows = rows_of(encode, "prompt_embeds", base)
    kept = second_moment(rows, listed)
    spec = recipe.closed_form or ClosedFormSpec(keep=1.0, push=0.0, ridge=1e-3)
    ranked: dict[str, list[TriedAnchor]] = {}
    for concept in unanchored:
        prompt = concept.pairs()[0][0]
        near = likeness_to([prompt], candidates, base, encode)[0].argsort(descending=True)[:_CANDIDATES].tolist()

        tried: list[TriedAnchor] = []
        with stage("choosing what appears instead", len(near), "candidate"):
            for anchor in [candidates[i] for i in near]:
                moments = way_moments(rows, [in_frame(frame, (prompt, anchor, ""))[:2] for frame in frames], kept)
                change = moments.solve(spec)[0]
                left, moved = moments.left(change), moments.moved(change)
                score = moved * float(change.norm()) * math.sqrt(left)
                tried.append(TriedAnchor(anchor, score, math.sqrt(moments.distance), left, moved))
                advance()
        usual = median(each.distance for each in tried)
        far = [each for each in tried if each.distance >= usual / 2]
        ranked[concept.name] = sorted(far, key=lambda each: (each.score, each.distance, each.anchor))
    return ranked


def choose_guarded(recipe: Recipe, count: int, keep: Sequence[str], encode: Encode) -> tuple[str, ...]:
    """Return the kept prompts that a recipe guards if it names none: those that erasing would move furthest.

    Args:
        recipe: Its concepts, with their anchors, frames and preserve list; without a list that of the base is looked through.
        count: Number of prompts.
        keep: The base's keep list.
        encode: From prompts to their condition.
    """
    candidates = plain_prompts(_known_prompts(recipe, keep))
    pairs = (texts[1:] for pool in pools(recipe, keep) for texts in pool)
    return tuple(candidates[i] for i in by_influence(pairs, candidates, encode)[:count])


def _known_prompts(recipe: Recipe, keep: Sequence[str]) -> list[str]:
    """Return the prompts of a recipe's preserve list, or else of the base's, that name no concept of its own."""
    listed = listed_prompts(recipe if recipe.preserve else recipe.model_copy(update={"preserve": "default"}), keep)
    return [text for text in listed if not any(concept.named_in(text) for concept in recipe.concepts)]


def plain_prompts(prompts: Collection[str]) -> list[str]:
    """Return the prompts of a list that say one thing: of up to three words, and with none of the others inside."""
    short = [prompt for prompt in prompts if 0 < len(prompt.split()) <= _LONGEST_ANCHOR]
    return [prompt for prompt in short if not any(other != prompt and mentions(prompt, [other]) for other in short)]
