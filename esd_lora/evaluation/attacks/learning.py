"""Learning, shared by attacks: the loss that a base is trained with, on noised pictures of the concept.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise        noise and v models, with a_t from the base's own schedule
    x_t = (1 - sigma_t) x_0 + sigma_t noise          flow models
    loss = |predict(x_t, t, caption) - target|^2,    target = noise, sqrt(a_t) noise - sqrt(1 - a_t) x_0, or noise - x_0

Ho, Jain and Abbeel, *Denoising Diffusion Probabilistic Models*, NeurIPS 2020, arXiv:2006.11239, equation 14; v as by Salimans
and Ho, arXiv:2202.00512; flow as by Esser et al., arXiv:2403.03206. Times are those on the way to pictures of the evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from esd_lora.evaluation.attacks.victim import Victim
from esd_lora.optimizers import make_optimizer
from esd_lora.seeds import step_generator
from esd_lora.trajectory import Condition, Points, latents_per_batch

BATCH = 16
"""Noised pictures in a step of learning."""
DELAY = 2.0
"""Seconds before a progress bar shows."""


def noise_latents(victim: Victim, latents: Tensor, count: int, generator: torch.Generator, share: float = 1.0) -> Points:
    """Draw `count` of the latents, with noise and times on the base's own grid: where to predict, and what.

    Args:
        victim: Its base has the schedule.
        latents: Of pictures [N, ...].
        count: Number of points.
        generator: On the CPU, so that points do not depend on the device.
        share: Of the times, from the noisiest on; 1 is all.
    """
    base = victim.base
    scheduler: Any = base.family.scheduler(base.pipe, victim.steps, base.latent_shape(), latents.device)
    rows = torch.cat([torch.randperm(len(latents), generator=generator) for _ in range(-(-count // len(latents)))])[:count]
    times = scheduler.timesteps[: math.ceil(share * len(scheduler.timesteps))]
    t = times[torch.randint(len(times), (count,), generator=generator).to(latents.device)]
    noise = torch.randn(count, *latents.shape[1:], generator=generator).to(latents)
    rows = rows.to(latents.device)
    x_0 = latents[rows]
    if base.prediction_type == "flow":
        return Points(scheduler.scale_noise(x_0, t, noise), t, rows, noise - x_0, x_0[:, :0])
    target = scheduler.get_velocity(x_0, noise, t) if base.prediction_type == "v_prediction" else noise
    return Points(scheduler.add_noise(x_0, noise, t), t, rows, target, x_0[:, :0])


def learn(
    victim: Victim,
    parameters: Sequence[torch.nn.Parameter],
    latents: Tensor,
    condition_of: Callable[[Tensor], Condition],
    *,
    steps: int,
    lr: float,
    seed: int,
    desc: str,
) -> list[float]:
    """Lower the denoising loss of pictures by Adam, on `BATCH` points a step.

    Args:
        victim: Its base, as it is attacked.
        parameters: In float32, to be learnt.
        latents: Of the pictures [N, ...].
        condition_of: From numbers of pictures [B] to the condition of their captions, which may depend on the parameters.
        steps: Of the optimiser.
        lr: Learning rate.
        seed: Of noise, times and which pictures.
        desc: Label of the progress bar.

    Returns:
        The loss at each step, before it.
    """
    base = victim.base
    optimizer = make_optimizer("adam", parameters, lr, {})
    scaler = torch.amp.GradScaler(enabled=base.model.dtype == torch.float16, device=base.model.device.type)
    losses: list[float] = []
    for step in trange(steps, desc=desc, unit="step", leave=False, delay=DELAY):
        points = noise_latents(victim, latents, BATCH, step_generator(seed, step))
        optimizer.zero_grad()
        losses.append(0.0)
        for part in points.split(latents_per_batch(base.latent_shape())):
            prediction = base.predict(part.x_t, part.t, condition_of(part.lesson))
            loss = (prediction - part.target).square().mean() * len(part.t) / len(points.t)
            scaler.scale(loss).backward()
            losses[-1] += loss.item()
        scaler.step(optimizer)
        scaler.update()
    return losses
