"""What a run will take, before it begins: its work is counted, and a little of each kind is timed on the model at hand.

A training is rehearsed: everything around the denoiser and the text encoders runs as it will (anchors are chosen, lessons
planned, layers solved, trajectories counted), on texts that are made up and predictions that are zeros. Then one batch of
texts, of trajectories, one optimiser step and one picture are made for real, which says how long each takes and how much memory
all of it needs. Where a recipe leaves the number of steps to its probe, there is a least and a most.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.adapter import adapter_ranks, add_adapter, read_pairs
from esd_lora.bases.base import Base
from esd_lora.calibration import TRIES, Probe, last_step, prepare_rate
from esd_lora.closed_form import solve_text
from esd_lora.evaluation.preparing import PreparedEvaluation
from esd_lora.evaluation.scoring import score_missing
from esd_lora.optimizers import make_optimizer
from esd_lora.pictures import paint, pictures_at_once, png
from esd_lora.recipe import AUTO, Recipe, TrainSpec, require_allowed
from esd_lora.teacher import Teacher, latent_shapes, refill
from esd_lora.training import Prepared, prepare_prompts
from esd_lora.trajectory import Condition, pick
from esd_lora.watching import ErasureProbe, shown_prompts

_TEXTS = 16  # that are encoded to see how long one takes
_REPEATS = 3
_ENOUGH = 2.0  # seconds of one kind of work, and a quarter of that is too little
_SCORED = 16  # pictures that detectors are timed on
_LENGTHS = (2, 4)  # steps of pictures that are timed
_WALKS = 64  # that are counted; each may stop early
_NOISE = 1e-2  # of made-up texts, so that no two are the same
_GIB = 2**30


class Work(NamedTuple):
    """What there is to do."""

    texts: int = 0
    """Prompts to encode."""
    evaluations: int = 0
    """Latents through the denoiser without gradients."""
    student_samples: int = 0
    """Latents through the student with gradients."""
    pictures: int = 0
    """Pictures to decode; their denoising counts as evaluations."""

    def plus(self, other: Work) -> Work:
        """Return both together."""
        return Work(*map(sum, zip(self, other, strict=True)))


class Pace(NamedTuple):
    """Seconds that one of each takes on this machine and model."""

    text: float = 0.0
    evaluation: float = 0.0
    student_sample: float = 0.0
    picture: float = 0.0

    def seconds(self, work: Work) -> float:
        """Return how long some work takes."""
        return sum(each * count for each, count in zip(self, work, strict=True))


class Estimate(NamedTuple):
    """What a run will take beside loading the base."""

    least: Work
    most: Work
    """Other than `least` only where the number of steps is left to a probe."""
    pace: Pace
    around: float
    """Seconds of what is neither encoding, nor denoising, nor decoding: layers solved in closed form, pictures scored."""
    memory: int | None
    """Bytes that the process (or the card) holds at most; `None` where the system does not tell."""
    eraser: int = 0
    """Bytes of the eraser's weights."""

    def seconds(self) -> tuple[float, float]:
        """Return how long the run takes at least and at most."""
        return self.around + self.pace.seconds(self.least), self.around + self.pace.seconds(self.most)

    def lines(self) -> list[str]:
        """Return the estimate as lines of text, a row for each kind of work."""
        names = ("texts to encode", "evaluations", "student samples", "pictures to decode")
        lines: list[str] = []
        for name, least, most, each in zip(names, self.least, self.most, self.pace, strict=True):
            if most:
                lines.append(f"{name:<20}{_span(least, most, ','):>18}   {_span(least * each, most * each, ',.1f')} s")
        if self.around:
            lines.append(f"{'all else':<20}{'':>18}   {self.around:,.1f} s")
        lines.append(f"{'in all':<20}{'':>18}   {_span(*self.seconds(), ',.1f')} s, beside loading the base")
        lines.append(f"{'memory':<20}{'':>18}   {f'{self.memory / _GIB:,.2f} GiB at most' if self.memory else 'not told here'}")
        if self.eraser:
            lines.append(f"{'eraser':<20}{'':>18}   {self.eraser / 1e6:,.2f} MB")
        return lines


