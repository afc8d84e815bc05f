"""What a training takes.

It is rehearsed: everything around the denoiser and the text encoders runs as it will (anchors are chosen, lessons planned,
layers solved, trajectories counted), on texts that are made up and predictions that are zeros. Then one batch of texts, of
trajectories, one optimiser step and one picture are made for real, which says how long each takes and how much memory all of
it needs. Where a recipe leaves the number of steps to its probe, there is a least and a most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from esd_lora.adapter import adapter_pairs, adapter_ranks, add_adapter, remove_adapter
from esd_lora.bases.base import Base
from esd_lora.calibration import TRIES, Probe, last_step, prepare_rate
from esd_lora.closed_form import solve_text
from esd_lora.estimates.estimate import Estimate, Pace, Work, clock, peak_memory, time_text
from esd_lora.estimates.pictures import measure_painting
from esd_lora.estimates.rehearsal import Rehearsed
from esd_lora.from_pictures import rehearse_pictures
from esd_lora.objectives import mean_square
from esd_lora.optimizers import make_optimizer
from esd_lora.recipe import AUTO, Recipe, TrainSpec, require_allowed
from esd_lora.teacher import Teacher, latent_shapes, refill
from esd_lora.training import Prepared, prepare_prompts
from esd_lora.trajectory import Condition, pick
from esd_lora.watching import ErasureProbe, shown_prompts

_WALKS = 64  # that are counted; each may stop early


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
    base = base.skipping(recipe.train.clip_skip)
    rehearsed = Rehearsed(**vars(base))
    rehearsed.known = base.encode(["a photograph"], recipe.train.distilled_guidance)
    started = time.monotonic()
    named, pictured = rehearse_pictures(rehearsed, recipe, latent_shapes(base, recipe.train))
    prepared = prepare_prompts(rehearsed, named, allow_code, pictured=[*pictured.values()])
    teacher, spec = prepared.teacher, prepared.teacher.spec
    parameters = add_adapter(base, base.modules(recipe.scope), recipe.lora, spec.seed)
    try:
        if form := recipe.closed_form:
            ranks = adapter_ranks(base)
            solve_text(rehearsed, teacher.encode, prepared.planned, ranks, form, prepared.guard, prepared.unlisted)
        around = time.monotonic() - started
        shown = len(shown_prompts(teacher)) if written and spec.preview_every else 0
        compared, learnt = (
            sum(each) for each in zip((0, 0), *((p.compared, p.learnt) for p in pictured.values()), strict=True)
        )
        before = Work(rehearsed.texts, compared, learnt)
        least, most = (before.plus(part) for part in _counted(prepared, shown))
        pace = _measure_training(base, teacher, parameters, shown)
        memory = peak_memory(base)
        eraser = sum(4 * (pair.down.numel() + pair.up.numel()) for pair in adapter_pairs(base).values())
        held = _held(teacher, rehearsed.texts)
    finally:
        remove_adapter(base)
    return Estimate(least, most, pace, around, memory and memory + held, eraser)


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

    solved = teacher.recipe.closed_form is not None and not teacher.recipe.adapts_text
    probing = reading = measuring = 0
    walking = 0.0
    if (held_out := prepared.held_out) and teacher.recipe.probed:
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
        evaluations = probing + reading * ((solved and teacher.recipe.probed) + readings) + walks + measuring * (steps > 0)
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
    spec, text = teacher.spec, time_text(base)
    shape, condition = latent_shapes(base, spec)[0], base.encode(["a photograph"])

    def latents(count: int) -> tuple[Tensor, Tensor, Condition]:
        device = base.model.device
        t = torch.full((count,), 500, device=device)
        return torch.randn(count, *shape).to(device), t, pick(condition, torch.zeros_like(t))

    walked = latents(2 * min(spec.walk_batch, spec.trajectories))
    with torch.no_grad():
        evaluation = clock(base, lambda: base.predict(*walked), len(walked[0]))
    student = 0.0
    if spec.steps:
        points = latents(spec.batch_size + spec.preserve_batch + spec.null_batch)
        # A student that adapts text encodes anew what it reads: at most a prompt for each point.
        texts = [f"a photograph {i}" for i in range(len(points[0]))] if teacher.recipe.adapts_text else []
        student = _time_step(base, spec, parameters, points, texts)
    return Pace(text, evaluation, student, measure_painting(base, shown).picture if shown else 0.0)


def _time_step(
    base: Base,
    spec: TrainSpec,
    parameters: Sequence[torch.nn.Parameter],
    points: tuple[Tensor, Tensor, Condition],
    texts: Sequence[str],
) -> float:
    """Return how long an optimiser step takes for each latent; the parameters are left as they were."""
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_optimizer("adam", list(parameters), 1e-9, {})

    def step() -> None:
        optimizer.zero_grad()
        x_t, t, condition = points
        base.predict(x_t, t, base.encode_with_gradient(texts) if texts else condition).square().mean().backward()
        optimizer.step()

    if spec.gradient_checkpointing:
        base.model.enable_gradient_checkpointing()
    try:
        return clock(base, step, len(points[0]))
    finally:
        if spec.gradient_checkpointing:
            base.model.disable_gradient_checkpointing()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def _held(teacher: Teacher, texts: int) -> int:
    """Return the bytes that a training holds beside what a step needs: encoded texts, and the points of its buffers."""
    spec = teacher.spec
    encoded = texts * sum(value[0].nbytes for value in teacher.encode([""]).values())
    shape = latent_shapes(teacher.base, spec)[0]
    erased, preserved = spec.trajectories, spec.preserve_trajectories if teacher.preserved else 0
    points = erased * spec.trajectory_steps + preserved * (spec.preserve_steps or spec.trajectory_steps)
    points = points if spec.points == "all" else erased + preserved
    # Texts are held as they came and once more in one tensor; a point has x_t, its target and how far that is pushed, all in
    # float32, and those of a walk are joined once; where the loss asks for the concept's prediction, that as well.
    tensors = 4 if teacher.loss is mean_square else 6
    return 2 * encoded + (4 * tensors * points * math.prod(shape) if spec.steps else 0)
