"""The points a training draws its batches from, walked by turns for every lesson and in every aspect bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.adapter import adapter_disabled
from esd_lora.bases.base import Base
from esd_lora.lessons import Lesson
from esd_lora.objectives import OBJECTIVES, Predictions
from esd_lora.recipe import Recipe, TrainSpec
from esd_lora.trajectory import Condition, NoisySample, Points, TrajectoryBuffer, pick, walk


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


class Teacher:
    """The base with its adapter off: walks trajectories and says what the student should predict on them.

    Args:
        base: The loaded base; its denoiser may carry an adapter, which is off whenever the teacher speaks.
        recipe: Gives the objective and the shape of the trajectories.
        lessons: From `plan`.
    """

    def __init__(self, base: Base, recipe: Recipe, lessons: Sequence[Lesson]):
        self.base, self.spec, self.lessons = base, recipe.train, lessons
        self.objective = OBJECTIVES.get(recipe.objective)
        prompts = dict.fromkeys(["", *(text for lesson in lessons for text in lesson[:3])])
        places = {prompt: i for i, prompt in enumerate(prompts)}
        self.prompts = places
        self.conditions = base.encode(list(prompts), self.spec.distilled_guidance)
        self.places = torch.tensor([[places[text] for text in lesson[:3]] for lesson in lessons], device=base.model.device)
        self.eta = torch.tensor([lesson.eta for lesson in lessons], device=base.model.device)
        self.evaluations = 0
        """Latents through the denoiser without gradients so far; a guided pair counts 2."""

    def condition(self, lesson: Tensor) -> Condition:
        """What the student is told in each of `lesson` [N]."""
        return pick(self.conditions, self.places[lesson, 0])

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of prompts that occur in the lessons, for which no text encoder is needed any more."""
        return pick(self.conditions, torch.tensor([self.prompts[prompt] for prompt in prompts], device=self.places.device))

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser as it stands, without gradients, counted."""
        self.evaluations += len(x_t)
        with torch.no_grad():
            return self.base.predict(x_t, t, condition)

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """Turns the adapter off, so that the denoiser is the teacher."""
        return adapter_disabled(self.base)

    def fill(
        self,
        lesson: Tensor,
        generator: torch.Generator,
        spec: TrainSpec | None = None,
        shape: tuple[int, int, int] | None = None,
    ) -> TrajectoryBuffer:
        """Walks one trajectory for each of `lesson` [N] and sets the targets on it.

        Args:
            lesson: Indices into the lessons; repeated ones get different noise.
            generator: Source of noise and of random stops, on the CPU so that results do not depend on the device.
            spec: Shape of the trajectories, the recipe's own unless given.
            shape: Of one image's latents, the model's native one unless given.
        """
        spec = spec or self.spec
        device = self.base.model.device
        shape = shape or self.base.latent_shape()
        # Latents are float32 or better whatever the model's dtype: a walk adds up many small steps.
        dtype = torch.promote_types(self.base.model.dtype, torch.float32)
        parts: list[Points] = []
        for rows in lesson.split(spec.walk_batch):
            noise = torch.randn(len(rows), *shape, generator=generator).to(device, dtype)
            stop = int(torch.randint(spec.trajectory_steps, (), generator=generator)) if spec.points == "one" else None
            with self.adapter_disabled() if spec.x_t_from == "base" else nullcontext():
                visited = walk(
                    self.predict,
                    self.base.family.scheduler(self.base.pipe, spec.trajectory_steps, shape, device),
                    noise,
                    self.condition(rows),
                    pick(self.conditions, torch.zeros_like(rows)),
                    guidance=spec.guidance,
                    stop=stop,
                )
            for sample in visited if stop is None else visited[-1:]:
                target = self._target(rows, sample, by_teacher=spec.x_t_from == "base")
                parts.append(Points(sample.x_t, sample.t, rows, target))
        return TrajectoryBuffer(Points.join(parts))

    def _target(self, rows: Tensor, sample: NoisySample, by_teacher: bool) -> Tensor:
        """The objective at one batch of noisy latents; what guidance already computed is not computed again."""
        prompt, concept, anchor = self.places[rows].unbind(1)
        eta = self.eta[rows]
        wanted = torch.stack([torch.zeros_like(prompt), concept, anchor], 1)
        wanted[eta == 0] = anchor[eta == 0, None]  # the push has no weight: null and concept need no prediction
        count = int(self.places.max()) + 1
        row = torch.arange(len(rows), device=rows.device)[:, None]
        keys, inverse = torch.unique(row * count + wanted, return_inverse=True)
        row, place = keys // count, keys % count
        values = sample.x_t.new_empty(len(keys), *sample.x_t.shape[1:])
        missing = torch.ones_like(place, dtype=torch.bool)
        for answer, asked in ((sample.null, torch.zeros_like(place)), (sample.prompted, prompt[row])):
            if by_teacher and answer is not None:
                walked = place == asked
                values[walked] = answer[row[walked]]
                missing &= ~walked
        if missing.any():
            at, told = row[missing], pick(self.conditions, place[missing])
            with self.adapter_disabled():
                values[missing] = self.predict(sample.x_t[at], sample.t[at], told)
        strength = eta.view(-1, *[1] * (sample.x_t.dim() - 1)).to(values.dtype)
        return self.objective(Predictions(*values[inverse].unbind(1)), strength)