def _span(least: float, most: float, form: str) -> str:
    low, high = format(least, form), format(most, form)
    return high if low == high else f"{low} to {high}"


class _Rehearsed(Base):
    """A base whose texts are made up and whose denoiser predicts zeros: nothing is waited for."""

    texts = 0
    """Prompts that were asked for so far."""
    known: Condition
    """The condition of one prompt."""

    def encode(self, prompts: Sequence[str], guidance: float = 1.0) -> Condition:  # noqa: ARG002
        """Return as many made-up conditions as there are prompts."""
        self.texts += len(prompts)
        generator = torch.Generator().manual_seed(self.texts)
        made = {name: value.expand(len(prompts), *value.shape[1:]).clone() for name, value in self.known.items()}
        for name, value in made.items():
            if name.endswith("embeds"):
                value += _NOISE * float(value.std()) * torch.randn(value.shape, generator=generator).to(value)
        return made

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002
        """Return zeros."""
        return torch.zeros_like(x_t, dtype=torch.promote_types(x_t.dtype, torch.float32))


def estimate_training(recipe: Recipe, base: Base, *, written: bool = True, allow_code: Collection[str] = ()) -> Estimate:
    """Return what training a recipe will take.

    Args:
        recipe: What to train.
        base: The loaded base, with its text encoders; it leaves as it came.
        written: Whether the eraser goes into a directory, with pictures.
        allow_code: As `train` takes it.

    Raises:
        EsdLoraError: As `train` does where the recipe and the base do not fit each other.
    """
    require_allowed(recipe, allow_code)
    base.require_bare()
    rehearsed = _Rehearsed(**vars(base))
    rehearsed.known = base.encode(["a photograph"], recipe.train.distilled_guidance)
    started = time.monotonic()
    prepared = prepare_prompts(rehearsed, recipe, allow_code)
    teacher, spec = prepared.teacher, prepared.teacher.spec
    parameters = add_adapter(base, base.family.modules(base.model, recipe.scope), recipe.lora, spec.seed)
    try:
        if form := recipe.closed_form:
            ranks = adapter_ranks(base)
            solve_text(rehearsed, teacher.encode, prepared.planned, ranks, form, prepared.guard, prepared.unlisted)
        around = time.monotonic() - started
        shown = len(shown_prompts(teacher)) if written and spec.preview_every else 0
        least, most = (Work(rehearsed.texts).plus(part) for part in _counted(prepared, shown))
        pace = _measure_training(base, teacher, parameters, shown)
        memory = peak_memory(base)
        eraser = sum(4 * (pair.down.numel() + pair.up.numel()) for pair in read_pairs(base.model).values())
        held = _held(teacher, rehearsed.texts)
    finally:
        base.model.unload_lora()
    return Estimate(least, most, pace, around, memory and memory + held, eraser)


def estimate_pictures(base: Base, pictures: int, *, steps: int | None = None, guidance: float | None = None) -> Estimate:
    """Return what painting takes.

    Args:
        base: The loaded base.
        pictures: Number of pictures.
        steps: Denoising steps; the base's default unless given.
        guidance: Classifier-free guidance scale; the base's default unless given.
    """
    guided = 1 + ((base.guidance if guidance is None else guidance) > 1)
    work = Work(texts=pictures * guided, evaluations=pictures * guided * (steps or base.steps), pictures=pictures)
    return Estimate(work, work, _measure_painting(base, min(pictures, pictures_at_once(base))), 0.0, peak_memory(base))


