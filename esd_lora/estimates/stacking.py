"""What fusing and harmonising a stack take.

Evaluations and texts are counted by the rules that `fusing` follows. One batch of trajectories with the layers' inputs
recorded, one layer of each width solved, and one step of harmonising are made for real, which says how long each takes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from esd_lora.adapter import add_adapter, read_pairs, remove_adapter
from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.stacking import Strength, check_cut, outline
from esd_lora.estimates.estimate import Estimate, Pace, Work, clock, peak_memory, time_text
from esd_lora.fuse_specs import FuseSpec, HarmoniseSpec
from esd_lora.fusing.closed_form import WIDEST, objective, solve
from esd_lora.fusing.harmonising import walked_prompts
from esd_lora.fusing.moments import TEXT, Moment, MomentCollector, PromptGroup
from esd_lora.fusing.prompts import Members, gather_members
from esd_lora.fusing.reading import batches_of_moments, groups_of
from esd_lora.fusing.states import LayerProblem, state_bytes
from esd_lora.recipe import LoraSpec
from esd_lora.recipe_files import load_fuse_spec, load_harmonise_spec
from esd_lora.trajectory import in_float64, latents_per_batch, pick

_SOLVED = 2048
"""Inputs of the widest layer that is solved to time it; the time of wider ones grows with their cube."""


def estimate_fusing(
    erasers: Sequence[Eraser],
    base: Base,
    *,
    weights: Sequence[float | Strength] | None = None,
    keep: Sequence[str] | None = None,
    rank: int | None = None,
    spec: FuseSpec | str | Path = "fuse",
    **fields: Any,
) -> Estimate:
    """Return what `fuse` takes; its arguments are the same, but for `energy`, which only makes the eraser smaller.

    Raises:
        EsdLoraError: As `fuse` does where the erasers and the base do not fit each other.
    """
    check_cut(rank, None)
    spec = load_fuse_spec(spec, **fields)
    members = gather_members(erasers, base, weights, keep)
    groups = groups_of(members, spec)
    widths = {path: pair.down[0].numel() for path, pair in outline(members.erasers).pairs.items()}
    batches = list(batches_of_moments({path: width for path, width in widths.items() if width <= WIDEST}, base.family))
    denoising = [paths for batch in batches if (paths := [name for name in batch if name != TEXT])]
    texts = sum(len(group.prompts) for group in groups) if any(TEXT in batch for batch in batches) else 0
    walks = sum(group.trajectories for group in groups) * len(denoising)
    work = Work(texts + walks + bool(walks), walks * spec.steps * (1 + (spec.guidance != 1)))  # and the empty prompt
    layers, count = dict(base.model.named_modules()), len(members.erasers)
    ranks = {path: sum(e.pairs[path].rank for e in members.erasers if path in e.pairs) for path in widths}
    solved = [path for batch in batches for readers in batch.values() for path in readers]
    one = {widths[path]: path for path in solved}
    times = {width: _time_solving(layers[path].weight, ranks[path], count) for width, path in one.items()}
    around = sum(times[widths[path]] for path in solved)
    pace = Pace(time_text(base), _time_walking(base, denoising[0], groups, spec) if denoising else 0.0)
    sizes = (min(rank or ranks[path], ranks[path]) * (widths[path] + len(layers[path].weight)) for path in widths)
    return Estimate(work, work, pace, around, peak_memory(base), 4 * sum(sizes))


def state_size(
    erasers: Sequence[Eraser],
    base: Base,
    *,
    weights: Sequence[float | Strength] | None = None,
    keep: Sequence[str] | None = None,
    spec: FuseSpec | str | Path = "fuse",
    **fields: Any,
) -> int:
    """Return the bytes of the state that `fuse` keeps of a stack; its arguments are the same."""
    members = gather_members(erasers, base, weights, keep)
    wide = [path for path, pair in outline(members.erasers).pairs.items() if pair.down[0].numel() > WIDEST]
    return state_bytes(members, base, load_fuse_spec(spec, **fields), wide)


def _time_solving(weight: torch.Tensor, rank: int, count: int) -> float:
    """Return how long the closed form of one layer takes, by solving one of random second moments.

    Args:
        weight: The base's weight there.
        rank: Of all members together.
        count: Number of members.
    """
    inputs = weight[0].numel()
    width = min(inputs, _SOLVED)
    layer = torch.nn.Linear(width, len(weight), device=weight.device, dtype=torch.float32)
    pair = LoraPair(torch.randn(rank, width), torch.randn(len(weight), rank))
    moment = Moment(layer)
    moment.begin(PromptGroup(("",), 1, "members"), 0)
    moment.add(torch.randn(8, 128, width, device=weight.device), float(count))
    started = time.monotonic()
    down_g = in_float64(pair.down).to(moment.members.device) @ moment.members / count
    problem = LayerProblem(
        "", pair, down_g, [len(rows) for rows in torch.arange(rank).tensor_split(count)], "", moment, count, 1
    )
    objective(problem, 1.0, [solve(problem, 1.0, 0.1), pair, None])
    return (time.monotonic() - started) * (inputs / width) ** 3


def _time_walking(base: Base, batch: Sequence[str], groups: Sequence[PromptGroup], spec: FuseSpec) -> float:
    """Return how long an evaluation takes while inputs are recorded: a member's trajectories walk together, kept ones alone."""
    walked = Counter(group.trajectories for group in groups)
    one = {group.trajectories: group for group in groups if group.trajectories}
    each = {number: _time_recording(base, batch, group, spec) for number, group in one.items()}
    return sum(each[number] * number * walked[number] for number in each) / sum(number * walked[number] for number in each)


