"""Training an eraser: the ESD loop.

Read `train` from top to bottom beside the paper (Gandikota et al., ICCV 2023, arXiv:2303.07345), with `teacher.py` open for the
targets. A frozen *teacher*, the base itself, and a *student*, the same network with a LoRA switched on, look at the same noisy
latents `x_t`; the student learns to predict

    target = anchor - eta * (concept - null)

of the teacher's three predictions there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.adapter import adapter_pairs, adapter_ranks, add_adapter, dropout_enabled, remove_adapter, set_pairs
from esd_lora.bars import watched
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.calibration import FIRST_WEIGHT, Probe, calibration_of, is_content, last_step, measure_rate, steer
from esd_lora.closed_form import choose_anchors, choose_guarded, kept_texts, solve_text, unlisted_moments
from esd_lora.curves import draw_curves
from esd_lora.erasers.eraser import CURVES_NAME, LOG_NAME, RUN_FILES, Eraser, LoraPair
from esd_lora.erasers.header import ErasedConcept, EraserHeader, Solved
from esd_lora.files import reserve_directory
from esd_lora.formats.cards import save_with_card
from esd_lora.from_pictures import Pictured, check_pictures, learn_pictures
from esd_lora.guarding import Guard
from esd_lora.interrupting import Interruption, resumable
from esd_lora.lessons import HeldOut, Lesson, find_neighbours, first_eta, hold_out, plan, pools, share_turns
from esd_lora.optimizers import make_optimizer
from esd_lora.pictures import png
from esd_lora.prediction_cache import PredictionCache
from esd_lora.ranks import anywhere, copy_from_main, from_main, is_main, rank
from esd_lora.recipe import AUTO, Recipe, TrainSpec, require_allowed
from esd_lora.recipe_files import dump_recipe
from esd_lora.seeds import Stream, stream_generator, stream_seed
from esd_lora.teacher import ReplayBuffers, Teacher, latent_shapes, preserved_walks, refill, walked_so_far
from esd_lora.train_state import Checkpoint, TrainState
from esd_lora.watching import StepReport, Watcher, describe_end, paint_samples, require_finite, watchers_for


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
    allow_code: Collection[str] = (),
    teacher_cache: str | Path | None = None,
) -> Eraser:
    """Train the eraser that a recipe describes; several ranks (`ranks`) train it together, and all return it.

    Args:
        recipe: From `load_recipe`.
        out: Directory for the eraser, its log, previews and checkpoints; without one nothing is written.
        resume: Go on from the checkpoint in `out`; on the CPU the result is bit for bit that of an unbroken run.
        force: Replace an eraser that is already in `out`, once the new one is done.
        base: A base that is loaded already, instead of `recipe.base`; it leaves as it came, without an adapter.
        device: Where to train, unless `base` is given: `auto`, `cpu`, `cuda`, `mps`.
        dtype: Of the frozen base, unless `base` is given: `float32`, `bfloat16`, `float16`, or `int8`, `nf4` for its denoiser
            (`bases.quantizing`); what suits the device unless given. The LoRA itself is always float32 or better.
        track: Experiment trackers of accelerate to report to: `tensorboard`, `wandb`, `trackio`.
        on_step: Called after every optimiser step with a `StepReport`, in every rank, before log, previews and checkpoint are
            written; a watcher that returns True ends the training.
        progress: Whether to show a progress bar.
        allow_code: Every `module:attribute` that may be imported, where the recipe names one as objective or optimiser; the
            recipe alone, which may be a stranger's, runs no code.
        teacher_cache: Folder for what the base predicts on its own trajectories: another training of the same concepts, with
            another eta, rank, scope or rate, finds it there (`prediction_cache`).

    Raises:
        EsdLoraError: If the recipe names code that is not allowed, the base cannot be loaded or carries an adapter, the scope
            matches no layer, the loss stops being finite, or `out` holds something, is written by another run, or holds what
            is read.
        KeyboardInterrupt: On Ctrl-C, once the step in hand is done and its checkpoint written; between steps at once.
    """
    require_allowed(recipe, allow_code)
    spec, out = recipe.train, Path(out) if out is not None and is_main() else None
    track, progress = track if is_main() else (), progress and is_main()
    check_pictures(recipe)
    shown = any(concept.images is not None for concept in recipe.concepts)
    with watched(progress), reserve_directory(out, force or resume, inputs_of(recipe)) if out else nullcontext():
        checkpoint = Checkpoint.read(out, dump_recipe(recipe)) if out and resume else None
        loaded_here = base is None
        if base is None:
            painted = shown or (out is not None and spec.preview_every > 0)
            # Words are learnt, and text is adapted, through text encoders and denoiser together.
            text_first = not (shown or recipe.adapts_text)
            options = {"device": device, "dtype": dtype, "config": recipe.base_config}
            base = load_base(recipe.base, vae=painted, text_first=text_first, **options)
        base.require_bare()
        base = base.skipping(spec.clip_skip)
        started = time.monotonic()
        cache = PredictionCache(teacher_cache) if teacher_cache is not None else None
        named, pictured = learn_pictures(base, recipe, latent_shapes(base, spec)) if shown else (recipe, {})
        teacher, planned, held_out, guard, unlisted = prepare_prompts(base, named, allow_code, cache, [*pictured.values()])
        if loaded_here and not recipe.adapts_text:
            base.free_text_encoders()
        parameters = add_adapter(base, base.modules(recipe.scope), recipe.lora, spec.seed)
        try:
            if spec.gradient_checkpointing:
                base.model.enable_gradient_checkpointing()
            pairs, solved = {}, None
            if form := recipe.closed_form:
                pairs, solved = solve_text(base, teacher.encode, planned, adapter_ranks(base), form, guard, unlisted)
                solved = solved and solved.model_copy(update={"seconds": time.monotonic() - started})
            probe = Probe(teacher, held_out) if held_out and recipe.probed else None
            guard.hold()  # before any step, what a layer starts from as well
            state = start(teacher, parameters, pairs, probe, allow_code)
            state.started = started
            state.count_time()
            if checkpoint := from_main(lambda: checkpoint):
                state.restore(checkpoint)
                teacher.evaluations = checkpoint.evaluations
            copy_from_main(parameters)
            watchers = watchers_for(teacher, state, out, track, progress, on_step, recipe, solved, held_out)
            run_steps(teacher, state, watchers, probe, guard)
            if progress:
                describe_end(teacher, state, watchers, cache)
            with resumable(teacher, state, watchers):
                eraser = collect(teacher, state, recipe, planned, solved, pictured)
                pictures = paint_samples(teacher) if out and spec.preview_every else {}
        finally:
            remove_adapter(base)
            if spec.gradient_checkpointing:
                base.model.disable_gradient_checkpointing()
        if out:
            if state.readings:
                title = f"{', '.join(eraser.names)}, {state.step} steps"
                pictures[CURVES_NAME] = png(draw_curves(calibration_of(state), title, anchored=state.anchored))
            save_with_card(eraser, out, pictures, replaces={*RUN_FILES} - {LOG_NAME})
    return eraser


def inputs_of(recipe: Recipe) -> list[str]:
    """Return what a training reads, as far as it may be a path."""
    vocabulary = recipe.neighbours.vocabulary if recipe.neighbours else ""
    images = [concept.images for concept in recipe.concepts]
    return [text for text in (recipe.base, recipe.base_config, vocabulary, *images) if isinstance(text, str) and text]


class Prepared(NamedTuple):
    """What a training knows of its prompts."""

    teacher: Teacher
    planned: list[Lesson]
    """All lessons; the teacher knows those that are walked."""
    held_out: HeldOut | None
    """Prompts of a probe, where there is one."""
    guard: Guard
    unlisted: dict[str, Tensor] | None
    """From `unlisted_moments`, where the closed form keeps what is in no list."""


def prepare_prompts(
    base: Base,
    recipe: Recipe,
    allow_code: Collection[str],
    cache: PredictionCache | None = None,
    pictured: Sequence[Pictured] = (),
) -> Prepared:
    """Choose anchors, plan the lessons and encode every prompt, after which only a student that adapts text needs encoders.

    Args:
        base: With its text encoders.
        recipe: What to train.
        allow_code: Every `module:attribute` that may be imported.
        cache: Of the teacher's predictions.
        pictured: From `learn_pictures`, which put into prompts what pictures show.
    """
    layers = base.modules(recipe.scope)
    recipe = recipe.for_layers(reading_text=recipe.adapts_text or any(map(base.family.reads_text, layers)))
    spec = recipe.train
    encode = base.remembering(spec.distilled_guidance)
    if recipe.anchor == AUTO:
        recipe = recipe.anchored(choose_anchors(recipe, base, encode))
    if isinstance(recipe.guard, int):
        recipe = recipe.model_copy(update={"guard": choose_guarded(recipe, recipe.guard, base.keep, base.as_read(encode))})
    planned = plan(recipe, base.keep, find_neighbours(recipe, base.keep, base.as_read(encode)))
    base.warn_of_cuts(text for concept in recipe.concepts for texts in concept.lessons() for text in texts)
    guard = Guard(base, recipe.guarded, encode, [lesson.prompt for lesson in planned if not lesson.preserves])
    walks = preserved_walks(spec, len(latent_shapes(base, spec)))
    kept = kept_texts(planned) if recipe.closed_form else []
    ranked_by = base.as_read(encode if kept else base.encode)  # beside the closed form all prompts are encoded anyway, and held
    lessons = share_turns(planned, walks, ranked_by, spec.seed) if spec.steps else planned
    held_out = hold_out(recipe, planned, base.keep, ranked_by) if spec.steps and spec.probe_every else None
    further = [*(held_out.prompts() if held_out else ()), *kept]
    teacher = Teacher(base, recipe, lessons, allow_code, further, encode, cache, pictured)
    unlisted = unlisted_moments(base, kept) if recipe.closed_form and recipe.closed_form.unlisted else None
    return Prepared(teacher, planned, held_out, guard, unlisted)


def start(
    teacher: Teacher,
    parameters: list[torch.nn.Parameter],
    pairs: Mapping[str, LoraPair],
    probe: Probe | None,
    allow_code: Collection[str],
) -> TrainState:
    """Return a training before its first step, with the numbers that its recipe gives or leaves to be measured.

    Where the closed form has done all there is to do, it is stopped already, and nothing else was measured.

    Args:
        teacher: Its base carries a fresh adapter.
        parameters: The adapter's.
        pairs: What the closed form sets them to, by path; the others stay zero.
        probe: Measures how far that gets.
        allow_code: Every `module:attribute` that may be imported.
    """
    recipe, spec, model = teacher.recipe, teacher.spec, teacher.base.model

    def optimizer(lr: float) -> torch.optim.Optimizer:
        return make_optimizer(spec.optimizer, parameters, lr, spec.optimizer_args, allow_code)

    set_pairs(teacher.base, pairs)
    reading = probe.read(0) if probe and pairs else None
    anchored = all(teacher.lessons[i].replaces for i in teacher.erased)
    # Learnt words stand for a name that is not known. What the closed form does to them it does to that name as well; what
    # steps do, they do to the words alone, and bring back what the name draws (benchmarks/from_pictures.py).
    stand_ins = any(each.shown.words for each in teacher.pictured)
    content = spec.steps == AUTO and reading is not None and (stand_ins or is_content(reading, anchored=anchored))
    if spec.lr != AUTO:
        lr = spec.lr
    elif content or not spec.steps:
        lr = 0.0
    else:
        set_pairs(teacher.base, {})
        lr = measure_rate(teacher, parameters, optimizer)
        set_pairs(teacher.base, pairs)
    return TrainState(
        parameters,
        optimizer(lr),
        torch.amp.GradScaler(enabled=model.dtype == torch.float16, device=model.device.type),
        lr=lr,
        etas=[(0, first_eta(recipe) if recipe.eta == AUTO else recipe.eta)],
        preserve_weights=[(0, FIRST_WEIGHT if spec.preserve_weight == AUTO else spec.preserve_weight)],
        anchored=anchored,
        readings=[reading.model_dump()] if reading else [],
        stopped=content,
        measured=teacher.evaluations,
    )


def run_steps(
    teacher: Teacher,
    state: TrainState,
    watchers: Sequence[Watcher],
    probe: Probe | None = None,
    guard: Guard | None = None,
) -> None:
    """Train the student, the base with its adapter on, until the recipe's last step or until a watcher ends it.

    Args:
        teacher: The base with its adapter off.
        state: Moved on by every step.
        watchers: Called after every step.
        probe: Measures how far the student is, where the recipe leaves something to that.
        guard: Has the texts that no update may touch.

    Raises:
        EsdLoraError: If the loss stops being finite.
        KeyboardInterrupt: On Ctrl-C, after the step in hand.
    """
    base, spec, lora = teacher.base, teacher.spec, teacher.recipe.lora
    preserves = torch.tensor([*(lesson.preserves for lesson in teacher.lessons), False], device=base.model.device)
    shapes = latent_shapes(base, spec)
    buffers: dict[int, ReplayBuffers] = {}
    with Interruption() as interruption:
        done = state.stopped or state.step == last_step(spec, state.cooling)
        for step in range(state.step, state.step if done else spec.most_steps):
            # Points x_t with their targets: walked afresh for every step (paper), or replayed from a buffer that the teacher
            # fills now and then.
            if step % spec.walk_every == 0 or not buffers:
                with interruption.at_once(), resumable(teacher, state, watchers):
                    buffers = walked_buffers(teacher, state, step, shapes)
            batches = buffers[step % len(shapes)].batches(spec, stream_generator(spec.seed, Stream.BATCHES, step))

            state.optimizer.zero_grad()
            total, samples = torch.zeros((), device=base.model.device), 0
            weight = torch.where(preserves, state.preserve_weight, 1.0)
            weight[teacher.null_lesson] = state.preserve_weights[0][1]  # where it moves, guidance takes the erasure back
            for batch in batches:
                samples += len(batch.t)
                points = batch.share()
                if not len(points.t):  # fewer points than ranks
                    continue
                with dropout_enabled(base, lora, stream_seed(spec.seed, Stream.DROPOUT, step + rank() * spec.most_steps)):
                    prediction = base.predict(points.x_t, points.t, teacher.condition(points.lesson))
                error = teacher.losses(prediction, points)  # |prediction - target|^2, but for the hinge
                loss = (weight[points.lesson] * error).sum() / (spec.batch_size * spec.accumulate)
                state.scaler.scale(loss).backward()
                total = total + loss.detach()
            state.update(total, samples, learning_rate(spec, step, state.lr, state.cooling))
            if guard:
                guard.hold()

            if probe and state.step % spec.probe_every == 0:
                require_finite(state, base)
                if steer(state, probe.read(state.step), teacher.recipe):
                    teacher.push(state.eta, buffers.values())
            interrupted = anywhere(interruption.requested)
            for watch in watchers:
                last = interrupted or state.stopped or state.step == last_step(spec, state.cooling)
                if watch(StepReport(state, teacher, interrupted, last)):
                    state.stopped = True
            if interrupted:
                raise KeyboardInterrupt
            if state.stopped or state.step == last_step(spec, state.cooling):
                break


def walked_buffers(
    teacher: Teacher, state: TrainState, step: int, shapes: Sequence[tuple[int, ...]]
) -> dict[int, ReplayBuffers]:
    """Return the buffers for a step, of the trajectories that the student of the last refresh walked.

    A training resumed between two refreshes walks again what it trained on before; that does not count as work once more.
    """
    since, evaluations = step % teacher.spec.walk_every, teacher.evaluations
    # The push is raised between refreshes too, which moves targets; the same sums again give the same bits.
    raised = [eta for raised_at, eta in state.etas if raised_at > step - since]
    teacher.push(state.etas[-1 - len(raised)][1])
    with state.walking(fresh=since == 0):
        buffers = refill(teacher, step - since, shapes)
    for eta in raised:
        teacher.push(eta, buffers.values())
    if since:
        teacher.evaluations = evaluations
    return buffers


def learning_rate(spec: TrainSpec, step: int, lr: float, cooling: int = 0) -> float:
    """Return the rate of one step (from 0): up to `lr` in the warm-up, then constant, or down to a tenth of it.

    Args:
        spec: Warm-up and schedule; where the number of steps is measured, the rate falls in the cool-down instead.
        step: From 0.
        lr: The rate without either.
        cooling: Step after which the cool-down began, 0 before.
    """
    if step < spec.warmup:
        return lr * (step + 1) / spec.warmup
    if spec.steps == AUTO:
        first, schedule = cooling or spec.most_steps, "linear"
    else:
        first, schedule = spec.warmup, spec.lr_schedule
    done = max(step - first, 0) / max(last_step(spec, cooling) - first, 1)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return lr * (0.1 + 0.9 * left)


def collect(
    teacher: Teacher,
    state: TrainState,
    given: Recipe,
    planned: Sequence[Lesson],
    solved: Solved | None,
    pictured: Mapping[int, Pictured],
) -> Eraser:
    """Return the eraser as it stands on the denoiser, with the header that says how it came about.

    Args:
        teacher: Knows the lessons that were walked.
        state: At the end.
        given: The recipe, in which anchors need not have been chosen.
        planned: All lessons; the closed form keeps the text of every preserved one.
        solved: How far that got.
        pictured: Number of a concept to what its pictures came to.
    """
    base, recipe = teacher.base, teacher.recipe
    pairs = adapter_pairs(base)
    walked = walked_so_far(teacher, state.step, len(latent_shapes(base, teacher.spec)))
    held = [lesson.prompt for lesson in planned if lesson.preserves and solved]
    held += [teacher.lessons[i].prompt for i in sorted(walked)]
    header = EraserHeader(
        family=base.family.name,
        prefix=base.family.denoiser,
        prediction_type=base.prediction_type,
        base=base.id,
        base_revision=base.revision,
        base_hashes=base.hashes(pairs),
        concepts=tuple(
            ErasedConcept(
                name=concept.name,
                synonyms=concept.synonyms,
                pairs=tuple((p, anchor) for p, _, anchor in pool),
                eta=state.eta,
                shown=pictured[number].shown if number in pictured else None,
            )
            for number, (concept, pool) in enumerate(zip(recipe.concepts, pools(recipe, base.keep), strict=True))
        ),
        preserve=tuple(dict.fromkeys(held)),
        guard=recipe.guarded,
        objective=recipe.objective,
        scope=recipe.scope,
        recipes=(given.without_folders(),),
        versions={name: version(name) for name in ("esd-lora", "torch", "diffusers", "peft")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        cost={
            "seconds": round(state.seconds, 2),
            "steps": state.step,
            "sample_evaluations": teacher.evaluations + sum(each.compared for each in pictured.values()),
            "student_samples": state.student_samples + sum(each.learnt for each in pictured.values()),
        },
        solved=(solved,) if solved else (),
        calibrations=(calibration_of(state),) if recipe.measures else (),
    )
    return Eraser(pairs, header)
