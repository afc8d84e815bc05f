"""What is taught and who teaches it: lessons from a recipe, and the frozen base that sets the targets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.adapters import off
from esd_lora.bases import read_prompts
from esd_lora.errors import EsdLoraError
from esd_lora.families import Base
from esd_lora.objectives import OBJECTIVES, Predictions
from esd_lora.recipe import Concept, Neighbours, Recipe, TrainSpec
from esd_lora.trajectory import Condition, NoisySample, Points, TrajectoryBuffer, pick, walk


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


def plan(recipe: Recipe, keep: Sequence[str] = (), near: Sequence[str] = ()) -> list[Lesson]:
    """The lessons of a recipe, erased prompts first.

    Args:
        recipe: Its pools and its `preserve` list.
        keep: The base's keep list, used by `preserve: default`; prompts that name a concept are dropped from it.
        near: From `nearest`, preserved too.

    Raises:
        EsdLoraError: If there is nothing to erase, or the user's own preserve list names a concept that is to be erased.
    """
    lessons = [Lesson(*texts, recipe.eta) for concept in recipe.concepts for texts in concept.lessons()]
    if all(lesson.preserves for lesson in lessons):
        raise EsdLoraError("nothing to erase: with eta 0, every prompt is its own anchor. Raise eta or give another anchor.")
    erased = {lesson.prompt for lesson in lessons}
    listed = keep if recipe.preserve == "default" else recipe.preserve
    clashes = {prompt: concept.name for concept in recipe.concepts for prompt in listed if concept.named_in(prompt)}
    clashes |= {prompt: prompt for prompt in listed if prompt in erased}
    if clashes and recipe.preserve != "default":
        prompt, name = next(iter(clashes.items()))
        raise EsdLoraError(f"preserve holds {prompt!r}, which names {name!r}, a concept to erase. Take it out.")
    kept = [prompt for prompt in listed if prompt not in clashes] + [prompt for prompt in near if prompt not in erased]
    return lessons + [Lesson(prompt, prompt, prompt, 0.0) for prompt in dict.fromkeys(kept)]


@torch.no_grad()
def nearest(neighbours: Neighbours, concepts: Sequence[Concept], base: Base) -> list[str]:
    """Prompts of a vocabulary that the text encoder puts nearest to the concepts: what erasing them hurts first.

    Nearness is the cosine between the encoder's outputs, each less its output for the empty prompt. Prompts that name a
    concept are no neighbours of it.

    Raises:
        EsdLoraError: If the vocabulary's file cannot be read, or holds nothing else.
    """
    words = neighbours.vocabulary
    if isinstance(words, str):
        words = read_prompts(words)
    words = [word for word in dict.fromkeys(words) if not any(concept.named_in(word) for concept in concepts)]
    if not words:
        raise EsdLoraError("neighbours: the vocabulary holds no prompt that names no erased concept. Give a longer one.")
    asked = [concept.pairs()[0][0] for concept in concepts]
    encoded = base.encode(["", *asked, *words])["prompt_embeds"].float()
    directions = torch.nn.functional.normalize((encoded[1:] - encoded[:1]).flatten(1), dim=1)
    likeness = directions[: len(asked)] @ directions[len(asked) :].T
    order = likeness.argsort(dim=1, descending=True)[:, : neighbours.count]
    return [words[i] for i in dict.fromkeys(order.T.flatten().tolist())]


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

    def speaking(self) -> AbstractContextManager[None]:
        """Turns the adapter off, so that the denoiser is the teacher."""
        return off(self.base)

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
            with self.speaking() if spec.x_t_from == "base" else nullcontext():
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
            with self.speaking():
                values[missing] = self.predict(sample.x_t[at], sample.t[at], told)
        strength = eta.view(-1, *[1] * (sample.x_t.dim() - 1)).to(values.dtype)
        return self.objective(Predictions(*values[inverse].unbind(1)), strength)
