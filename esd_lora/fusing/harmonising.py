"""Harmonising a stack: a short distillation of what every member does alone into one update for all.

A sibling of `training.py` with other teachers. On member i's prompts the teacher is the base with eraser i alone, on prompts
to keep it is the base itself. The student is a fresh LoRA on the layers and of the rank that the whole needs, whatever those of
its members are: eight erasers that changed nothing but keys and values have no room beside each other there. Half of the kept
points carry words that mean nothing, so that what stands in no list is left alone too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esd_lora.adapter import adapter_disabled, add_adapter, applied, read_pairs, remove_adapter
from esd_lora.bars import Bar
from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import Distillation
from esd_lora.erasers.stacking import Strength, stack
from esd_lora.fuse_specs import HarmoniseSpec
from esd_lora.fusing.prompts import Members, gather_members
from esd_lora.guarding import Guard
from esd_lora.lessons import take_turns
from esd_lora.optimizers import make_optimizer
from esd_lora.progress import stage
from esd_lora.pseudo_words import PseudoWords
from esd_lora.recipe import LoraSpec
from esd_lora.recipe_files import load_harmonise_spec
from esd_lora.seeds import step_generator
from esd_lora.trajectory import (
    Condition,
    Points,
    TrajectoryBuffer,
    concatenate,
    latents_per_batch,
    pick,
    walk,
)


def harmonise(
    erasers: Sequence[Eraser],
    base: Base,
    *,
    weights: Sequence[float | Strength] | None = None,
    keep: Sequence[str] | None = None,
    spec: HarmoniseSpec | str | Path = "harmonise",
    progress: bool = True,
    **fields: Any,
) -> Eraser:
    """Distil erasers into one that does what each does on its own prompts, and nothing on others.

    Args:
        erasers: The members, in any order: each teaches what it does on its own prompts.
        base: The loaded base; it leaves as it came.
        weights: Strength of each member, 1 by default; at 0 it is dropped.
        keep: Prompts to leave alone, as in `fuse`.
        spec: How to harmonise: loaded, a built-in name, or a YAML file.
        progress: Whether to show a progress bar.
        **fields: Fields of `HarmoniseSpec`, over those of `spec`: `steps=200`.

    Returns:
        An eraser of the layers and the rank that `spec` says; its header has what a stack's has, and this.

    Raises:
        EsdLoraError: If the erasers do not fit each other or the base, every weight is 0, no prompt to keep is left, the scope
            matches no layer, or a field is out of range.
    """
    started, spec = time.monotonic(), load_harmonise_spec(spec, **fields)
    members = gather_members(erasers, base, weights, keep)
    taught, kept = walked_prompts(spec, members)
    run = _Distiller(base, spec, [*kept, *(prompt for prompts in taught for prompt in prompts)], kept)
    with stage("walking trajectories", (sum(map(len, taught)) + len(kept)) * spec.trajectory_steps, "point"):
        erasing = TrajectoryBuffer(Points.join([run.walk(*pair) for pair in zip(taught, members.erasers, strict=True)]))
        keeping = TrajectoryBuffer(run.walk(kept))
    header = stack(members.erasers).header
    shape = LoraSpec(rank=spec.rank, alpha=spec.rank)
    parameters = add_adapter(base, base.family.modules(base.model, spec.scope), shape, spec.seed)
    try:
        guard, steps = Guard(base, header.guard, base.encode), spec.steps * len(members.erasers)
        losses = run.distil(parameters, erasing, keeping, guard, steps, progress=progress)
        pairs = read_pairs(base.model)
    finally:
        remove_adapter(base)
    tenth = -(-len(losses) // 10)
    record = Distillation(
        **spec.model_dump(include={"scope", "rank", "keep_trajectories", "trajectory_steps", "guidance", "seed"}),
        **members.record(),
        steps=len(losses),
        trajectories=tuple(map(len, taught)),
        evaluations=run.evaluations,
        seconds=time.monotonic() - started,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
    )
    made = {"scope": spec.scope, "distillations": (*header.distillations, record)}
    return Eraser(pairs, header.model_copy(update=made))


def walked_prompts(spec: HarmoniseSpec, members: Members) -> tuple[list[list[str]], list[str]]:
    """Return the prompts of every trajectory, each member's and the kept ones: a large text encoder makes megabytes of each.

    Args:
        spec: How many there are.
        members: Have the prompts that take turns.
    """
    counts = [max(spec.trajectories, min(len(prompts), 3 * spec.trajectories)) for prompts in members.prompts]
    taught = [take_turns(prompts, count) for prompts, count in zip(members.prompts, counts, strict=True)]
    return taught, take_turns(members.kept, spec.keep_trajectories)


class _Distiller:
    """One run: the encoded prompts, the base's trajectories under them, and the student's steps.

    Args:
        base: The loaded base.
        spec: How to harmonise.
        prompts: All prompts of the run.
        kept: Those to keep among them.
    """

    def __init__(self, base: Base, spec: HarmoniseSpec, prompts: Sequence[str], kept: Sequence[str]):
        self.base, self.spec = base, spec
        self.evaluations = 0
        """Latents through the model so far, the student's included; a guided pair counts 2."""
        self._prompts = list(dict.fromkeys(["", *prompts]))
        self._conditions = base.encode(self._prompts)
        places = torch.tensor([self._prompts.index(prompt) for prompt in dict.fromkeys(kept)], device=base.model.device)
        texts = {name: value for name, value in pick(self._conditions, places).items() if name.endswith("embeds")}
        self._spread = {name: text - text.mean(0) for name, text in texts.items()}
        """How kept prompts differ from their mean, [prompts, ...]; with erased ones among them, what is to go would be held."""
        self._pseudo_words = PseudoWords(base, kept)
        self._noise = torch.Generator().manual_seed(spec.seed)

    def _predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.evaluations += len(x_t)
        return self.base.predict(x_t, t, condition)

    def walk(self, prompts: Sequence[str], teacher: Eraser | None = None) -> Points:
        """Return the points of the base's trajectories under prompts, with what the teacher predicts there.

        Args:
            prompts: One for each trajectory.
            teacher: An eraser that is on alone; the base itself unless given.
        """
        base, shape, device = self.base, self.base.latent_shape(), self.base.model.device
        size = latents_per_batch(shape)
        places = torch.tensor([self._prompts.index(prompt) for prompt in prompts], device=device)
        starts = torch.randn(len(prompts), *shape, generator=self._noise).to(device)
        parts: list[Points] = []
        for rows, start in zip(places.split(size), starts.split(size), strict=True):
            condition, null = pick(self._conditions, rows), pick(self._conditions, torch.zeros_like(rows))
            scheduler = base.family.scheduler(base.pipe, self.spec.trajectory_steps, shape, device)
            for x_t, t, _, prompted in walk(self._predict, scheduler, start, condition, null, guidance=self.spec.guidance):
                assert prompted is not None
                parts.append(Points(x_t, t, rows, prompted, x_t[:, :0]))
        if teacher is not None:
            with applied(base, [teacher]), torch.no_grad():
                parts = [part._replace(target=self._pushed(part)) for part in parts]
        return Points.join(parts)

    def _pushed(self, part: Points) -> Tensor:
        """Return the target from the base's prediction towards the teacher's, and beyond."""
        alone = self._predict(part.x_t, part.t, pick(self._conditions, part.lesson))
        return part.target + self.spec.push * (alone - part.target)

    def distil(
        self,
        parameters: list[torch.nn.Parameter],
        erasing: TrajectoryBuffer,
        keeping: TrajectoryBuffer,
        guard: Guard,
        steps: int,
        *,
        progress: bool,
    ) -> list[float]:
        """Train the adapter on both buffers, and return the loss of every step."""
        spec, base, device = self.spec, self.base, self.base.model.device
        optimizer = make_optimizer("adam", parameters, spec.lr, {})
        scaler = torch.amp.GradScaler(enabled=base.model.dtype == torch.float16, device=device.type)
        half, losses = spec.batch_size // 2, list[float]()
        for step in Bar(range(steps), desc="harmonising", unit="step", disable=not progress):
            generator = step_generator(spec.seed, step)
            erased, kept = erasing.sample(spec.batch_size, generator), keeping.sample(spec.batch_size, generator)
            shaken = self._shaken(kept.lesson[:half], generator)
            with torch.no_grad(), adapter_disabled(base):
                kept.target[:half] = self._predict(kept.x_t[:half], kept.t[:half], shaken)
            condition = concatenate(pick(self._conditions, erased.lesson), shaken, pick(self._conditions, kept.lesson[half:]))
            points = Points.join([erased, kept])
            optimizer.zero_grad()
            losses.append(0.0)
            for rows in torch.arange(len(points.t), device=device).split(latents_per_batch(base.latent_shape())):
                prediction = self._predict(points.x_t[rows], points.t[rows], pick(condition, rows))
                loss = (prediction - points.target[rows]).square().mean() * len(rows) / len(points.t)
                scaler.scale(loss).backward()
                losses[-1] += loss.item()
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * (1 - step / steps)
            scaler.step(optimizer)
            scaler.update()
            guard.hold()
        return losses

    def _shaken(self, places: Tensor, generator: torch.Generator) -> Condition:
        """Return the condition of prompts, each with a pseudo-word in it and noise on its text.

        The noise is a random mixture of how the kept prompts differ from each other.

        Args:
            places: [N], indices of the prompts.
            generator: Source of words and noise, on the CPU.
        """
        shaken = self._pseudo_words.encode([self._prompts[i] for i in places.tolist()], generator)
        count = len(next(iter(self._spread.values())))
        mix = self.spec.shake * torch.randn(len(places), count, generator=generator) / count**0.5
        for name, differences in self._spread.items():
            shaken[name] += torch.tensordot(mix.to(differences), differences, 1)
        return shaken
