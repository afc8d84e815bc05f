"""The teacher: the frozen base, which sets the targets, and the buffers of points that it fills.

Read `Teacher.targets` beside equation 5 of the paper (Gandikota et al., ICCV 2023, arXiv:2303.07345). The base and the student
are one network; the teacher is that network with the LoRA switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.adapter import adapter_disabled
from esd_lora.bases.base import Base
from esd_lora.errors import EsdLoraError
from esd_lora.from_pictures import Pictured
from esd_lora.lessons import Lesson
from esd_lora.noising import noised_trajectory
from esd_lora.objectives import LOSSES, Predictions, find_objective, mean_square
from esd_lora.prediction_cache import PredictionCache, network_key, prediction_key
from esd_lora.progress import stage
from esd_lora.ranks import gather, share
from esd_lora.recipe import AUTO, Recipe, TrainSpec
from esd_lora.seeds import Stream, stream_generator
from esd_lora.trajectory import Condition, Encode, NoisySample, Points, TrajectoryBuffer, move, pick, walk

NULL = 0
"""Number of the empty prompt."""


class Teacher:
    """The base with its adapter off: walks trajectories and sets the student's targets on them.

    Args:
        base: The loaded base; its denoiser may carry an adapter, which is off whenever the teacher predicts.
        recipe: Gives the objective and the shape of the trajectories.
        lessons: From `lessons.plan`.
        allow_code: Every `module:attribute` that may be imported for its objective.
        probed: Further prompts to know the conditions of, for a probe.
        encode: From prompts to their condition; the base's own `encode` unless given.
        cache: Of predictions of earlier trainings; without one all are made.
        pictured: Pictures of what some of the lessons erase.

    Raises:
        EsdLoraError: If the objective is not allowed, or is none.
    """

    def __init__(
        self,
        base: Base,
        recipe: Recipe,
        lessons: Sequence[Lesson],
        allow_code: Collection[str] = (),
        probed: Sequence[str] = (),
        encode: Encode | None = None,
        cache: PredictionCache | None = None,
        pictured: Sequence[Pictured] = (),
    ):
        self.base, self.recipe, self.spec, self.lessons = base, recipe, recipe.train, lessons
        self.objective = find_objective(recipe.objective, allow_code)
        self.loss = LOSSES.get(recipe.objective, mean_square)
        device = base.device
        self._prompts = list(dict.fromkeys(["", *(text for lesson in lessons for text in lesson[:3]), *probed]))
        self._numbers = {prompt: number for number, prompt in enumerate(self._prompts)}
        self._conditions = (encode or base.remembering(self.spec.distilled_guidance))(self._prompts)
        numbers = [[self._numbers[text] for text in lesson[:3]] for lesson in lessons]
        self._prompt, self._concept, self._anchor = torch.tensor([*numbers, [NULL] * 3], device=device).unbind(1)
        self.erased = [index for index, lesson in enumerate(lessons) if not lesson.preserves]
        """Indices of the lessons that erase, in turn."""
        self.preserved = [index for index, lesson in enumerate(lessons) if lesson.preserves for _ in range(lesson.turns)]
        """Indices of the others, in turn; those near the concept stand there more than once."""
        self.null_lesson = len(lessons)
        """Index that stands for the empty prompt, held as it is; no lesson has it."""
        self._eta = torch.tensor([*(lesson.eta for lesson in lessons), 0.0], device=device)
        self._erases = torch.tensor([*(not lesson.preserves for lesson in lessons), False], device=device)
        self.pictured = pictured
        """What pictures of the concepts came to."""
        self._pictured = [next((each for each in pictured if each.shows(lesson.concept)), None) for lesson in lessons]
        self.evaluations = 0
        """Number of latents through the denoiser without gradients so far, on all ranks; a guided pair counts 2."""
        self._cache, self._teaches = cache, False
        self._network = network_key(base.own_weights(), {**base.model.config, "held in": base.held_in}) if cache else b""

    def targets(self, lesson: Tensor, sample: NoisySample, *, walked_by_base: bool) -> Tensor:
        """Return what the student should predict at noisy latents, [N, ...].

            target = objective(null, concept, anchor)       with `esd`: anchor - eta * (concept - null)

        Args:
            lesson: Index of each point's lesson, [N].
            sample: The noisy latents, with what guidance predicted there.
            walked_by_base: Whether those predictions are the teacher's own, so that none is made twice.
        """
        return self.aim(lesson, self._predictions(lesson, sample, walked_by_base=walked_by_base))

    def _predictions(self, lesson: Tensor, sample: NoisySample, *, walked_by_base: bool) -> Predictions:
        eta = self._eta[lesson]
        # Where the push has no weight (preserved prompts, anchors to arrive at), null and concept need no prediction.
        null = torch.where(eta == 0, self._anchor[lesson], NULL)
        concept = torch.where(eta == 0, self._anchor[lesson], self._concept[lesson])
        anchor = self._anchor[lesson]

        known: list[tuple[Tensor, Tensor | None]] = []
        if walked_by_base:
            known = [(torch.full_like(lesson, NULL), sample.null), (self._prompt[lesson], sample.prompted)]

        def predict(row: Tensor, prompt: Tensor) -> Tensor:
            with self.adapter_disabled():
                return self.predict(sample.x_t[row], sample.t[row], self._condition(prompt))

        return Predictions(*predict_each_once(torch.stack([null, concept, anchor], 1), known, predict, sample.x_t).unbind(1))

    def aim(self, lesson: Tensor, predictions: Predictions, further: float = 0.0) -> Tensor:
        """Return the objective's target of the teacher's predictions, [N, ...].

        Args:
            lesson: Index of each point's lesson, [N].
            predictions: For the empty prompt, the concept and the anchor, each [N, ...].
            further: What is added to the eta of a lesson that erases.
        """
        like = predictions.anchor
        eta = self._eta[lesson] + further * self._erases[lesson]
        target: object = self.objective(predictions, eta.view(-1, *[1] * (like.dim() - 1)).to(like.dtype))
        if not isinstance(target, Tensor) or target.shape != like.shape:
            made = f"shape {list(target.shape)}" if isinstance(target, Tensor) else f"type {type(target).__name__}"
            raise EsdLoraError(
                f"objective {self.recipe.objective!r} returned a target of {made}, expected a tensor of the predictions' shape"
                f" {list(like.shape)}."
            )
        return target

    def push(self, eta: float, buffers: Collection[ReplayBuffers] = ()) -> None:
        """Push every lesson that erases by another eta from now on, and move the targets of erased points to it.

        Args:
            eta: The new one.
            buffers: Filled where the recipe leaves eta to be measured; no prediction is made again.
        """
        more = eta - float(self._eta[self.erased[0]])
        self._eta[self.erased] = eta
        for buffer in buffers:
            points, push = buffer.erasing.points, buffer.erasing.push
            assert push is not None, "filled with a fixed eta"
            buffer.erasing.points = points._replace(target=points.target + more * push)

    def walk(self, lesson: Tensor, shape: Sequence[int], generator: torch.Generator, spec: TrainSpec) -> list[NoisySample]:
        """Return points on one trajectory for each lesson, walked under its prompt by the base or the student.

        Args:
            lesson: Indices into the lessons, [N].
            shape: Of one image's latents.
            generator: Source of noise and of the random stop.
            spec: Shape of the trajectories.
        """
        return self._walk(self._prompt[lesson], shape, generator, spec)

    def walk_prompts(
        self, prompts: Sequence[str], shape: Sequence[int], generator: torch.Generator, spec: TrainSpec
    ) -> list[NoisySample]:
        """Return points on one trajectory for each prompt, as `walk` does for lessons; the prompts are those of a probe."""
        return self._walk(self._number(prompts), shape, generator, spec)

    @torch.no_grad()
    def _walk(self, numbers: Tensor, shape: Sequence[int], generator: torch.Generator, spec: TrainSpec) -> list[NoisySample]:
        count, device = len(numbers), self.base.model.device
        # Latents are float32 or better whatever the model's dtype: a walk adds up many small steps.
        dtype = torch.promote_types(self.base.model.dtype, torch.float32)
        noise = torch.randn(count, *shape, generator=generator).to(device, dtype)
        stop = int(torch.randint(spec.trajectory_steps, (), generator=generator)) if spec.points == "one" else None
        with nullcontext() if spec.x_t_from == "student" else self.adapter_disabled():
            visited = walk(
                self.predict,
                self.base.family.scheduler(self.base.pipe, spec.trajectory_steps, shape, device),
                noise,
                self._condition(numbers),
                self._condition(torch.full_like(numbers, NULL)),
                guidance=spec.guidance,
                stop=stop,
            )
        return visited if stop is None else visited[-1:]

    def show(self, lesson: Tensor, shape: Sequence[int], generator: torch.Generator, spec: TrainSpec) -> list[NoisySample]:
        """Return points as `walk` does, of pictures of what each lesson erases, noised to the times of a trajectory."""
        latents: list[Tensor] = []
        for number in lesson.tolist():
            pictured = self._pictured[number]
            assert pictured is not None, "chosen among those that have pictures"
            own = pictured.latents_of(self.lessons[number].concept, shape)
            latents.append(own[int(torch.randint(len(own), (), generator=generator))])
        stop = int(torch.randint(spec.trajectory_steps, (), generator=generator)) if spec.points == "one" else None
        visited = noised_trajectory(self.base, torch.stack(latents), spec.trajectory_steps, generator)
        return visited if stop is None else visited[stop : stop + 1]

    def _by_pictures(self, lesson: Tensor) -> Tensor:
        """Return which of N trajectories are of noised pictures instead of walked: the recipe's share, evenly, [N]."""
        spec = self.recipe.pictures
        share = spec.share if spec else 0.0
        turns = [int((i + 1) * share) > int(i * share) for i in range(len(lesson))]
        pairs = zip(lesson.tolist(), turns, strict=True)
        return torch.tensor([turn and self._pictured[number] is not None for number, turn in pairs], dtype=torch.bool)

    def fill(
        self,
        lesson: Tensor,
        generator: torch.Generator,
        spec: TrainSpec | None = None,
        shape: Sequence[int] | None = None,
    ) -> Filled:
        """Walk one trajectory for each of `lesson` [N], or noise a picture of it to the same times, and set the targets on it.

        Args:
            lesson: Indices into the lessons; repeated ones get different noise.
            generator: Source of noise and of random stops, on the CPU so that results do not depend on the device.
            spec: Shape of the trajectories, the recipe's own unless given.
            shape: Of one image's or video's latents, the model's native one unless given.
        """
        spec, shape = spec or self.spec, shape or self.base.latent_shape()
        by_base = spec.x_t_from != "student"
        taught: list[Points] = []
        held: list[Points] = []
        pushes: list[Tensor] = []
        shown = self._by_pictures(lesson).to(lesson.device)
        for chosen, visit, by_walker in ((lesson[~shown], self.walk, by_base), (lesson[shown], self.show, False)):
            for part in chosen.split(spec.walk_batch) if len(chosen) else ():
                for sample in visit(part, shape, generator, spec):
                    predictions = self._predictions(part, sample, walked_by_base=by_walker)
                    target = self.aim(part, predictions)
                    taught.append(Points(sample.x_t, sample.t, part, target, self._shunned(predictions.concept)))
                    if self.recipe.eta == AUTO:
                        pushes.append(self.aim(part, predictions, further=1.0) - target)
                    if spec.null_batch:
                        held.append(self._held_null(sample, walked_by_base=by_walker))
        return Filled(TrajectoryBuffer(Points.join(taught), torch.cat(pushes) if pushes else None), held)

    def _held_null(self, sample: NoisySample, *, walked_by_base: bool) -> Points:
        """Return the points of a sample for the empty prompt, whose prediction is to stay what it is."""
        lesson = torch.full((len(sample.t),), self.null_lesson, device=sample.t.device)
        target = sample.null if walked_by_base else None
        if target is None:
            with self.adapter_disabled():
                target = self.predict(sample.x_t, sample.t, self.condition(lesson))
        return Points(sample.x_t, sample.t, lesson, target, self._shunned(target))

    def _shunned(self, concept: Tensor) -> Tensor:
        """Return the concept's predictions where the loss drives from them, and nothing of them where it does not."""
        return concept[:, :0] if self.loss is mean_square else concept

    def losses(self, prediction: Tensor, points: Points) -> Tensor:
        """Return the student's loss at each point, [N].

        Args:
            prediction: Of the student, [N, ...].
            points: From a buffer of this teacher's.
        """
        return self.loss(prediction, points.target, points.concept, self._eta[points.lesson])

    def condition(self, lesson: Tensor) -> Condition:
        """Return what the student reads in each of `lesson` [N]; with a gradient, where the adapter lies on text encoders."""
        return self._condition(self._prompt[lesson])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of prompts that occur in the lessons, for which no text encoder is needed any more.

        Unless the adapter lies on the text encoders: then it is the base's with the adapter off, and the student's with it on.
        """
        return self._condition(self._number(prompts))

    def _number(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self._numbers[prompt] for prompt in prompts], device=self._prompt.device)

    def _condition(self, numbers: Tensor) -> Condition:
        """Return the condition of prompts by their numbers [N], where the denoiser is."""
        if self.recipe.adapts_text and not self._teaches:
            once, places = numbers.unique(return_inverse=True)
            return pick(
                self.base.encode_with_gradient([self._prompts[i] for i in once.tolist()], self.spec.distilled_guidance), places
            )
        home = self._conditions["prompt_embeds"].device  # the CPU where all of them take much room
        return move(pick(self._conditions, numbers.to(home)), numbers.device)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, *, shared: bool = True) -> Tensor:
        """Return the prediction of the denoiser as it stands, without gradients, and count it.

        No more latents are sent at once than a guided walk sends. What the teacher predicted in an earlier training, if there
        is a cache, is neither made nor counted.

        Args:
            x_t: [N, ...].
            t: [N].
            condition: Of N prompts.
            shared: Whether each rank, if there are several, makes its share of the rows; else each makes all of them.
        """
        if self._cache and self._teaches:
            key = prediction_key(self._network, {"x_t": x_t, "t": t, **condition})
            return self._cache.find(key, lambda: self._predict(x_t, t, condition, shared)).to(x_t.device)
        return self._predict(x_t, t, condition, shared)

    def _predict(self, x_t: Tensor, t: Tensor, condition: Condition, shared: bool) -> Tensor:
        total = len(x_t)
        self.evaluations += total
        if shared:
            x_t, t, condition = share(x_t), share(t), {name: share(value) for name, value in condition.items()}
        with torch.inference_mode():
            parts = [self.base.predict(x_t[rows], t[rows], pick(condition, rows)) for rows in self._batches(len(x_t))]
        prediction = parts[0] if len(parts) == 1 else torch.cat([x_t[:0], *parts])  # none in a rank without rows
        return gather(prediction, total) if shared else prediction

    def _batches(self, count: int) -> list[slice]:
        size = 2 * self.spec.walk_batch
        return [slice(first, first + size) for first in range(0, count, size)]

    @contextmanager
    def adapter_disabled(self) -> Generator[None]:
        """Turn the adapter off for the length of a `with` block, so that the denoiser is the teacher."""
        with adapter_disabled(self.base):
            self._teaches = True
            try:
                yield
            finally:
                self._teaches = False


def predict_each_once(
    prompts: Tensor,
    known: Sequence[tuple[Tensor, Tensor | None]],
    predict: Callable[[Tensor, Tensor], Tensor],
    like: Tensor,
) -> Tensor:
    """Return the predictions for K prompts at each of N noisy latents, [N, K, ...], and make none of them twice.

    Args:
        prompts: Numbers of the prompts wanted at each of the latents, [N, K].
        known: Numbers of prompts [N] with the predictions for them [N, ...] that are there already, if they are.
        predict: From latents [M] and prompt numbers [M] to the predictions [M, ...] that are missing, in one batch.
        like: The latents [N, ...], of whose shape and dtype a prediction is.
    """
    count = int(prompts.max()) + 1
    latent = torch.arange(len(prompts), device=prompts.device)[:, None]
    pairs, inverse = torch.unique(latent * count + prompts, return_inverse=True)
    latent, prompt = pairs // count, pairs % count
    predictions = like.new_empty(len(pairs), *like.shape[1:])
    missing = torch.ones_like(prompt, dtype=torch.bool)
    for numbers, values in known:
        if values is not None:
            same = prompt == numbers[latent]
            predictions[same] = values[latent[same]]
            missing &= ~same
    if missing.any():
        predictions[missing] = predict(latent[missing], prompt[missing])
    return predictions[inverse]


class Filled(NamedTuple):
    """What a teacher's walks gave."""

    taught: TrajectoryBuffer
    """Points of the walked lessons."""
    null: list[Points]
    """The same places for the empty prompt, in groups, if the recipe holds its prediction."""


