"""What a stack is fused by: its members in an order of their own, each with its prompts, and the prompts to keep."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import Strength, stack, strengths_of
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.errors import EsdLoraError
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
    base.require_whole("fusing")
    strengths = strengths_of(erasers, weights)
    base.check(stack(erasers, strengths))
    present = [stack([e], [s]) for e, s in zip(erasers, strengths, strict=True) if s.weight]
    if not present:
        raise EsdLoraError("every member has weight 0: there is nothing to fuse.")
    hashed = sorted(((hash_tensors(member.state_dict()), member) for member in present), key=lambda pair: pair[0])
    members = [member for _, member in hashed]
    kept, dropped = keep_list(members, base.keep if keep is None else keep)
    if not kept:
        raise EsdLoraError(f"no prompt to keep is left: all {len(dropped)} name an erased concept. Give others.")
    _warn_of_anchors(members)
    prompts = [own_prompts(member, kept, dropped) for member in members]
    return Members(members, [digest for digest, _ in hashed], prompts, kept, dropped)


def _warn_of_anchors(members: Sequence[Eraser]) -> None:
    """Say where a member puts what another one erases: in a stack neither is gone."""
    concepts = [(i, concept) for i, member in enumerate(members) for concept in member.header.concepts]
    shown: dict[tuple[str, str], None] = {}
    for i, concept in concepts:
        anchors = "\n".join({anchor for _, anchor in concept.pairs})
        for j, other in concepts:
            if i != j and other.named_in(anchors):
                placed = (other.named_in(anchor) and not other.named_in(prompt) for prompt, anchor in concept.pairs)
                if any(placed):
                    shown[concept.name, other.name] = None
    for name, other in shown:
        warnings.warn(
            f"where {name!r} is erased, {other!r} appears, which another member erases. Train {name!r} once more with"
            f" --avoid {other!r}, or with an --anchor of its own.",
            stacklevel=4,
        )


def keep_list(members: Sequence[Eraser], prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the prompts to keep, and those left out, because they name a member's concept or are erased by one.

    Args:
        members: Members of the stack; what they preserved in training is kept too.
        prompts: Prompts to keep.
    """
    concepts = [concept for member in members for concept in member.header.concepts]
    erased = {prompt for concept in concepts for prompt, _ in concept.pairs}
    listed = sorted({*prompts, *(prompt for member in members for prompt in member.header.preserve)})
    dropped = [p for p in listed if p in erased or any(concept.named_in(p) for concept in concepts)]
    return [p for p in listed if p not in set(dropped)], dropped


def own_prompts(member: Eraser, kept: Sequence[str], dropped: Sequence[str]) -> list[str]:
    """Return a member's prompts: those it was trained on, and others that call for the same.

    These are the prompts left out of the keep list that name its concepts, and its own in the place that another prompt has
    within a longer one of the list: beside "a dog" and "a dog in a park", "a cat" stands in a park too.

    Args:
        member: The eraser; the names of its concepts stand for prompts it does not know.
        kept: From `keep_list`.
        dropped: From `keep_list`.
    """
    concepts = member.header.concepts
    trained = [prompt for concept in concepts for prompt, _ in concept.pairs] or member.names
    mentioning = [p for p in dropped if any(concept.named_in(p) for concept in concepts)]
    prompts = dict.fromkeys([*trained, *mentioning])
    if len(trained) <= len(frames := frames_of([*kept, *dropped])):
        prompts |= dict.fromkeys(frame.replace("{}", trained[i % len(trained)]) for i, frame in enumerate(frames))
    return list(prompts)
