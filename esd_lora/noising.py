"""Noised pictures: where a base predicts what, and the loss that it was trained with there, to learn by.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise        noise and v models, with a_t from the base's own schedule
    x_t = (1 - sigma_t) x_0 + sigma_t noise          flow models
    loss = |predict(x_t, t, caption) - target|^2,    target = noise, sqrt(a_t) noise - sqrt(1 - a_t) x_0, or noise - x_0

Ho, Jain and Abbeel, *Denoising Diffusion Probabilistic Models*, NeurIPS 2020, arXiv:2006.11239, equation 14; v as by Salimans
and Ho, arXiv:2202.00512; flow as by Esser et al., arXiv:2403.03206. Times are those of a trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.optimizers import make_optimizer
from esd_lora.progress import advance, stage
from esd_lora.seeds import step_generator
from esd_lora.trajectory import Condition, NoisySample, Points, latents_per_batch

BATCH = 16
"""Noised pictures in a step of learning."""


def noise_latents(
    base: Base, latents: Tensor, times: int, count: int, generator: torch.Generator, share: float = 1.0
) -> Points:
    """Draw `count` of the latents, with noise and times on the base's own grid: where to predict, and what.

    Args:
        base: Has the schedule.
        latents: Of pictures [N, ...].
        times: Number of them on the grid: the steps of a trajectory.
        count: Number of points.
        generator: On the CPU, so that points do not depend on the device.
        share: Of the times, from the noisiest on; 1 is all.
    """
    scheduler: Any = base.family.scheduler(base.pipe, times, latents.shape[1:], latents.device)
    rows = torch.cat([torch.randperm(len(latents), generator=generator) for _ in range(-(-count // len(latents)))])[:count]
    grid = scheduler.timesteps[: math.ceil(share * len(scheduler.timesteps))]
    t = grid[torch.randint(len(grid), (count,), generator=generator).to(latents.device)]
    noise = torch.randn(count, *latents.shape[1:], generator=generator).to(latents)
    rows = rows.to(latents.device)
    x_0 = latents[rows]
    x_t = add_noise(scheduler, x_0, noise, t)
    if base.prediction_type == "flow":
        target = noise - x_0
    else:
        target = scheduler.get_velocity(x_0, noise, t) if base.prediction_type == "v_prediction" else noise
    return Points(x_t, t, rows, target, x_0[:, :0])


def add_noise(scheduler: Any, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return latents [N, ...] noised to times [N] of a scheduler of `ModelFamily.scheduler`, as the equations above say."""
    return scheduler.scale_noise(x_0, t, noise) if hasattr(scheduler, "scale_noise") else scheduler.add_noise(x_0, noise, t)


def noised_trajectory(base: Base, latents: Tensor, times: int, generator: torch.Generator) -> list[NoisySample]:
    """Return latents of pictures [N, ...], noised anew to every time that a trajectory of `times` steps visits.

    Every point counts as a unit of the stage that it is noised in (`progress`), as those of `trajectory.walk` do.
    """
    scheduler: Any = base.family.scheduler(base.pipe, times, latents.shape[1:], latents.device)
    points: list[NoisySample] = []
    for t in scheduler.timesteps:
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        ts = t.expand(len(latents))
        points.append(NoisySample(add_noise(scheduler, latents, noise, ts), ts, None, None))
        advance(len(latents))
    return points


def learn(
    base: Base,
    parameters: Sequence[torch.nn.Parameter],
    latents: Tensor,
    condition_of: Callable[[Tensor], Condition],
    *,
    times: int,
    steps: int,
    lr: float,
    seed: int,
    desc: str,
) -> list[float]:
    """Lower the denoising loss of pictures by Adam, on `BATCH` points a step.

    Args:
        base: As it stands, with erasers or without.
        parameters: In float32, to be learnt.
        latents: Of the pictures [N, ...].
        condition_of: From numbers of pictures [B] to the condition of their captions, which may depend on the parameters.
        times: As for `noise_latents`.
        steps: Of the optimiser.
        lr: Learning rate.
        seed: Of noise, times and which pictures.
        desc: What is learnt, in words, for whoever shows progress.

    Returns:
        The loss at each step, before it.
    """
    optimizer = make_optimizer("adam", parameters, lr, {})
    scaler = torch.amp.GradScaler(enabled=base.model.dtype == torch.float16, device=base.model.device.type)
    losses: list[float] = []
    with stage(desc, steps, "step"):
        for step in range(steps):
            points = noise_latents(base, latents, times, BATCH, step_generator(seed, step))
            optimizer.zero_grad()
            losses.append(0.0)
            for part in points.split(latents_per_batch(base.latent_shape())):
                prediction = base.predict(part.x_t, part.t, condition_of(part.lesson))
                loss = (prediction - part.target).square().mean() * len(part.t) / len(points.t)
                scaler.scale(loss).backward()
                losses[-1] += loss.item()
            scaler.step(optimizer)
            scaler.update()
            advance()
    return losses
