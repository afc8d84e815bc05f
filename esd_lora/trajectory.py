"""Where the training points come from: partial denoising of pure noise.

`walk` denoises with guidance and remembers every point it passes; `TrajectoryBuffer` keeps points, each with the target
the student should predict there, and hands out random batches of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from esd_lora.progress import advance
from esd_lora.ranks import share

Condition = dict[str, Tensor]
"""What a denoiser reads beside `x_t` and `t`: named tensors whose first dimension is the prompt."""

Encode = Callable[[Sequence[str]], Condition]
"""From N prompts to their condition."""

Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]
"""From `x_t` [N, ...], `t` [N] and a condition of N prompts to a prediction of the shape of `x_t`."""

_PIXELS_PER_BATCH = 2**15
"""Pixels of latents in a batch: 8 pictures at Stable Diffusion's native size."""


def in_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; Apple's devices have none, so from there it comes to the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


class Scheduler(Protocol):
    """The part that every diffusers scheduler has and a walk uses.

    Those of noise and v models may also have `init_noise_sigma` and `scale_model_input`; those of flow models have neither.
    """

    timesteps: Any

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any: ...


class NoisySample(NamedTuple):
    """Noisy latents on a trajectory, one of each of N prompts, with what guidance predicted there."""

    x_t: Tensor
    """[N, ...], as the denoiser sees it: already through `scheduler.scale_model_input`."""
    t: Tensor
    """[N]."""
    null: Tensor | None
    """Prediction for the empty prompt, [N, ...]; `None` where the walk is not guided, or stopped before predicting."""
    prompted: Tensor | None
    """Prediction for the walked prompt."""


def pick(condition: Condition, index: Tensor | slice) -> Condition:
    """Return the condition of the prompts at `index`, [N] or a slice."""
    return {name: value[index] for name, value in condition.items()}


def concatenate(*conditions: Condition) -> Condition:
    """Return the conditions of several groups of prompts as one, group after group."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


def move(condition: Condition, device: torch.device) -> Condition:
    """Return a condition on a device."""
    return {name: value.to(device) for name, value in condition.items()}


def latents_per_batch(shape: Sequence[int]) -> int:
    """Return how many latents of a shape (channels, height, width), with frames or without, go through the denoiser at once.

    It bounds memory, and changes results by rounding alone.
    """
    return max(1, _PIXELS_PER_BATCH // math.prod(shape[1:]))


@torch.no_grad()
def walk(
    denoiser: Denoiser,
    scheduler: Scheduler,
    noise: Tensor,
    condition: Condition,
    null: Condition,
    *,
    guidance: float,
    stop: int | None = None,
) -> list[NoisySample]:
    """Denoise `noise` with classifier-free guidance and return every point on the way.

    Section 4 of the paper (arXiv:2303.07345): `x_t` is what the model itself makes of the prompt at `t`, so no training
    images are needed. A point's `t` is that of the scheduler's own grid, the one `x_t` was made for. Every point counts as a
    unit of the stage that it is walked in (`progress`).

    Args:
        denoiser: The model that walks, student or base.
        scheduler: Any diffusers scheduler whose timesteps are set, 20 to 50 of them typically. It must not have walked
            before.
        noise: [N, ...] standard normal.
        condition: Of the N prompts.
        null: Of the empty prompt, N times.
        guidance: Scale of classifier-free guidance; the paper walks with 3. At 1 the empty prompt is left out, which suits
            models distilled to few steps.
        stop: Index from 0 of the last point, which is reached and not predicted at (the paper's random stop). Without
            it the walk runs to the end and every point carries its predictions.
    """
    scale: Callable[[Tensor, Any], Tensor] | None = getattr(scheduler, "scale_model_input", None)
    latents: Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    both = concatenate(null, condition)
    points: list[NoisySample] = []
    for i, t in enumerate(scheduler.timesteps):
        x_t = scale(latents, t) if scale else latents
        ts = t.expand(len(x_t))
        if i == stop:
            points.append(NoisySample(x_t, ts, None, None))
            break
        if guidance == 1:
            guided = denoiser(x_t, ts, condition)
            points.append(NoisySample(x_t, ts, None, guided))
        else:
            unprompted, prompted = denoiser(torch.cat([x_t, x_t]), torch.cat([ts, ts]), both).chunk(2)
            points.append(NoisySample(x_t, ts, unprompted, prompted))
            guided = unprompted + guidance * (prompted - unprompted)
        latents = scheduler.step(guided, t, latents).prev_sample
        advance(len(x_t))
    return points


class Points(NamedTuple):
    """Training points: where the student predicts, for which lesson, and what it should predict."""

    x_t: Tensor
    """Noisy latents, [N, ...]."""
    t: Tensor
    """Their times, [N]."""
    lesson: Tensor
    """Index of the lesson that each point belongs to, [N]."""
    target: Tensor
    """What the student should predict there, [N, ...]."""
    concept: Tensor
    """What the teacher predicts there for the concept, [N, ...]; [N, 0, ...] where the loss does not ask."""

    @classmethod
    def join(cls, parts: Sequence[Points]) -> Points:
        """Return all points of several groups as one."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def share(self) -> Points:
        """Return the points of this rank, all of them in a process of its own."""
        return Points(*(share(tensor) for tensor in self))

    def split(self, size: int) -> list[Points]:
        """Return the points in groups of `size`."""
        begins = range(0, len(self.t), size)
        return [Points(*(tensor[begin : begin + size] for tensor in self)) for begin in begins]


class TrajectoryBuffer:
    """Replay buffer of training points; one walked trajectory of S steps gives S of them instead of one."""

    def __init__(self, points: Points, push: Tensor | None = None):
        self.points = points
        self.push = push
        """How much each target grows with eta, [N, ...], where eta is to be measured."""

    def __len__(self) -> int:
        return len(self.points.t)

    def sample(self, count: int, generator: torch.Generator) -> Points:
        """Draw `count` points at random, with repetition only when the buffer holds fewer."""
        rounds = -(-count // max(len(self), 1))
        order = torch.cat([torch.randperm(len(self), generator=generator) for _ in range(rounds)])
        return Points(*(tensor[order[:count].to(tensor.device)] for tensor in self.points))