class ReplayBuffers(NamedTuple):
    """Points of erased and of preserved prompts, and of the empty one, of one shape of latents."""

    erasing: TrajectoryBuffer
    preserving: TrajectoryBuffer | None
    null: TrajectoryBuffer | None

    def batches(self, spec: TrainSpec, generator: torch.Generator) -> Iterator[Points]:
        """Yield the batches of one optimiser step, each of erased points, then preserved ones, then the empty prompt's."""
        sizes = (spec.batch_size, spec.preserve_batch, spec.null_batch)
        parts = [
            buffer.sample(size * spec.accumulate, generator).split(size)
            for buffer, size in zip(self, sizes, strict=True)
            if buffer is not None
        ]
        return (Points.join(batch) for batch in zip(*parts, strict=True))


def refill(teacher: Teacher, step: int, shapes: Sequence[tuple[int, ...]]) -> dict[int, ReplayBuffers]:
    """Walk new trajectories: `spec.trajectories` of erased prompts and `spec.preserve_trajectories` of preserved ones.

    Args:
        teacher: Walks, and knows the lessons.
        step: The first one to be trained on these points.
        shapes: From `latent_shapes`. Step s trains on number `s % len(shapes)`; those whose turn comes before the next
            refill share the trajectories.
    """
    spec = teacher.spec
    refills, sharing = step // spec.walk_every, min(len(shapes), spec.walk_every)
    few = spec.model_copy(update={"trajectory_steps": spec.preserve_steps or spec.trajectory_steps})

    def fill(lessons: list[int], trajectories: int, turn: int, noise: torch.Generator, spec: TrainSpec) -> Filled:
        count = -(-trajectories // sharing)
        lesson = in_turn(lessons, (refills * sharing + turn) * count, count, spec.seed)
        return teacher.fill(lesson.to(teacher.base.model.device), noise, spec, shapes[(step + turn) % len(shapes)])

    buffers: dict[int, ReplayBuffers] = {}
    preserves = bool(teacher.preserved and spec.preserve_batch and spec.preserve_trajectories)
    points = -(-spec.trajectories // sharing) * spec.trajectory_steps
    points += preserves * -(-spec.preserve_trajectories // sharing) * few.trajectory_steps
    with stage("walking trajectories", sharing * points, "point"):
        for turn in range(sharing):
            noise = stream_generator(spec.seed, Stream.NOISE, refills, *[turn] * (sharing > 1))
            (erasing, null), preserving = fill(teacher.erased, spec.trajectories, turn, noise, spec), None
            if preserves:
                preserving, more = fill(teacher.preserved, spec.preserve_trajectories, turn, noise, few)
                null += more
            held = TrajectoryBuffer(Points.join(null)) if null else None
            buffers[(step + turn) % len(shapes)] = ReplayBuffers(erasing, preserving, held)
    return buffers


def preserved_walks(spec: TrainSpec, shapes: int) -> int:
    """Return how many trajectories of preserved prompts a whole training walks, at most.

    Args:
        spec: How it trains.
        shapes: Number of shapes of latents.
    """
    if not spec.preserve_batch:
        return 0
    refills, sharing = -(-spec.most_steps // spec.walk_every), min(shapes, spec.walk_every)
    return refills * sharing * -(-spec.preserve_trajectories // sharing)


def walked_so_far(teacher: Teacher, step: int, shapes: int) -> set[int]:
    """Return the indices of preserved lessons that were walked in the first `step` steps; see `preserved_walks`."""
    if not teacher.preserved:
        return set()
    walks = preserved_walks(teacher.spec.model_copy(update={"steps": max(step, 1)}), shapes)
    return set(in_turn(teacher.preserved, 0, walks, teacher.spec.seed).tolist())


def in_turn(lessons: Sequence[int], first: int, count: int, seed: int) -> Tensor:
    """Return the `count` lessons whose turn it is, [count], where they take turns in a shuffled order, over and over.

    Args:
        lessons: Indices that take turns.
        first: Number of turns that were taken before.
        count: Number of turns to take.
        seed: Of the order.
    """
    order = torch.tensor(lessons)[torch.randperm(len(lessons), generator=stream_generator(seed, Stream.ORDER, 0))]
    return order[(first + torch.arange(count)) % len(lessons)]


def latent_shapes(base: Base, spec: TrainSpec) -> list[tuple[int, ...]]:
    """Return the shapes of latents to train on, one for each aspect bucket, all of about the same area.

    Raises:
        EsdLoraError: If the base makes no video of so many frames.
    """
    if not spec.aspects:
        return [base.latent_shape((spec.resolution, spec.resolution) if spec.resolution else None, spec.video_frames)]
    width, height = base.picture_size()
    side = spec.resolution or (width * height) ** 0.5
    ratios = [int(width) / int(height) for width, height in (aspect.split(":") for aspect in spec.aspects)]
    sizes = [(round(side / r**0.5), round(side * r**0.5)) for r in ratios]
    return list(dict.fromkeys(base.latent_shape(size, spec.video_frames) for size in sizes))
