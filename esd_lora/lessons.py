"""What is taught and who teaches it: lessons from a recipe, and the frozen base that sets the targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.errors import EsdLoraError
from esd_lora.families import Base
from esd_lora.objectives import OBJECTIVES, Predictions
from esd_lora.recipe import Recipe, TrainSpec
from esd_lora.trajectory import Condition, NoisySample, Points, TrajectoryBuffer, pick, walk

_WALK_BATCH = 32  # trajectories walked side by side; bounds memory, changes no result


class Lesson(NamedTuple):
    """One prompt of the student and the rule for its target.

    A preserved prompt is the lesson whose anchor is the prompt itself and whose eta is 0: its target is what the teacher
    says anyway.
    """

    prompt: str
    """What the student reads, and what `x_t` is drawn under."""
    concept: str
    """What is pushed away."""
    anchor: str
    """What should appear instead."""
    eta: float

    @property
    def preserves(self) -> bool:
        return self.eta == 0 and self.anchor == self.prompt


def plan(recipe: Recipe, keep: Sequence[str] = ()) -> list[Lesson]:
    """The lessons of a recipe, erased prompts first.

    Args:
        recipe: Its pools, and its `preserve` list.
        keep: The base's keep list, used by `preserve: default`; prompts that name a concept are dropped from it.

    Raises:
        EsdLoraError: If the user's own preserve list names a concept that is to be erased.
    """
    lessons: list[Lesson] = []
    for concept in recipe.concepts:
        for prompt, anchor in concept.pairs():
            lessons.append(Lesson(concept.erase_from or prompt, prompt, anchor, recipe.eta))
    if all(lesson.preserves for lesson in lessons):
        raise EsdLoraError("nothing to erase: with eta 0, every prompt is its own anchor. Raise eta or give another anchor.")
    preserve = tuple(keep) if recipe.preserve == "default" else recipe.preserve
    clashes = {prompt: concept.name for concept in recipe.concepts for prompt in preserve if concept.named_in(prompt)}
    if clashes and recipe.preserve != "default":
        prompt, name = next(iter(clashes.items()))
        raise EsdLoraError(f"preserve holds {prompt!r}, which names {name!r}, a concept to erase. Take it out.")
    return lessons + [Lesson(prompt, prompt, prompt, 0.0) for prompt in preserve if prompt not in clashes]


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
        self.conditions = base.encode(list(prompts))
        self.places = torch.tensor([[places[text] for text in lesson[:3]] for lesson in lessons], device=base.model.device)
        self.eta = torch.tensor([lesson.eta for lesson in lessons], device=base.model.device)
        self.scheduler = base.family.scheduler(base.pipe)
        self.evaluations = 0
        """Latents through the denoiser without gradients so far; a guided pair counts 2."""

    def condition(self, lesson: Tensor) -> Condition:
        """What the student is told in each of `lesson` [N]."""
        return pick(self.conditions, self.places[lesson, 0])

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser as it stands, without gradients, counted."""
        self.evaluations += len(x_t)
        with torch.no_grad():
            return self.base.predict(x_t, t, condition)

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Turns the adapter off, so that the denoiser is the teacher."""
        self.base.model.disable_adapters()
        try:
            yield
        finally:
            self.base.model.enable_adapters()

    def fill(self, lesson: Tensor, generator: torch.Generator, spec: TrainSpec | None = None) -> TrajectoryBuffer:
        """Walks one trajectory for each of `lesson` [N] and sets the targets on it.

        Args:
            lesson: Indices into the lessons; repeated ones get different noise.
            generator: Source of noise and of random stops, on the CPU so that results do not depend on the device.
            spec: Shape of the trajectories, the recipe's own unless given.
        """
        spec = spec or self.spec
        device = self.base.model.device
        shape = self.base.family.latent_shape(self.base.pipe)
        parts: list[Points] = []
        for rows in lesson.split(_WALK_BATCH):
            noise = torch.randn(len(rows), *shape, generator=generator).to(device, self.base.model.dtype)
            stop = int(torch.randint(spec.trajectory_steps, (), generator=generator)) if spec.points == "one" else None
            with self.speaking() if spec.x_t_from == "base" else nullcontext():
                visited = walk(
                    self.predict,
                    self.scheduler,
                    noise,
                    self.condition(rows),
                    pick(self.conditions, torch.zeros_like(rows)),
                    steps=spec.trajectory_steps,
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
        if by_teacher and sample.null is not None and sample.prompted is not None:
            values[place == 0] = sample.null[row[place == 0]]
            walked = place == prompt[row]
            values[walked] = sample.prompted[row[walked]]
            missing = (place != 0) & ~walked
        if missing.any():
            at, told = row[missing], pick(self.conditions, place[missing])
            with self.speaking():
                values[missing] = self.predict(sample.x_t[at], sample.t[at], told)
        strength = eta.view(-1, *[1] * (sample.x_t.dim() - 1)).to(values.dtype)
        return self.objective(Predictions(*values[inverse].unbind(1)), strength)