def _time_recording(base: Base, batch: Sequence[str], group: PromptGroup, spec: FuseSpec) -> float:
    """Return how long an evaluation takes on trajectories of one group."""
    layers = dict(base.model.named_modules())
    few = group._replace(trajectories=min(group.trajectories, latents_per_batch(base.latent_shape())), member=None)
    moments = {path: Moment(layers[path]) for path in batch}

    def record() -> None:
        MomentCollector(base, {}, steps=2, guidance=spec.guidance, seed=spec.seed).collect(few, moments)

    seconds = clock(base, record, 1)
    texts = (few.trajectories + 1) * time_text(base)
    return max(0.0, seconds - texts) / (few.trajectories * 2 * (1 + (spec.guidance != 1)))


def estimate_harmonising(
    erasers: Sequence[Eraser],
    base: Base,
    *,
    weights: Sequence[float | Strength] | None = None,
    keep: Sequence[str] | None = None,
    spec: HarmoniseSpec | str | Path = "harmonise",
    **fields: Any,
) -> Estimate:
    """Return what `harmonise` takes; its arguments are the same.

    Raises:
        EsdLoraError: As `harmonise` does where the erasers and the base do not fit each other.
    """
    spec = load_harmonise_spec(spec, **fields)
    members = gather_members(erasers, base, weights, keep)
    work = _count_harmonising(spec, members)
    shape, device = base.latent_shape(), base.model.device
    count = min(2 * spec.batch_size, latents_per_batch(shape))
    x_t, t = torch.randn(count, *shape, device=device), torch.full((count,), 500, device=device)
    condition = pick(base.encode(["a photograph"]), torch.zeros_like(t))
    add_adapter(base, base.family.modules(base.model, spec.scope), LoraSpec(rank=spec.rank, alpha=spec.rank), spec.seed)
    try:
        with torch.no_grad():
            evaluation = clock(base, lambda: base.predict(x_t, t, condition), count)
        student = clock(base, lambda: base.predict(x_t, t, condition).square().mean().backward(), count)
        eraser = sum(4 * (pair.down.numel() + pair.up.numel()) for pair in read_pairs(base.model).values())
    finally:
        remove_adapter(base)
    return Estimate(work, work, Pace(time_text(base), evaluation, student), 0.0, peak_memory(base), eraser)


def _count_harmonising(spec: HarmoniseSpec, members: Members) -> Work:
    """Return the work of walking, of the members' targets, and of steps, which put pseudo-words in half of what is kept."""
    taught, kept = walked_prompts(spec, members)
    erased, steps, shaken = sum(map(len, taught)), spec.steps * len(members.erasers), spec.batch_size // 2
    walked = (erased + len(kept)) * spec.trajectory_steps * (1 + (spec.guidance != 1))
    known = {"", *kept, *(prompt for prompts in taught for prompt in prompts)}
    return Work(
        texts=len(known) + len(kept) + steps * shaken,
        evaluations=walked + erased * spec.trajectory_steps + steps * shaken,
        student_samples=steps * 2 * spec.batch_size,
    )