def estimate_evaluation(prepared: PreparedEvaluation, allow_code: Collection[str] = ()) -> Estimate:
    """Return what an evaluation takes, but for what attacks search for beforehand and distances between sets of pictures.

    Args:
        prepared: From `prepare_evaluation`.
        allow_code: As `evaluate` takes it.
    """
    cases = prepared.plan.cases
    pictures = sum(case.role in variant.roles for variant in prepared.variants for case in cases)
    painting = estimate_pictures(prepared.base, pictures, steps=prepared.steps, guidance=prepared.guidance)
    few = cases[:_SCORED]
    images = paint(prepared.base, [case.prompt for case in few], [case.seed for case in few], steps=2)
    with tempfile.TemporaryDirectory() as folder:
        files = {case.id: Path(folder) / f"{number}.png" for number, case in enumerate(few)}
        for file, image in zip(files.values(), images, strict=True):
            file.write_bytes(png(image))

        def score() -> float:
            started = time.monotonic()
            with tempfile.TemporaryDirectory(dir=folder) as scores:
                score_missing(Path(scores), prepared.suite, few, {"base": files}, allow_code=allow_code, progress=False)
            return time.monotonic() - started

        first, second = score(), score()  # detectors are loaded the first time
    around = max(0.0, first - second) + second * pictures / max(1, len(few))
    return painting._replace(around=around, memory=peak_memory(prepared.base))


