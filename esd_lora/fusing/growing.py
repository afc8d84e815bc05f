"""Growing and shrinking a fused stack by its state: one member's readings and one solve, however many members there are.

The stack is the one that fusing all its members anew would give, and one without a member is the stack that never had it: what
is read depends on the prompts alone, and the sums are taken in float64, so that nothing is left of what is taken off.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import Strength, check_cut
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.fusing.closed_form import fuse_members
from esd_lora.fusing.prompts import arrange_members, hashed_members
from esd_lora.fusing.states import FusionState
from esd_lora.wording import without_article

_SHORTEST_ID = 6  # digits of a hash that name a member


def change_members(
    stack: str | Path,
    base: Base,
    *,
    add: Sequence[Eraser] = (),
    weights: Sequence[float | Strength] | None = None,
    remove: Sequence[str] = (),
    rank: int | None = None,
    energy: float | None = None,
    state: str | Path | None = None,
    progress: bool = True,
) -> Eraser:
    """Return a fused stack with other members: what `fuse` makes of those that stay and those that join.

    Files of the members that it has are not needed.

    Args:
        stack: Directory of a stack that was fused with a `state`, or that file.
        base: The loaded base that the stack was fused on.
        add: The new members.
        weights: Strength of each new member, 1 by default.
        remove: Of each member that is to go a concept's name, or the first digits of its hash, 6 or more.
        rank: Highest rank of a layer; the stack's own, and its `energy`, unless one of them is given.
        energy: Share of every layer's effect to keep.
        state: File to keep the new state in; none unless given.
        progress: Whether to show progress bars.

    Raises:
        EsdLoraError: If a name fits no member or several, no member is left, there is no state, the base is another or held in
            other numbers, or as `fuse` does.
    """
    started, known = time.monotonic(), FusionState.load(stack)
    hashed = known.hashed()
    for name in remove:
        hashed.pop(_place(name, hashed))
    hashed += hashed_members(add, weights) if add or weights else []
    if not hashed:
        raise EsdLoraError("every member would be removed, and nothing be left of the stack. Use the base itself.")
    if rank is None and energy is None:
        rank, energy = known.record.rank, known.record.energy
    check_cut(rank, energy)
    if base.held_in != known.record.held_in:
        raise EsdLoraError(
            f"base {base.id!r} is loaded in {base.held_in}, and the stack was fused on one in {known.record.held_in}: sums of"
            f" both are no stack's. Load it so (--dtype {known.record.held_in})."
        )
    members = arrange_members(hashed, base, known.record.listed)
    return fuse_members(members, base, known.spec, rank, energy, known=known, state=state, started=started, progress=progress)


def _place(name: str, hashed: Sequence[tuple[str, Eraser]]) -> int:
    """Return the place of the member that a name fits; of several copies of one, that of the last."""
    word = without_article(name).casefold()
    by_name = {digest for digest, e in hashed if word in {without_article(concept).casefold() for concept in e.names}}
    by_hash = {digest for digest, _ in hashed if len(name) >= _SHORTEST_ID and digest.startswith(name.casefold())}
    digests = sorted(by_name or by_hash)
    if not digests:
        known = dict.fromkeys(concept for _, eraser in hashed for concept in eraser.names)
        raise EsdLoraError(
            f"the stack has no member {name!r}{did_you_mean(name, known)}: expected a concept's name, or the first"
            f" {_SHORTEST_ID} digits of a hash or more (esd-lora inspect)."
        )
    if len(digests) > 1:
        raise EsdLoraError(
            f"{name!r} fits several members of the stack: {', '.join(digest[:12] for digest in digests)}. Give one of these."
        )
    return max(place for place, (digest, _) in enumerate(hashed) if digest == digests[0])
