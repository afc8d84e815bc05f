"""Training an eraser: the ESD loop.

Read `train` from top to bottom beside the paper (Gandikota et al., ICCV 2023, arXiv:2303.07345). A frozen *teacher*, the
base itself, and a *student*, the same network with a LoRA switched on, look at the same noisy latents `x_t`; the student
learns to predict what the objective makes of the teacher's predictions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from esd_lora.checkpoints import CHECKPOINT_NAME, TrainState
from esd_lora.eraser import RUN_FILES, ErasedConcept, Eraser, EraserHeader, LoraPair, clear_output, hash_weight
from esd_lora.errors import EsdLoraError
from esd_lora.families import Base, load_base
from esd_lora.lessons import Lesson, Teacher, plan
from esd_lora.objectives import OBJECTIVES
from esd_lora.recipe import LoraSpec, Recipe, TrainSpec
from esd_lora.recipe_files import dump_recipe
from esd_lora.trajectory import Points, TrajectoryBuffer
from esd_lora.watching import Interruption, StepReport, Watcher, watchers_for

ADAPTER = "esd"


def train(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    base: Base | None = None,
    on_step: Sequence[Watcher] = (),
    progress: bool = True,
) -> Eraser:
    """Trains the eraser a recipe describes.

    Args:
        recipe: From `load_recipe`.
        out: Directory for the eraser, its log, previews and checkpoints; without one nothing is written.
        resume: Go on from the checkpoint in `out`. With `x_t_from: base`, or a refresh at every step, the result is the
            one an unbroken run gives; with a buffer of student trajectories it is another draw of the same.
        force: Write over an eraser that is already in `out`.
        base: A base that is loaded already, instead of `recipe.base`; it leaves as it came, without an adapter.
        on_step: Called after every optimiser step with a `StepReport`, after those the recipe asks for (`watching`); a
            watcher that returns True ends the training.
        progress: Whether to show a progress bar.

    Raises:
        EsdLoraError: If the base cannot be loaded or carries an adapter, the scope matches no layer, or the loss stops
            being finite.
        KeyboardInterrupt: On Ctrl-C, after the step in hand is done and its checkpoint written.
    """
    spec = recipe.train
    out = Path(out) if out is not None else None
    state = TrainState.load(out, dump_recipe(recipe)) if out and resume else TrainState()
    base = base or load_base(recipe.base)
    base.require_bare()
    lessons = plan(recipe, base.keep)
    layers = base.family.modules(base.model, recipe.scope)
    OBJECTIVES.get(recipe.objective)  # like the scope, checked before an earlier result is touched
    if out and not resume:
        clear_output(out, force, RUN_FILES)
    watchers = [*watchers_for(recipe, out, state, progress), *on_step]
    parameters = add_adapter(base, list(layers), recipe.lora, spec.seed)
    try:
        teacher = Teacher(base, recipe, lessons)
        optimizer = torch.optim.Adam(parameters, lr=spec.lr)
        state.restore(parameters, optimizer)
        weights = torch.tensor([spec.preserve_weight if lesson.preserves else 1.0 for lesson in lessons])
        weights = weights.to(base.model.device)
        started, erasing, preserving = time.monotonic(), None, None

        with Interruption() as interruption:
            for step in range(state.step, spec.steps):
                # Points to train on: walked afresh at every step (paper), or replayed from a buffer.
                if erasing is None or step % spec.refresh_every == 0:
                    erasing, preserving = refresh(teacher, lessons, spec, step // spec.refresh_every)
                chance = torch.Generator().manual_seed(_seed(spec.seed, 1, step))
                batch = [erasing.sample(spec.batch_size, chance)]
                if preserving:
                    batch.append(preserving.sample(spec.preserve_batch, chance))
                points = Points.join(batch)

                # The student's prediction for the erased prompt, against the target the teacher set.
                prediction = base.predict(points.x_t, points.t, teacher.condition(points.lesson))
                error = (prediction - points.target).to(parameters[0].dtype).square().flatten(1).mean(1)
                loss = (weights[points.lesson] * error).sum() / spec.batch_size

                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(spec, step)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

                state.advance(len(points.t), loss.item(), time.monotonic() - started)
                if not math.isfinite(state.loss):
                    raise EsdLoraError(
                        f"the loss became {state.loss} at step {step + 1} of {spec.steps}: lower train.lr (now {spec.lr:g})"
                        " or load the base in float32."
                    )
                last = interruption.asked or state.step == spec.steps
                report = StepReport(state, spec, base, teacher, parameters, optimizer, interruption.asked, last)
                for watch in watchers:
                    if watch(report):
                        report = report._replace(last=True)
                if report.interrupted:
                    raise KeyboardInterrupt
                if report.last:
                    break
        eraser = collect(base, recipe, lessons, cost(state, teacher))
    finally:
        base.model.unload_lora()
    if out:
        eraser.save(out)
        (out / CHECKPOINT_NAME).unlink(missing_ok=True)
    return eraser


def refresh(
    teacher: Teacher, lessons: Sequence[Lesson], spec: TrainSpec, number: int
) -> tuple[TrajectoryBuffer, TrajectoryBuffer | None]:
    """Walks new trajectories: `spec.trajectories` of erased prompts and `spec.preserve_trajectories` of preserved ones.

    Every lesson gets its turn: the lists are gone through in a shuffled order, over and over, from refresh to refresh.
    """

    def turn(rows: list[int], count: int) -> Tensor:
        shuffled = torch.Generator().manual_seed(_seed(spec.seed, 2, 0))
        order = torch.tensor(rows)[torch.randperm(len(rows), generator=shuffled)]
        return order[(number * count + torch.arange(count)) % len(rows)].to(teacher.base.model.device)

    noise = torch.Generator().manual_seed(_seed(spec.seed, 3, number))
    erased = [i for i, lesson in enumerate(lessons) if not lesson.preserves]
    preserved = [i for i, lesson in enumerate(lessons) if lesson.preserves]
    erasing = teacher.fill(turn(erased, spec.trajectories), noise)
    if not (preserved and spec.preserve_batch and spec.preserve_trajectories):
        return erasing, None
    return erasing, teacher.fill(turn(preserved, spec.preserve_trajectories), noise)


def add_adapter(base: Base, layers: list[str], lora: LoraSpec, seed: int) -> list[torch.nn.Parameter]:
    """Puts a fresh LoRA on the layers and returns its float32 parameters; the update is zero until trained."""
    from peft import LoraConfig

    config = LoraConfig(r=lora.rank, lora_alpha=cast(int, lora.alpha), target_modules=layers, init_lora_weights=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base.model.add_adapter(config, ADAPTER)
    parameters = [p for p in base.model.parameters() if p.requires_grad]
    for parameter in parameters:
        # Masters are at least float32: bf16 ones would round small updates away.
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return parameters


def collect(base: Base, recipe: Recipe, lessons: Iterable[Lesson], spent: dict[str, float]) -> Eraser:
    """Reads the trained LoRA off the denoiser, its scale folded into `up`."""
    pairs: dict[str, LoraPair] = {}
    for path, layer in base.model.named_modules():
        if ADAPTER in getattr(layer, "lora_A", ()):
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            pairs[path] = LoraPair(
                down.detach().to("cpu", copy=True), (up.detach() * layer.scaling[ADAPTER]).to("cpu", copy=True)
            )
    header = EraserHeader(
        family=base.family.name,
        prefix=base.family.denoiser,
        prediction_type=base.family.prediction_type(base.pipe),
        base=base.id,
        base_revision=base.revision,
        base_hashes={path: hash_weight(weight) for path, weight in base.weights(pairs)},
        concepts=tuple(
            ErasedConcept(name=concept.name, synonyms=concept.synonyms, pairs=tuple(concept.pairs()), eta=recipe.eta)
            for concept in recipe.concepts
        ),
        preserve=tuple(lesson.prompt for lesson in lessons if lesson.preserves),
        objective=recipe.objective,
        scope=recipe.scope,
        recipes=(recipe,),
        versions={name: version(name) for name in ("esd-lora", "torch", "diffusers", "peft")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        cost=spent,
    )
    return Eraser(pairs, header)


def cost(state: TrainState, teacher: Teacher) -> dict[str, float]:
    """What the training took: seconds, steps, latents through the denoiser without and with gradients."""
    return {
        "seconds": round(state.seconds, 2),
        "steps": state.step,
        "sample_evaluations": state.evaluations_before + teacher.evaluations,
        "student_samples": state.student_samples,
    }


def learning_rate(spec: TrainSpec, step: int) -> float:
    """The rate of one step (from 0): constant, or on a cosine from `lr` down to a tenth of it."""
    if spec.lr_schedule == "constant":
        return spec.lr
    return spec.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / spec.steps)))


def _seed(*parts: int) -> int:
    """One 63-bit seed for several small numbers, so that every draw can be repeated without replaying those before."""
    out = 0
    for part in parts:
        out = (out * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return out
