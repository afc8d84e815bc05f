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

from esd_lora.adapter import add_adapter, read_pairs
from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.stacking import Strength, check_cut, stack
from esd_lora.estimates.estimate import Estimate, Pace, Work, clock, peak_memory, time_text
from esd_lora.fuse_specs import FuseSpec, HarmoniseSpec
from esd_lora.fusing.closed_form import WIDEST, batches_of_layers, objective, solve
from esd_lora.fusing.harmonising import walked_prompts
from esd_lora.fusing.moments import Moment, MomentCollector, PromptGroup
from esd_lora.fusing.prompts import Members, gather_members
from esd_lora.recipe import LoraSpec
from esd_lora.recipe_files import load_fuse_spec, load_harmonise_spec
from esd_lora.trajectory import latents_per_batch, pick

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
    groups = [PromptGroup(prompts, spec.trajectories) for prompts in members.prompts]
    if walked := min(spec.keep_trajectories, len(members.kept)) if spec.lam else 0:
        groups.append(PromptGroup(members.kept, walked))
    summed = stack(members.erasers).pairs
    pairs = {module: pair for module, pair in summed.items() if pair.down[0].numel() <= WIDEST}
    batches = list(batches_of_layers({module: pair.down[0].numel() for module, pair in pairs.items()}))
    denoising = [batch for batch in batches if not all(map(base.family.reads_text, batch))]
    work = _count_fusing(base, groups, batches, spec)
    count = len(members.erasers)
    around = sum(_time_solving(base, pairs[m], count) * n for m, n in _by_width(pairs).items())
    pace = Pace(time_text(base), _time_recording(base, denoising[0], groups[-1], spec) if denoising else 0.0)
    eraser = sum(
        4 * min(rank or pair.rank, pair.rank) * (pair.down[0].numel() + pair.up[:, 0].numel()) for pair in summed.values()
    )
    return Estimate(work, work, pace, around, peak_memory(base), eraser)


def _count_fusing(base: Base, groups: Sequence[PromptGroup], batches: Sequence[Sequence[str]], spec: FuseSpec) -> Work:
    """Return the texts and the evaluations of `MomentCollector`, which walks once and goes over the points again."""
    trajectories, guided = sum(group.trajectories for group in groups), 1 + (spec.guidance != 1)
    denoising = sum(any(not base.family.reads_text(module) for module in batch) for batch in batches)
    texts = 0
    if any(base.family.reads_text(module) for batch in batches for module in batch):
        texts += sum(len(group.prompts) for group in groups)
    if denoising:
        texts += trajectories + len(groups)  # the empty prompt for each
    return Work(texts, trajectories * spec.steps * (guided + denoising - 1) if denoising else 0)


def _by_width(pairs: dict[str, LoraPair]) -> dict[str, int]:
    """Return one layer of each number of inputs, with the number of layers that have it."""
    widths = Counter(pair.down[0].numel() for pair in pairs.values())
    one = {pair.down[0].numel(): module for module, pair in pairs.items()}
    return {one[width]: number for width, number in widths.items()}


def _time_solving(base: Base, pair: LoraPair, count: int) -> float:
    """Return how long the closed form of one layer takes, by solving one of random second moments."""
    inputs = pair.down[0].numel()
    width, rank = min(inputs, _SOLVED), pair.rank
    layer = torch.nn.Linear(width, pair.up.shape[0], device=base.model.device, dtype=torch.float32)
    narrow = LoraPair(pair.down.flatten(1)[:, :width].float(), pair.up.flatten(1).float())
    parts = torch.arange(rank).tensor_split(count)
    moment = Moment(layer, {i: narrow.down[rows] for i, rows in enumerate(parts)})
    for i in range(count):
        moment.add(torch.randn(8, 128, width, device=base.model.device), 1.0)
        moment.close(PromptGroup([], 1, member=i))
    started = time.monotonic()
    solved = solve(moment, narrow, count, 1.0, 0.1)
    for update in (solved, narrow, None):
        objective(moment, narrow, update)
    return (time.monotonic() - started) * (inputs / width) ** 3


def _time_recording(base: Base, batch: Sequence[str], group: PromptGroup, spec: FuseSpec) -> float:
    """Return how long an evaluation takes while the inputs of a batch of layers are recorded."""
    layers = dict(base.model.named_modules())
    few = PromptGroup(group.prompts, min(group.trajectories, latents_per_batch(base.latent_shape())))
    moments = {module: Moment(layers[module], {}) for module in batch if not base.family.reads_text(module)}

    def record() -> None:
        MomentCollector(base, [few], steps=2, guidance=spec.guidance, seed=spec.seed).collect(0, moments)

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
        base.model.unload_lora()
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
