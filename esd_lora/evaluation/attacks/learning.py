"""What attacks that learn share: pictures of the concept, noised, and the loss that a base is trained with.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise        noise and v models, with a_t from the base's own schedule
    x_t = (1 - sigma_t) x_0 + sigma_t noise          flow models
    loss = |predict(x_t, t, caption) - target|^2,    target = noise, sqrt(a_t) noise - sqrt(1 - a_t) x_0, or noise - x_0

Ho, Jain and Abbeel, *Denoising Diffusion Probabilistic Models*, NeurIPS 2020, arXiv:2006.11239, equation 14; v as by Salimans
and Ho, arXiv:2202.00512; flow as by Esser et al., arXiv:2403.03206. Times are those on the way to pictures of the evaluation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from esd_lora.bases.base import Base
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks.latents import to_latents
from esd_lora.evaluation.attacks.victim import Victim
from esd_lora.evaluation.picture_files import SUFFIXES, open_picture, picture_paths
from esd_lora.evaluation.variants import painter
from esd_lora.families.sd import StableDiffusion
from esd_lora.files import hash_file
from esd_lora.optimizers import make_optimizer
from esd_lora.trajectory import Condition, Points, latents_per_batch

BATCH = 16
"""Noised pictures in a step of learning."""
SLOW = 2.0
"""Seconds before a progress bar shows."""


def at_least(least: int, **settings: int) -> None:
    """Refuses settings that are too small.

    Raises:
        EsdLoraError: With the first one.
    """
    for name, value in settings.items():
        if value < least:
            raise EsdLoraError(f"{name} of an attack is {value}, expected {least} or more.")


def require_stable_diffusion(base: Base, attack: str) -> None:
    """Refuses bases with other text encoders or another guidance than Stable Diffusion and SDXL have.

    Raises:
        EsdLoraError: With what the base is.
    """
    if not isinstance(base.family, StableDiffusion) or base.family.takes_guidance(base.pipe):
        raise EsdLoraError(
            f"base {base.id!r} is a {type(base.pipe).__name__}, and {attack} is made for Stable Diffusion and SDXL, not"
            " distilled for guidance. Leave this attack out of the suite."
        )


def seeded(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else."""
    return random.Random(" ".join(map(str, parts))).getrandbits(32)


def pictures_in(folder: str | Path | None, victim: Victim, count: int | None = None) -> list[Path]:
    """The first `count` pictures of a folder, by name, or all of them; none without a folder.

    Raises:
        EsdLoraError: If there is no such folder or no picture in it, or what was erased is more than one concept, so that
            nobody could say which of them the pictures show.
    """
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise EsdLoraError(f"there is no folder {folder}. Expected one with pictures of the concept.")
    found = picture_paths(Path(folder))
    if not found:
        raise EsdLoraError(f"{folder} holds no picture. Expected some of the concept, as {', '.join(SUFFIXES)}.")
    if len(victim.concepts) != 1:
        raise EsdLoraError(
            f"the pictures in {folder} can show one concept, and {len(victim.concepts)} were erased. Attack one at a time, or"
            " leave the folder out."
        )
    return found[:count]


def hashes(files: Sequence[Path]) -> dict[str, str] | None:
    """For the record: name to SHA-256 of the attacker's pictures; `None` where the base paints them."""
    return {file.name: hash_file(file) for file in files} or None


def captioned(victim: Victim, count: int, files: Sequence[Path], seed: int) -> tuple[Tensor, list[str]]:
    """Latents [N, ...] of pictures of the concept, and their captions.

    Args:
        victim: Its base must be as it is before erasing.
        count: Pictures to paint, evenly spaced among the asked prompts, with other seeds than those.
        files: Pictures to read instead; their caption is the concept's name.
        seed: Of what is painted.
    """
    if files:
        return to_latents(victim.base, list(map(open_picture, files))), [victim.concepts[0].name] * len(files)
    chosen = [victim.asked[i * len(victim.asked) // count] for i in range(count)]
    asked = [one._replace(seed=seeded("picture", seed, i, one.seed)) for i, one in enumerate(chosen)]
    pictures = painter(victim.base, victim.steps, victim.guidance)(asked)
    return to_latents(victim.base, pictures), [one.prompt for one in asked]


def batches(victim: Victim, latents: Tensor, seed: int) -> Callable[[int], Points]:
    """From a step of learning to its `BATCH` points."""
    return lambda step: noised(victim, latents, BATCH, torch.Generator().manual_seed(seed * 100_003 + step))


def noised(victim: Victim, latents: Tensor, count: int, chance: torch.Generator, share: float = 1.0) -> Points:
    """Draws `count` of the latents, with noise and times on the base's own grid: where to predict, and what.

    Args:
        victim: Whose base has the schedule.
        latents: Of pictures [N, ...].
        count: Of points.
        chance: On the CPU, so that points do not depend on the device.
        share: Of the times, from the noisiest on; 1 is all.
    """
    base = victim.base
    scheduler: Any = base.family.scheduler(base.pipe, victim.steps, base.latent_shape(), latents.device)
    rows = torch.cat([torch.randperm(len(latents), generator=chance) for _ in range(-(-count // len(latents)))])[:count]
    times = scheduler.timesteps[: math.ceil(share * len(scheduler.timesteps))]
    t = times[torch.randint(len(times), (count,), generator=chance).to(latents.device)]
    noise = torch.randn(count, *latents.shape[1:], generator=chance).to(latents)
    rows = rows.to(latents.device)
    x_0 = latents[rows]
    if base.prediction_type == "flow":
        return Points(scheduler.scale_noise(x_0, t, noise), t, rows, noise - x_0)
    target = scheduler.get_velocity(x_0, noise, t) if base.prediction_type == "v_prediction" else noise
    return Points(scheduler.add_noise(x_0, noise, t), t, rows, target)


def learn(
    base: Base,
    parameters: Sequence[torch.nn.Parameter],
    points: Callable[[int], Points],
    told: Callable[[Tensor], Condition],
    *,
    steps: int,
    lr: float,
    desc: str,
) -> list[float]:
    """Lowers the denoising loss by Adam.

    Args:
        base: As it is attacked.
        parameters: In float32, to be learnt.
        points: Of a step, from `noised`.
        told: From numbers of pictures [N] to the condition of their captions, which may depend on the parameters.
        steps: Of the optimiser.
        lr: Learning rate.
        desc: Label of the progress bar.

    Returns:
        The loss at each step, before it.
    """
    optimizer = make_optimizer("adam", parameters, lr, {})
    scaler = torch.amp.GradScaler(enabled=base.model.dtype == torch.float16, device=base.model.device.type)
    losses: list[float] = []
    for step in trange(steps, desc=desc, unit="step", leave=False, delay=SLOW):
        asked = points(step)
        optimizer.zero_grad()
        losses.append(0.0)
        for part in asked.split(latents_per_batch(base.latent_shape())):
            prediction = base.predict(part.x_t, part.t, told(part.lesson))
            loss = (prediction - part.target).square().mean() * len(part.t) / len(asked.t)
            scaler.scale(loss).backward()
            losses[-1] += loss.item()
        scaler.step(optimizer)
        scaler.update()
    return losses
