"""What a stack is fused by: its members in an order of their own, each with its prompts, and the prompts to keep."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import IDENTITY, Strength, check_members, outline, stack, strengths_of
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.progress import stage
from esd_lora.wording import frames_of


class Members(NamedTuple):
    """The members of a stack, and the prompts that it is fused by."""

    erasers: list[Eraser]
    """The members with their strengths folded in, those of strength 0 left out, sorted by hash: so a result is the same bit for
    bit in whatever order they are given."""
    hashes: list[str]
    """SHA-256 of every member's tensors."""
    prompts: list[list[str]]
    """Every member's own prompts (`own_prompts`)."""
    kept: list[str]
    """Prompts to keep (`keep_list`)."""
    dropped: list[str]
    """Prompts that are not kept, because they name what is erased."""
    listed: tuple[str, ...]
    """The list of prompts to keep as it was given, what members preserved not in it."""

    def keys(self) -> list[str]:
        """Return a name for every member: its hash, with a number where several are the same."""
        seen: dict[str, int] = {}
        keys: list[str] = []
        for digest in self.hashes:
            number = seen[digest] = seen.get(digest, -1) + 1
            keys.append(f"{digest}-{number}" if number else digest)
        return keys

    def record(self) -> dict[str, Any]:
        """Return what a header says of them."""
        digest = hashlib.sha256("\n".join(self.kept).encode()).hexdigest()
        return {"members": tuple(self.hashes), "kept": len(self.kept), "kept_sha256": digest, "dropped": tuple(self.dropped)}


def gather_members(
    erasers: Sequence[Eraser], base: Base, weights: Sequence[float | Strength] | None, keep: Sequence[str] | None
) -> Members:
    """Collect what a stack is fused by.

    Args:
        erasers: The members, trained on one base.
        base: The loaded base they were trained on.
        weights: Strength of each, 1 by default.
        keep: Prompts to leave alone; the base's keep list or the package's broad one unless given.

    Raises:
        EsdLoraError: If the base is quantized, the erasers do not fit each other or the base, every weight is 0, or no prompt
            to keep is left.
    """
    with stage("finding the members' prompts"):
        return arrange_members(hashed_members(erasers, weights), base, base.keep if keep is None else keep)


def hashed_members(erasers: Sequence[Eraser], weights: Sequence[float | Strength] | None) -> list[tuple[str, Eraser]]:
    """Return the SHA-256 of every member with the member, its strength folded in.

    Args:
        erasers: The members.
        weights: Strength of each, 1 by default; at 0 it is left out.

    Raises:
        EsdLoraError: If the number of weights differs, or a strength names a part in which its eraser has no layer.
    """
    strengths = strengths_of(erasers, weights)
    check_members(erasers, strengths)
    present = [
        eraser if strength == IDENTITY else stack([eraser], [strength])
        for eraser, strength in zip(erasers, strengths, strict=True)
        if strength.weight
    ]
    return [(hash_tensors(member.state_dict()), member) for member in present]


def arrange_members(hashed: Iterable[tuple[str, Eraser]], base: Base, keep: Sequence[str]) -> Members:
    """Put members into their order, and find every one's prompts and those to keep, once they are seen to fit the base.

    Args:
        hashed: From `hashed_members`.
        base: The loaded base they were trained on.
        keep: Prompts to leave alone.

    Raises:
        EsdLoraError: As `gather_members` does.
    """
    base.require_whole("fusing")
    members = members_of(hashed, keep)
    if not members.erasers:
        raise EsdLoraError("every member has weight 0: there is nothing to fuse.")
    if changing := [eraser for eraser in members.erasers if eraser.changes_text]:
        raise EsdLoraError(
            f"eraser of {changing[0].names} changes the text encoder, and stacks are fused by what layers of the denoiser read:"
            " add it up with the others instead (esd-lora stack --fuse sum)."
        )
    base.check(outline(members.erasers))
    base.know_words_of(members.erasers)
    if not members.kept:
        raise EsdLoraError(f"no prompt to keep is left: all {len(members.dropped)} name an erased concept. Give others.")
    _warn_of_anchors(members.erasers)
    return members


