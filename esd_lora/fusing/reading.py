"""Reading what the closed form of every layer is solved from: all of it for a new stack, what changed for one that is known.

What is known is known by groups of prompts (`groups_of`). A stack with another member has other groups: its own prompts are one
more, and the prompts that name its concepts are no longer kept. Only these are read, to be added to the sums or taken off them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from esd_lora.bars import Bar
from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import stack_layer
from esd_lora.families.family import ModelFamily
from esd_lora.fuse_specs import FuseSpec
from esd_lora.fusing.moments import TEXT, Moment, MomentCollector, PromptGroup
from esd_lora.fusing.prompts import Members, choose_walked
from esd_lora.fusing.states import FusionState, LayerProblem

_BYTES_AT_ONCE = 2**31
"""Bytes of second moments gathered at once; further layers have the trajectories walked again."""


def groups_of(members: Members, spec: FuseSpec) -> list[PromptGroup]:
    """Return all groups of prompts that a stack is fused by: one for each member, and one for each kept prompt."""
    named = zip(members.keys(), members.prompts, strict=True)
    groups = [PromptGroup(tuple(prompts), spec.trajectories, key) for key, prompts in named]
    if spec.lam:
        walked = choose_walked(members.kept, spec.keep_trajectories)
        groups += [PromptGroup((prompt,), int(prompt in walked)) for prompt in members.kept]
    return groups


def batches_of_moments(widths: Mapping[str, int], family: ModelFamily) -> Iterator[dict[str, list[str]]]:
    """Yield moments whose sums fit into memory together, each with the layers that it is of.

    Args:
        widths: Path of a layer to its number of inputs.
        family: Says which layers read the text itself, and share a moment.
    """
    paths: dict[str, list[str]] = {}
    for path in widths:
        paths.setdefault(TEXT if family.reads_text(path) else path, []).append(path)
    batch: dict[str, list[str]] = {}
    held = 0
    for name, readers in paths.items():
        size = 2 * 8 * widths[readers[0]] ** 2
        if batch and held + size > _BYTES_AT_ONCE:
            yield batch
            batch, held = {}, 0
        batch[name] = readers
        held += size
    if batch:
        yield batch


def read_problems(
    members: Members,
    base: Base,
    collector: MomentCollector,
    spec: FuseSpec,
    widths: Mapping[str, int],
    known: FusionState | None = None,
    *,
    progress: bool = True,
) -> Iterator[LayerProblem]:
    """Read what layers are solved from, and yield it layer by layer.

    Args:
        members: Of the stack as it is to be.
        base: The loaded base.
        collector: Reads, and counts evaluations.
        spec: How to fuse.
        widths: Path of every layer to its number of inputs.
        known: What was read for the stack as it was; for a new one nothing.
        progress: Whether to show a progress bar.
    """
    named = list(zip(members.keys(), members.erasers, strict=True))
    after, before = groups_of(members, spec), groups_of(known.members, known.spec) if known else []
    kept = {TEXT: len(members.kept)}
    walked = sum(group.trajectories for group in after if group.member is None)
    batches = list(batches_of_moments(widths, base.family))
    total = len(batches) * len({*after, *before}) + len(widths)
    with Bar(total=total, desc="fusing: prompts read, layers solved", unit="part", disable=not progress) as bar:
        for batch in batches:
            moments = _read_batch(batch, base, collector, after, before, known, bar)
            for name in batch:
                moment = moments.pop(name)
                for path in moment.paths:
                    having = [(key, eraser) for key, eraser in named if path in eraser.pairs]
                    yield LayerProblem(
                        path,
                        stack_layer(path, [eraser for _, eraser in having]),
                        torch.cat([moment.products.pop((path, key)) for key, _ in having]),
                        [eraser.pairs[path].rank for _, eraser in having],
                        name,
                        moment,
                        len(named),
                        kept.get(name, walked),
                    )
                    bar.update()


def _read_batch(
    batch: Mapping[str, Sequence[str]],
    base: Base,
    collector: MomentCollector,
    after: Sequence[PromptGroup],
    before: Sequence[PromptGroup],
    known: FusionState | None,
    bar: Any,
) -> dict[str, Moment]:
    """Return moments by name, the sums over all groups of `after`: whole where nothing is known, else by what changed."""
    layers = dict(base.model.named_modules())
    moments = {name: Moment(layers[readers[0]], readers) for name, readers in batch.items()}
    old = {name: moment for name, moment in moments.items() if known and known.fill(name, moment)}
    new = {name: moment for name, moment in moments.items() if name not in old}
    for moment in new.values():
        _make_room(moment, collector.members)
    has, had = {*after}, {*before}
    for group in dict.fromkeys([*after, *before]):
        if group not in had:
            collector.collect(group, moments)
        elif group not in has:
            collector.collect(group, old, sign=-1)
        elif new:
            collector.collect(group, new)
        bar.update()
    return moments


def _make_room(moment: Moment, members: Mapping[str, Eraser]) -> None:
    """Lay members' `down_i G_i` side by side: of thousands, small pieces of their own would leave holes in memory."""
    for path in moment.paths:
        having = [(key, eraser.pairs[path].rank) for key, eraser in members.items() if path in eraser.pairs]
        rows = moment.kept.new_zeros(sum(rank for _, rank in having), len(moment.kept))
        pieces = rows.split([rank for _, rank in having])
        moment.products |= {(path, key): piece for (key, _), piece in zip(having, pieces, strict=True)}
