"""Harmonising a stack: a short distillation of what every member does alone into the one update they share.

A sibling of `training.py` with other teachers. On member i's prompts the teacher is the base with eraser i alone, on prompts
to keep it is the base itself, and the student is the stack as it is, typically in its closed form (`fusing.py`): one matrix a
layer cannot do everything the members did, but the layers together can make up for much of it. Half of the kept points are
asked about with words that mean nothing, so that what stands in no list is left alone too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import trange

from esd_lora.adapter import adapter_disabled, applied, load_adapter, read_pairs
from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import Distillation
from esd_lora.fusing.moments import turns
from esd_lora.fusing.pseudo_words import PseudoWords
from esd_lora.optimizers import make_optimizer
from esd_lora.trajectory import Condition, Points, TrajectoryBuffer, concatenate, latents_per_batch, pick, walk

LEARNING_RATE = 3e-3
BATCH = 16
"""Points of members' prompts in a step, and as many of kept ones, with the same weight."""
PUSH = 1.75
"""What a member does alone is taught times this, because what is kept pulls back."""
SHAKE = 0.7
"""Noise on the text of half of the kept points, beside a pseudo-word: a random mixture of how the prompts differ from each
other, times this."""


def harmonise(
    stacked: Eraser,
    members: Sequence[Eraser],
    prompts: Sequence[Sequence[str]],
    kept: Sequence[str],
    base: Base,
    *,
    steps: int,
    trajectories: int = 32,
    keep_trajectories: int = 128,
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
        steps: Optimiser steps, 200 to 600; the learning rate falls to 0 over them.
        trajectories: Walked by the base for each member, its prompts taking turns; every point is trained on. A member with
            more prompts gets one for each, up to three times as many, and so more of every batch.
        keep_trajectories: Walked for the kept prompts.
        trajectory_steps: Points on each.
        guidance: Of the trajectories.
        seed: Of noise and batches.
        progress: Whether to show a progress bar.

    Returns:
        The stack of the same ranks, with this in its header.
    """
    started, evaluations = time.monotonic(), 0
    walks = [max(trajectories, min(len(own), 3 * trajectories)) for own in prompts]
    # Only what is walked: a large text encoder's output takes megabytes a prompt.
    asked = [[own[i] for i in turns(count, len(own))] for own, count in zip(prompts, walks, strict=True)]
    asked_kept = [kept[i] for i in turns(keep_trajectories, len(kept))]
    table = list(dict.fromkeys(["", *asked_kept, *(prompt for own in asked for prompt in own)]))
    conditions = base.encode(table)
    spread = {name: value - value.mean(0) for name, value in conditions.items() if name.endswith("embeds")}
    words = PseudoWords(base, asked_kept)
    shape, device = base.latent_shape(), base.model.device
    noise = torch.Generator().manual_seed(seed)

    def predict(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        nonlocal evaluations
        evaluations += len(x_t)
        return base.predict(x_t, t, condition)

    def pushed(part: Points) -> Tensor:
        """From the base's prediction towards the teacher's, and beyond."""
        alone = predict(part.x_t, part.t, pick(conditions, part.lesson))
        return part.target + PUSH * (alone - part.target)

    def points(walked: Sequence[str], teacher: Eraser | None = None) -> TrajectoryBuffer:
        """The base's trajectories under prompts, with what the teacher predicts there."""
        places = torch.tensor([table.index(prompt) for prompt in walked], device=device)
        starts = torch.randn(len(walked), *shape, generator=noise).to(device)
        parts: list[Points] = []
        for rows, start in zip(places.split(latents_per_batch(shape)), starts.split(latents_per_batch(shape)), strict=True):
            told, null = pick(conditions, rows), pick(conditions, torch.zeros_like(rows))
            scheduler = base.family.scheduler(base.pipe, trajectory_steps, shape, device)
            for x_t, t, _, before in walk(predict, scheduler, start, told, null, guidance=guidance):
                assert before is not None
                parts.append(Points(x_t, t, rows, before))
        if teacher is not None:
            with applied(base, [teacher]), torch.no_grad():
                parts = [part._replace(target=pushed(part)) for part in parts]
        return TrajectoryBuffer(Points.join(parts))

    buffers = [points(walked, member) for walked, member in zip(asked, members, strict=True)]
    erasing = TrajectoryBuffer(Points.join([buffer.points for buffer in buffers]))
    keeping = points(asked_kept)
    parameters = load_adapter(base, stacked.pairs)
    losses: list[float] = []
    try:
        optimizer = make_optimizer("adam", parameters, LEARNING_RATE, {})
        scaler = torch.amp.GradScaler(enabled=base.model.dtype == torch.float16, device=device.type)
        for step in trange(steps, desc="harmonising", unit="step", disable=not progress):
            chance = torch.Generator().manual_seed(seed * 100_003 + step)
            erased, keep = erasing.sample(BATCH, chance), keeping.sample(BATCH, chance)
            half = BATCH // 2
            shaken = words.encode([table[i] for i in keep.lesson[:half].tolist()], chance)
            mix = SHAKE * torch.randn(half, len(table), generator=chance) / len(table) ** 0.5
            for name, differences in spread.items():
                shaken[name] += torch.tensordot(mix.to(differences), differences, 1)
            with torch.no_grad(), adapter_disabled(base):
                keep.target[:half] = predict(keep.x_t[:half], keep.t[:half], shaken)
            told = concatenate(pick(conditions, erased.lesson), shaken, pick(conditions, keep.lesson[half:]))
            both = Points.join([erased, keep])
            optimizer.zero_grad()
            losses.append(0.0)
            for rows in torch.arange(len(both.t), device=device).split(latents_per_batch(shape)):
                prediction = predict(both.x_t[rows], both.t[rows], pick(told, rows))
                loss = (prediction - both.target[rows]).square().mean() * len(rows) / len(both.t)
                scaler.scale(loss).backward()
                losses[-1] += loss.item()
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - step / steps)
            scaler.step(optimizer)
            scaler.update()
        pairs = read_pairs(base.model)
    finally:
        base.model.unload_lora()
    tenth = -(-steps // 10)
    record = Distillation(
        steps=steps,
        trajectories=tuple(walks),
        keep_trajectories=keep_trajectories,
        trajectory_steps=trajectory_steps,
        guidance=guidance,
        evaluations=evaluations,
        seconds=time.monotonic() - started,
        first_loss=sum(losses[:tenth]) / tenth if steps else None,
        last_loss=sum(losses[-tenth:]) / tenth if steps else None,
    )
    return Eraser(pairs, stacked.header.model_copy(update={"distillations": (*stacked.header.distillations, record)}))