def members_of(hashed: Iterable[tuple[str, Eraser]], keep: Sequence[str]) -> Members:
    """Put members into their order, and find prompts, without a look at whether they fit."""
    ordered = sorted(hashed, key=lambda pair: pair[0])
    members = [member for _, member in ordered]
    kept, dropped = keep_list(members, keep)
    prompts = [own_prompts(member, kept, dropped) for member in members]
    return Members(members, [digest for digest, _ in ordered], prompts, kept, dropped, tuple(keep))


def _warn_of_anchors(members: Sequence[Eraser]) -> None:
    """Say where a member puts what another one erases: in a stack neither is gone."""
    concepts = [(i, concept) for i, member in enumerate(members) for concept in member.header.concepts]
    anchors = "\n".join({anchor for _, concept in concepts for _, anchor in concept.pairs})
    shown: dict[tuple[str, str], None] = {}
    for j, other in concepts:
        for i, concept in concepts if other.named_in(anchors) else ():
            if i != j and any(other.named_in(anchor) and not other.named_in(prompt) for prompt, anchor in concept.pairs):
                shown[concept.name, other.name] = None
    for name, other in shown:
        warnings.warn(
            f"where {name!r} is erased, {other!r} appears, which another member erases. Train {name!r} once more with"
            f" --avoid {other!r}, or with an --anchor of its own.",
            stacklevel=5,
        )


def keep_list(members: Sequence[Eraser], prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the prompts to keep, and those left out, because they name a member's concept or are erased by one.

    Args:
        members: Members of the stack; what they preserved in training is kept too.
        prompts: Prompts to keep.
    """
    concepts = [concept for member in members for concept in member.header.concepts]
    listed = sorted({*prompts, *(prompt for member in members for prompt in member.header.preserve)})
    dropped = {prompt for concept in concepts for prompt, _ in concept.pairs} & {*listed}
    for concept in concepts:
        dropped |= {*concept.named_among(listed)}
    return [p for p in listed if p not in dropped], [p for p in listed if p in dropped]


def choose_walked(kept: Sequence[str], most: int) -> set[str]:
    """Return the kept prompts on whose trajectories layers are fused: those of the lowest SHA-256, as good as drawn at random.

    So a prompt that joins the list or leaves it changes the choice by one.

    Args:
        kept: From `keep_list`.
        most: Highest number of them.
    """
    return {*sorted(kept, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[:most]}


def own_prompts(member: Eraser, kept: Sequence[str], dropped: Sequence[str]) -> list[str]:
    """Return a member's prompts: those it was trained on, and others that call for the same.

    These are the prompts left out of the keep list that name its concepts, and its own in the place that another prompt has
    within a longer one of the list: beside "a dog" and "a dog in a park", "a cat" stands in a park too. What other members
    erase has no part in it: it does not matter whom `kept` and `dropped` were parted by.

    Args:
        member: The eraser; the names of its concepts stand for prompts it does not know.
        kept: From `keep_list`.
        dropped: From `keep_list`.
    """
    concepts = member.header.concepts
    trained = [prompt for concept in concepts for prompt, _ in concept.pairs] or member.names
    mentioning = {prompt for concept in concepts for prompt in concept.named_among(dropped)}
    prompts = dict.fromkeys([*trained, *(prompt for prompt in dropped if prompt in mentioning)])
    if len(trained) <= len(frames := _frames(tuple(sorted([*kept, *dropped])))):
        prompts |= dict.fromkeys(frame.replace("{}", trained[i % len(trained)]) for i, frame in enumerate(frames))
    return list(prompts)


@lru_cache(maxsize=4)
def _frames(listed: tuple[str, ...]) -> tuple[str, ...]:
    """Return the frames of a list: of a thousand members' it is the same."""
    return tuple(frames_of(listed))