def _counted(prepared: Prepared, shown: int) -> tuple[Work, Work]:
    """Return the work of a training at least and at most, but for its texts, by doing it on zeros.

    Args:
        prepared: Of a base that predicts zeros.
        shown: Pictures in a row of a preview.
    """
    teacher, spec = prepared.teacher, prepared.teacher.spec
    steps_of_a_picture = 2 * teacher.base.steps

    def count(work: Callable[[], object]) -> int:
        before = teacher.evaluations
        work()
        return teacher.evaluations - before

    solved = teacher.recipe.closed_form is not None
    probing = reading = measuring = 0
    walking = 0.0
    if held_out := prepared.held_out:
        probing = count(lambda: Probe(teacher, held_out))
        reading = count(lambda: Probe(teacher, held_out).read(0)) - probing
    elif spec.probe_every:
        probe = ErasureProbe()
        probing = count(lambda: probe.read(teacher))
        reading = count(lambda: probe.read(teacher))
        probing -= reading
    if spec.steps:
        shapes = latent_shapes(teacher.base, spec)
        starts = range(0, spec.most_steps, spec.walk_every)[:_WALKS]
        walking = count(lambda: [refill(teacher, step, shapes) for step in starts]) / len(starts)
        if spec.lr == AUTO:
            probes: list[Probe] = []
            measuring = count(lambda: probes.append(prepare_rate(teacher)[1])) + TRIES * count(lambda: probes[0].read(0))
    preserved = spec.preserve_batch if teacher.preserved and spec.preserve_trajectories else 0
    batch = spec.batch_size + preserved + spec.null_batch

    def work(steps: int) -> Work:
        readings = steps // spec.probe_every if reading else 0
        rows = 2 + 1 + steps // spec.preview_every if shown else 0  # base and student at the end, the base once for previews
        walks = round(-(-steps // spec.walk_every) * walking)
        evaluations = probing + reading * ((solved and bool(held_out)) + readings) + walks + measuring * (steps > 0)
        return Work(
            evaluations=evaluations + rows * shown * steps_of_a_picture,
            student_samples=steps * spec.accumulate * batch,
            pictures=rows * shown,
        )

    fewest = spec.most_steps if spec.steps != AUTO else 0 if solved else last_step(spec, spec.probe_every)
    return work(fewest), work(spec.most_steps)


def _measure_training(base: Base, teacher: Teacher, parameters: Sequence[torch.nn.Parameter], shown: int) -> Pace:
    """Return how long one of each kind of a training's work takes, by doing a little of it.

    Args:
        base: Carries the adapter.
        teacher: Says how many latents are at work at a time.
        parameters: The adapter's, which are left as they were.
        shown: Pictures in a row of a preview, which are painted at a pace of their own.
    """
    spec, text = teacher.spec, _time_text(base)
    shape, condition = latent_shapes(base, spec)[0], base.encode(["a photograph"])

    def latents(count: int) -> tuple[Tensor, Tensor, Condition]:
        device = base.model.device
        t = torch.full((count,), 500, device=device)
        return torch.randn(count, *shape).to(device), t, pick(condition, torch.zeros_like(t))

    walked = latents(2 * min(spec.walk_batch, spec.trajectories))
    with torch.no_grad():
        evaluation = _clock(base, lambda: base.predict(*walked), len(walked[0]))
    student = 0.0
    if spec.steps:
        student = _time_step(base, spec, parameters, latents(spec.batch_size + spec.preserve_batch + spec.null_batch))
    return Pace(text, evaluation, student, _measure_painting(base, shown).picture if shown else 0.0)


def _measure_painting(base: Base, count: int) -> Pace:
    """Return how long pictures take that are painted `count` at a time; two lengths of denoising tell steps from the rest."""
    prompts, text = [f"a photograph of {number}" for number in range(count)], _time_text(base)
    short, long = (
        _clock(base, lambda steps=steps: paint(base, prompts, range(count), steps=steps), count) for steps in _LENGTHS
    )
    evaluation = max(0.0, long - short) / (2 * (_LENGTHS[1] - _LENGTHS[0]))
    return Pace(text, evaluation, 0.0, max(0.0, short - 2 * _LENGTHS[0] * evaluation - 2 * text))


def _time_text(base: Base) -> float:
    """Return how long a text takes to encode."""
    prompts = [f"a photograph of {number}" for number in range(_TEXTS)]
    return _clock(base, lambda: base.encode(prompts), _TEXTS)


def _time_step(
    base: Base, spec: TrainSpec, parameters: Sequence[torch.nn.Parameter], points: tuple[Tensor, Tensor, Condition]
) -> float:
    """Return how long an optimiser step takes for each latent; the parameters are left as they were."""
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_optimizer("adam", list(parameters), 1e-9, {})

    def step() -> None:
        optimizer.zero_grad()
        base.predict(*points).square().mean().backward()
        optimizer.step()

    if spec.gradient_checkpointing:
        base.model.enable_gradient_checkpointing()
    try:
        return _clock(base, step, len(points[0]))
    finally:
        if spec.gradient_checkpointing:
            base.model.disable_gradient_checkpointing()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def _clock(base: Base, work: Callable[[], object], count: int) -> float:
    """Return how many seconds some work takes for each of `count` things, once it is warm: the median of a few times."""
    work()
    seconds: list[float] = []
    while len(seconds) < _REPEATS or sum(seconds) < _ENOUGH / 4:
        started = time.monotonic()
        work()
        if base.model.device.type == "cuda":
            torch.cuda.synchronize(base.model.device)
        seconds.append(time.monotonic() - started)
        if sum(seconds) > _ENOUGH:
            break
    return statistics.median(seconds) / count


def _held(teacher: Teacher, texts: int) -> int:
    """Return the bytes that a training holds beside what a step needs: encoded texts, and the points of its buffers."""
    spec = teacher.spec
    encoded = texts * sum(value[0].nbytes for value in teacher.encode([""]).values())
    shape = latent_shapes(teacher.base, spec)[0]
    erased, preserved = spec.trajectories, spec.preserve_trajectories if teacher.preserved else 0
    points = erased * spec.trajectory_steps + preserved * (spec.preserve_steps or spec.trajectory_steps)
    points = points if spec.points == "all" else erased + preserved
    # Texts are held as they came and once more in one tensor; a point has x_t, its target and how far that is pushed, all in
    # float32, and those of a walk are joined once.
    return 2 * encoded + (4 * 4 * points * math.prod(shape) if spec.steps else 0)


def peak_memory(base: Base) -> int | None:
    """Return the most bytes that this process has held so far: of the card where the base is on one, else of the machine."""
    if base.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(base.model.device)
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
