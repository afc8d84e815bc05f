"""Harmonising a stack: a short distillation of what every member does alone into the one update they share.

A sibling of `training.py` with other teachers. On member i's prompts the teacher is the base with eraser i alone, on prompts
to keep it is the base itself, and the student is the stack as it is, typically in its closed form (`fusing.py`): one matrix a
layer cannot do everything the members did, but the layers together can make up for much of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import trange

from esd_lora.adapters import read_pairs, wear
from esd_lora.eraser import Eraser
from esd_lora.families import Base
from esd_lora.fused import applied
from esd_lora.moments import turns
from esd_lora.optimizing import make_optimizer
from esd_lora.trajectory import Points, TrajectoryBuffer, pick, walk

BATCH, KEEP_BATCH = 12, 8
KEEP_WEIGHT = 0.5
LEARNING_RATE = 1e-3


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
    table = list(dict.fromkeys(["", *kept, *(prompt for asked in prompts for prompt in asked)]))
    places = {prompt: i for i, prompt in enumerate(table)}
    conditions = base.encode(table)
    shape, device = base.latent_shape(), base.model.device
    noise = torch.Generator().manual_seed(seed)

    def points(asked: Sequence[str], count: int, teacher: Sequence[Eraser]) -> TrajectoryBuffer:
        """The base's trajectories under some prompts, with what the teacher predicts there."""
        rows = torch.tensor([places[asked[i]] for i in turns(count, len(asked))], device=device)
        told = pick(conditions, rows)
        start = torch.randn(count, *shape, generator=noise).to(device)
        scheduler = base.family.scheduler(base.pipe, trajectory_steps, shape, device)
        visited = walk(base.predict, scheduler, start, told, pick(conditions, torch.zeros_like(rows)), guidance=guidance)
        with applied(base, teacher), torch.no_grad():
            return TrajectoryBuffer(Points.join([Points(p.x_t, p.t, rows, base.predict(p.x_t, p.t, told)) for p in visited]))

    buffers = [points(asked, trajectories, [member]) for asked, member in zip(prompts, members, strict=True)]
    erasing = TrajectoryBuffer(Points.join([buffer.points for buffer in buffers]))
    keeping = points(kept, keep_trajectories, [])
    parameters = wear(base, stacked.pairs)
    try:
        optimizer = make_optimizer("adam", parameters, LEARNING_RATE, {})
        for step in trange(steps, desc="harmonising", unit="step", disable=not progress):
            chance = torch.Generator().manual_seed(seed * 100_003 + step)
            batch = Points.join([erasing.sample(BATCH, chance), keeping.sample(KEEP_BATCH, chance)])
            prediction = base.predict(batch.x_t, batch.t, pick(conditions, batch.lesson))
            error = (prediction - batch.target).square().flatten(1).mean(1)
            loss = (error[:BATCH].sum() + KEEP_WEIGHT * error[BATCH:].sum()) / BATCH
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - step / steps)
            optimizer.step()
        return Eraser(read_pairs(base.model), stacked.header)
    finally:
        base.model.unload_lora()
