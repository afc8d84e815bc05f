"""Training an eraser: the ESD loop.

Read `train` from top to bottom beside the paper (Gandikota et al., ICCV 2023, arXiv:2303.07345). A frozen *teacher*, the
base itself, and a *student*, the same network with a LoRA switched on, look at the same noisy latents `x_t`; the student
learns to predict what the objective makes of the teacher's predictions.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm

from esd_lora.adapter import add_adapter, dropout_enabled, read_pairs
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import RUN_FILES, Eraser
from esd_lora.erasers.header import ErasedConcept, EraserHeader
from esd_lora.errors import EsdLoraError
from esd_lora.files import prepare_directory
from esd_lora.formats.cards import save_with_card
from esd_lora.lessons import Lesson, nearest, plan
from esd_lora.objectives import OBJECTIVES
from esd_lora.optimizers import make_optimizer
from esd_lora.recipe import Recipe, TrainSpec
from esd_lora.recipe_files import dump_recipe
from esd_lora.teacher import Buffers, Teacher, latent_shapes, refresh, seed_of
from esd_lora.train_state import CHECKPOINT_NAME, TrainState
from esd_lora.watching import Interruption, StepReport, Watcher, watchers_for


def train(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    base: Base | None = None,
    device: str = "auto",
    dtype: str | None = None,
    track: Sequence[str] = (),
    on_step: Sequence[Watcher] = (),
    progress: bool = True,
) -> Eraser:
    """Trains the eraser a recipe describes.

    Args:
        recipe: From `load_recipe`.
        out: Directory for the eraser, its log, previews and checkpoints; without one nothing is written.
        resume: Go on from the checkpoint in `out`; on the CPU the result is bit for bit that of an unbroken run.
        force: Write over an eraser that is already in `out`.
        base: A base that is loaded already, instead of `recipe.base`; it leaves as it came, without an adapter.
        device: Where to train, unless `base` is given: `auto`, `cpu`, `cuda`, `mps`.
        dtype: Of the frozen base, unless `base` is given: `float32`, `bfloat16`, `float16`; what suits the device unless
            given. The LoRA itself is always float32 or better.
        track: Experiment trackers of accelerate to report to: `tensorboard`, `wandb`, `trackio`.
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
    ours = base is None
    if base is None:
        pictures = out is not None and spec.preview_every > 0
        base = load_base(recipe.base, device=device, dtype=dtype, config=recipe.base_config, vae=pictures)
    base.require_bare()
    near = nearest(recipe.neighbours, recipe.concepts, base) if recipe.neighbours else ()
    lessons = plan(recipe, base.keep, near)
    layers = base.family.modules(base.model, recipe.scope)
    OBJECTIVES.get(recipe.objective)  # like the scope, checked before an earlier result is touched
    parameters = add_adapter(base, layers, recipe.lora, spec.seed)
    try:
        optimizer = make_optimizer(spec.optimizer, parameters, spec.lr, spec.optimizer_args)
        if out and not resume:
            prepare_directory(out, force, RUN_FILES)
        watchers = [*watchers_for(recipe, out, state, track, progress), *on_step]
        teacher = Teacher(base, recipe, lessons)
        if ours:
            base.free_text_encoders()
        if spec.gradient_checkpointing:
            base.model.enable_gradient_checkpointing()
        if progress:
            tqdm.write(
                f"base {base.id}: family {base.family.name}, on {base.model.device} in {base.model.dtype}", file=sys.stderr
            )
        scaler = torch.amp.GradScaler(enabled=base.model.dtype == torch.float16, device=base.model.device.type)
        state.restore(parameters, optimizer, scaler)
        weights = torch.tensor([spec.preserve_weight if lesson.preserves else 1.0 for lesson in lessons])
        weights = weights.to(base.model.device)
        shapes = latent_shapes(base, spec)
        buffers: dict[int, Buffers] = {}
        started = time.monotonic()

        with Interruption() as interruption:
            for step in range(state.step, spec.steps):
                # Points to train on: walked afresh at every step (paper), or replayed from a buffer. Aspect buckets take turns.
                if not buffers or step % spec.refresh_every == 0:
                    first = step - step % spec.refresh_every
                    with state.as_drawn(parameters, fresh=step == first):
                        buffers = refresh(teacher, first, shapes)
                chance = torch.Generator().manual_seed(seed_of(spec.seed, 1, step))
                optimizer.zero_grad()
                total = 0.0
                for points in buffers[step % len(shapes)].batches(spec, chance):
                    # The student's prediction for the erased prompt, against the target the teacher set.
                    with dropout_enabled(base, recipe.lora, seed_of(spec.seed, 4, step)):
                        prediction = base.predict(points.x_t, points.t, teacher.condition(points.lesson))
                    error = (prediction - points.target).square().flatten(1).mean(1)
                    loss = (weights[points.lesson] * error).sum() / (spec.batch_size * spec.accumulate)
                    scaler.scale(loss).backward()
                    total += loss.item()
                if not math.isfinite(total):
                    raise EsdLoraError(
                        f"the loss became {total} at step {step + 1} of {spec.steps}: lower train.lr (now {spec.lr:g}), give a"
                        " warm-up, or load the base in float32 (--dtype float32)."
                    )
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(spec, step)
                scaler.step(optimizer)
                scaler.update()

                state.advance(spec.accumulate * len(points.t), total, time.monotonic() - started)
                last = interruption.asked or state.step == spec.steps
                report = StepReport(state, spec, base, teacher, parameters, optimizer, scaler, interruption.asked, last)
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
        if spec.gradient_checkpointing:
            base.model.disable_gradient_checkpointing()
    if out:
        save_with_card(eraser, out)
        (out / CHECKPOINT_NAME).unlink(missing_ok=True)
    return eraser


def collect(base: Base, recipe: Recipe, lessons: Iterable[Lesson], spent: dict[str, float]) -> Eraser:
    """The eraser as it stands on the denoiser, with the header that says how it came about."""
    pairs = read_pairs(base.model)
    header = EraserHeader(
        family=base.family.name,
        prefix=base.family.denoiser,
        prediction_type=base.prediction_type,
        base=base.id,
        base_revision=base.revision,
        base_hashes=base.hashes(pairs),
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
    """The rate of one step (from 0): up to `lr` in the warm-up, then constant, or down to a tenth of it."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(spec.steps - spec.warmup, 1)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[spec.lr_schedule]
    return spec.lr * (0.1 + 0.9 * left)
