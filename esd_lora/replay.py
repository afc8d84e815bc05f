"""The points a training draws its batches from, walked by turns for every lesson and in every aspect bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from esd_lora.families import Base
from esd_lora.lessons import Teacher
from esd_lora.recipe import TrainSpec
from esd_lora.trajectory import Points, TrajectoryBuffer


class Buffers(NamedTuple):
    """Points of erased and of preserved prompts, of one shape."""

    erasing: TrajectoryBuffer
    preserving: TrajectoryBuffer | None

    def batches(self, spec: TrainSpec, chance: torch.Generator) -> Iterator[Points]:
        """The batches of one optimiser step, each of erased points and then preserved ones."""
        parts = [self.erasing.sample(spec.batch_size * spec.accumulate, chance).split(spec.batch_size)]
        if self.preserving:
            parts.append(self.preserving.sample(spec.preserve_batch * spec.accumulate, chance).split(spec.preserve_batch))
        return (Points.join(list(batch)) for batch in zip(*parts, strict=True))


def refresh(teacher: Teacher, step: int, shapes: Sequence[tuple[int, int, int]]) -> dict[int, Buffers]:
    """Walks new trajectories: `spec.trajectories` of erased prompts and `spec.preserve_trajectories` of preserved ones.

    Every lesson gets its turn: the lists are gone through in a shuffled order, over and over, from refresh to refresh.

    Args:
        teacher: Walks, and knows the lessons.
        step: The first one to be trained on these points.
        shapes: From `latent_shapes`. Step s trains on number `s % len(shapes)`; those whose turn comes before the next
            refresh share the trajectories.
    """
    spec, lessons = teacher.spec, teacher.lessons
    erased = [i for i, lesson in enumerate(lessons) if not lesson.preserves]
    preserved = [i for i, lesson in enumerate(lessons) if lesson.preserves]
    number, sharing = step // spec.refresh_every, min(len(shapes), spec.refresh_every)

    def fill(rows: list[int], trajectories: int, turn: int, noise: torch.Generator, bucket: int) -> TrajectoryBuffer:
        count = -(-trajectories // sharing)
        shuffled = torch.Generator().manual_seed(seed_of(spec.seed, 2, 0))
        order = torch.tensor(rows)[torch.randperm(len(rows), generator=shuffled)]
        lesson = order[((number * sharing + turn) * count + torch.arange(count)) % len(rows)]
        return teacher.fill(lesson.to(teacher.base.model.device), noise, shape=shapes[bucket])

    buffers: dict[int, Buffers] = {}
    for turn in range(sharing):
        bucket = (step + turn) % len(shapes)
        noise = torch.Generator().manual_seed(seed_of(spec.seed, 3, number, *[turn] * (sharing > 1)))
        erasing, preserving = fill(erased, spec.trajectories, turn, noise, bucket), None
        if preserved and spec.preserve_batch and spec.preserve_trajectories:
            preserving = fill(preserved, spec.preserve_trajectories, turn, noise, bucket)
        buffers[bucket] = Buffers(erasing, preserving)
    return buffers


def latent_shapes(base: Base, spec: TrainSpec) -> list[tuple[int, int, int]]:
    """Shapes of latents to train on, one an aspect bucket, all of about the same area."""
    native = base.latent_shape()
    side = spec.resolution or native[1] * base.pipe.vae_scale_factor
    if not spec.aspects:
        return [base.latent_shape((side, side)) if spec.resolution else native]
    ratios = [int(width) / int(height) for width, height in (aspect.split(":") for aspect in spec.aspects)]
    return list(dict.fromkeys(base.latent_shape((round(side / r**0.5), round(side * r**0.5))) for r in ratios))


def seed_of(*parts: int) -> int:
    """One 63-bit seed for several small numbers, so that every draw can be repeated without replaying those before."""
    out = 0
    for part in parts:
        out = (out * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return out
