"""Harmonising a stack: a short distillation of what every member does alone into the one update they share.

A sibling of `training.py` with other teachers. On member i's prompts the teacher is the base with eraser i alone, on prompts
to keep it is the base itself, and the student is the stack as it is, typically in its closed form (`fusing.py`): one matrix a
layer cannot do everything the members did, but the layers together can make up for much of it. Half of the kept points are
asked about with noise on the text, so that what stands in no list is left alone too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import trange

from esd_lora.adapters import read_pairs, wear
from esd_lora.applying import applied
from esd_lora.eraser import Eraser
from esd_lora.families import Base
from esd_lora.moments import turns
from esd_lora.optimizing import make_optimizer
from esd_lora.trajectory import Condition, Points, TrajectoryBuffer, concatenate, pick, walk

LEARNING_RATE = 3e-3
BATCH = 16
"""Points of members' prompts in a step, and as many of kept ones, with the same weight."""
PUSH = 1.25
"""What a member does alone is taught times this, because what is kept pulls back."""
SHAKE = 1.0
"""Noise on the text of half of the kept points, in units of the text's own spread: what lies between and beyond the listed
prompts is kept too."""


def harmonise(
    stacked: Eraser,
    members: Sequence[Eraser],
    prompts: Sequence[Sequence[str]],
    kept: Sequence[str],
    base: Base,
    *,
    steps: int,
    trajectories: int = 8,
    keep_trajectories: int = 64,
    trajectory_steps: int = 12,
    guidance: float = 3.0,
    seed: int = 0,
    progress: bool = True,
) -> Eraser:
    """Distils the members into a stack.

    Args:
        stacked: Where to start from.
        members: What to do on their own prompts.
        prompts: Of each member.
        kept: Prompts to leave alone.
        base: The loaded base; it leaves as it came.
        steps: Optimiser steps, 60 to 300; the learning rate falls to 0 over them.
        trajectories: Walked by the base for each member, its prompts taking turns; every point is trained on.
        keep_trajectories: Walked for the kept prompts.
        trajectory_steps: Points on each.
        guidance: Of the trajectories.
        seed: Of noise and batches.
        progress: Whether to show a progress bar.

    Returns:
        The stack of the same ranks, with the same header.
    """
    # Only what is walked: a large text encoder's output takes megabytes a prompt.
    asked = [[own[i] for i in turns(trajectories, len(own))] for own in prompts]
    asked_kept = [kept[i] for i in turns(keep_trajectories, len(kept))]
    table = list(dict.fromkeys(["", *asked_kept, *(prompt for own in asked for prompt in own)]))
    places = {prompt: i for i, prompt in enumerate(table)}
    conditions = base.encode(table)
    spread = {name: value.float().std(0) for name, value in conditions.items() if name.endswith("embeds")}
    shape, device = base.latent_shape(), base.model.device
    noise = torch.Generator().manual_seed(seed)

    def points(walked: Sequence[str], teacher: Sequence[Eraser]) -> TrajectoryBuffer:
        """The base's trajectories under prompts, with what the teacher predicts there."""
        rows = torch.tensor([places[prompt] for prompt in walked], device=device)
        told = pick(conditions, rows)
        start = torch.randn(len(walked), *shape, generator=noise).to(device)
        scheduler = base.family.scheduler(base.pipe, trajectory_steps, shape, device)
        visited = walk(base.predict, scheduler, start, told, pick(conditions, torch.zeros_like(rows)), guidance=guidance)
        parts: list[Points] = []
        with applied(base, teacher), torch.no_grad():
            for x_t, t, _, before in visited:
                assert before is not None
                change = base.predict(x_t, t, told) - before if teacher else torch.zeros_like(before)
                parts.append(Points(x_t, t, rows, before + PUSH * change))
        return TrajectoryBuffer(Points.join(parts))

    buffers = [points(walked, [member]) for walked, member in zip(asked, members, strict=True)]
    erasing = TrajectoryBuffer(Points.join([buffer.points for buffer in buffers]))
    keeping = points(asked_kept, [])
    parameters = wear(base, stacked.pairs)
    try:
        optimizer = make_optimizer("adam", parameters, LEARNING_RATE, {})
        for step in trange(steps, desc="harmonising", unit="step", disable=not progress):
            chance = torch.Generator().manual_seed(seed * 100_003 + step)
            erased, keep = erasing.sample(BATCH, chance), keeping.sample(BATCH, chance)
            kept_told, kept_target = _shaken(base, keep, pick(conditions, keep.lesson), spread, chance)
            told = concatenate(pick(conditions, erased.lesson), kept_told)
            prediction = base.predict(torch.cat([erased.x_t, keep.x_t]), torch.cat([erased.t, keep.t]), told)
            loss = (prediction - torch.cat([erased.target, kept_target])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - step / steps)
            optimizer.step()
        return Eraser(read_pairs(base.model), stacked.header)
    finally:
        base.model.unload_lora()


def _shaken(
    base: Base, points: Points, told: Condition, spread: Mapping[str, Tensor], chance: torch.Generator
) -> tuple[Condition, Tensor]:
    """Has the first half of kept points asked about with noise on the text; conditions and the base's predictions of all."""
    half = len(points.t) // 2
    asked = {name: value.clone() for name, value in told.items()}
    for name, width in spread.items():
        noise = torch.randn(asked[name][:half].shape, generator=chance).to(width)
        asked[name][:half] += (SHAKE * width * noise).to(asked[name])
    base.model.disable_adapters()
    with torch.no_grad():
        target = base.predict(points.x_t[:half], points.t[:half], pick(asked, torch.arange(half, device=points.t.device)))
    base.model.enable_adapters()
    return asked, torch.cat([target, points.target[half:]])
