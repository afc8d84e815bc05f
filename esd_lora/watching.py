"""What happens around a training: progress bar, log, previews, checkpoints, early stop.

A watcher is called after every optimiser step; one that returns True ends the training. None of them changes what is
learned.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm

from esd_lora.bases.base import Base
from esd_lora.calibration import Probe, in_words, last_step, verdict
from esd_lora.erasers.eraser import LOG_NAME, SAMPLES
from esd_lora.erasers.header import Reading, Solved
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.files import reporting_write_errors, write_atomically
from esd_lora.lessons import HeldOut
from esd_lora.pictures import grid, paint, png, sample_files
from esd_lora.prediction_cache import PredictionCache
from esd_lora.ranks import anywhere, count, from_main
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import dump_recipe
from esd_lora.seeds import probe_seed
from esd_lora.step_bar import StepBar
from esd_lora.teacher import Teacher
from esd_lora.train_state import TrainState
from esd_lora.trajectory import Points
from esd_lora.wording import printable


class StepReport(NamedTuple):
    """What a watcher sees after a step, with the adapter on."""

    state: TrainState
    """Counters, loss and erasure; the student's parameters and their optimiser."""
    teacher: Teacher
    """The base, the recipe and the lessons. `teacher.base` has no text encoders where `train` loaded it: `teacher.encode`
    knows the lessons' prompts."""
    interrupted: bool
    """The user asked to stop; this is the last step of the run."""
    last: bool
    """No step follows, as far as is known to the watchers before this one."""

    @property
    def reads(self) -> bool:
        """Whether losses are read after this step: to read one is to wait for the device, so it is done now and then."""
        step, every = self.state.step, self.teacher.spec.checkpoint_every
        return self.last or self.interrupted or step % _READ_EVERY == 0 or (every > 0 and step % every == 0)


_READ_EVERY = 10  # steps
_RISE = 0.01  # of erasure, between two probes: less is a plateau
_PROBED = 8  # trajectories
_PREVIEWED = 4  # erased prompts, and as many preserved ones
MOST_SHOWN = 2 * _PREVIEWED
"""Pictures of one model in a preview."""

Watcher: TypeAlias = Callable[[StepReport], bool | None]


def describe_start(teacher: Teacher, solved: Solved | None) -> None:
    """Print a line about the base; about pictures, what is guarded and how far the closed form got, if there are any."""
    base = teacher.base
    place = f"on {base.model.device} in {base.held_in}"
    tqdm.write(printable(f"base {base.id}: family {base.family.name}, {place}"), file=sys.stderr)
    for pictured in teacher.pictured:
        tqdm.write(printable(pictured.shown.describe()), file=sys.stderr)
    if guarded := teacher.recipe.guarded:
        tqdm.write(printable(f"guarded: {', '.join(map(repr, guarded))}"), file=sys.stderr)
    if solved:
        tqdm.write(printable(solved.describe()), file=sys.stderr)


def describe_end(teacher: Teacher, state: TrainState, watchers: Sequence[Watcher], cache: PredictionCache | None) -> None:
    """Print what a training came to, as far as a probe knows, and what the teacher's cache saved."""
    readings = [Reading.model_validate(reading) for reading in state.readings[-1:]]
    readings += [watch.reading for watch in watchers if isinstance(watch, ProgressBar) and watch.reading]
    if readings:
        names = ", ".join(concept.name for concept in teacher.recipe.concepts)
        by_words = any(pictured.shown.words for pictured in teacher.pictured)
        outcome = verdict(readings[0], anchored=state.anchored, by_words=by_words)
        tqdm.write(printable(f"{names}: {outcome}"), file=sys.stderr)
    if cache:
        tqdm.write(printable(f"teacher's cache: {cache.hits} batches found, {cache.misses} made"), file=sys.stderr)


class ProgressBar:
    """A bar with the time left and how far the erasure is, as a calibrated training's probe measures it.

    Args:
        teacher: Knows the recipe.
        state: Where the training begins.
        held_out: Prompts to probe, for a training that does not probe by itself.
    """

    def __init__(self, teacher: Teacher, state: TrainState, held_out: HeldOut | None):
        names = ", ".join(concept.name for concept in teacher.recipe.concepts)
        self.anchored = state.anchored
        self.reading = Reading.model_validate(state.readings[-1]) if state.readings else None
        evaluations = teacher.evaluations
        self._probe = Probe(teacher, held_out) if held_out and not teacher.recipe.probed and count() == 1 else None
        teacher.evaluations = evaluations  # what is probed to be shown alone is not the training's work
        self.bar = StepBar(teacher.spec, state, f"erasing {names}")

    def __call__(self, report: StepReport) -> None:
        state, spec = report.state, report.teacher.spec
        self._read(report)
        if report.reads:
            shown = in_words(self.reading, anchored=self.anchored) if self.reading else f"loss {state.loss:.4f}"
            self.bar.set_postfix_str(printable(shown), refresh=False)
        self.bar.total = last_step(spec, state.cooling)
        self.bar.update()
        if report.last:
            if report.teacher.recipe.probed and not report.interrupted:
                self.bar.total = state.step
            self.leave(report)

    def _read(self, report: StepReport) -> None:
        """Read the probe, or take what was read."""
        state, teacher = report.state, report.teacher
        if state.readings:
            self.reading = Reading.model_validate(state.readings[-1])
        elif self._probe and not report.interrupted and (report.last or state.step % teacher.spec.probe_every == 0):
            evaluations = teacher.evaluations
            self.reading = self._probe.read(state.step)
            teacher.evaluations = evaluations

    def leave(self, _report: StepReport) -> None:
        """Close the bar."""
        self.bar.close()


def require_finite(state: TrainState, base: Base) -> None:
    """Refuse a loss that is no number: because of the base's own weights, or else of how it is trained.

    Raises:
        EsdLoraError: With the damaged module, or what to change.
    """
    for step, loss in state.read_losses().items():
        if math.isfinite(loss):
            continue
        if damaged := base.damaged_module():
            raise EsdLoraError(f"the loss became {loss} at step {step}, because of base {base.id!r}: {damaged}.")
        raise EsdLoraError(
            f"the loss became {loss} at step {step}: lower train.lr (now {state.lr:g}), give a warm-up, or"
            " load the base in float32 (--dtype float32)."
        )


def check_losses(report: StepReport) -> None:
    """Refuse a loss that is no number, as often as losses are read."""
    if report.reads:
        require_finite(report.state, report.teacher.base)


class ErasureProbe:
    """A probe that measures, on trajectories no step trains on, how far the student has come, and stops before it over-trains.

    Erasure is the student's movement along the way from where it started to its target: 0 untouched, 1 on target. It
    needs neither images nor a judge, so it serves any base.
    """

    def __init__(self) -> None:
        self._erased: Points | None = None
        self._start: Tensor | None = None

    def __call__(self, report: StepReport) -> bool | None:
        state, spec = report.state, report.teacher.spec
        if state.step % spec.probe_every:
            return None
        state.erasure = self.read(report.teacher, anew=state.erasure is not None)
        state.stale_probes = 0 if state.erasure > state.best_erasure + _RISE else state.stale_probes + 1
        state.best_erasure = max(state.best_erasure, state.erasure)
        met = spec.stop_at is not None and state.erasure >= spec.stop_at
        return met or (spec.patience > 0 and state.stale_probes >= spec.patience)

    def read(self, teacher: Teacher, *, anew: bool = False) -> float:
        """Return how far the student is.

        Args:
            teacher: Its base carries the adapter, on.
            anew: Whether trajectories that have to be walked were walked, and counted, before the training was resumed.
        """
        evaluations = teacher.evaluations
        points, start = self._measuring_points(teacher)
        if anew:
            teacher.evaluations = evaluations
        now = teacher.predict(points.x_t, points.t, teacher.condition(points.lesson))
        way = points.target - start
        share = ((now - start) * way).sum().item() / max(way.square().sum().item(), 1e-12)
        return from_main(lambda: share)

    def _measuring_points(self, teacher: Teacher) -> tuple[Points, Tensor]:
        if self._erased is None or self._start is None:
            spec = teacher.spec
            lesson = torch.tensor((teacher.erased * _PROBED)[:_PROBED], device=teacher.base.model.device)
            short = spec.model_copy(update={"x_t_from": "base", "points": "all", "trajectory_steps": 8, "null_batch": 0})
            self._erased = teacher.fill(lesson, torch.Generator().manual_seed(probe_seed(spec.seed)), short).taught.points
            with teacher.adapter_disabled():
                self._start = teacher.predict(self._erased.x_t, self._erased.t, teacher.condition(self._erased.lesson))
        return self._erased, self._start


def stop_together(report: StepReport) -> bool:
    """End the training on every rank if a watcher ends it on one."""
    return anywhere(report.state.stopped)


class JsonLog:
    """`train_log.jsonl`: one line a step, written when losses are read."""

    def __init__(self, directory: Path, done: int = 0):
        self.path = directory / LOG_NAME
        self._unwritten: list[dict[str, Any]] = []
        if self.path.exists():  # a crash may have logged steps after the checkpoint
            write_atomically(self.path, b"".join(self.path.read_bytes().splitlines(keepends=True)[:done]))

    def __call__(self, report: StepReport) -> None:
        state = report.state
        line: dict[str, Any] = {
            "step": state.step,
            "loss": None,
            "lr": state.optimizer.param_groups[0]["lr"],
            "seconds": round(state.seconds, 3),
        }
        if state.erasure is not None and state.step % report.teacher.spec.probe_every == 0:
            line["erasure"] = state.erasure
        if state.readings and state.readings[-1]["step"] == state.step:
            line |= {"eta": state.eta, "preserve_weight": state.preserve_weight, "probe": state.readings[-1]}
        self._unwritten.append(line)
        if report.reads:
            self.leave(report)

    def leave(self, report: StepReport) -> None:
        """Write the lines that are not written yet."""
        losses = report.state.read_losses()
        lines = [json.dumps(line | {"loss": losses[line["step"]]}) + "\n" for line in self._unwritten]
        self._unwritten.clear()
        with reporting_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)


class Previews:
    """The same prompts and seeds, base above, student below: `previews/step_N.png`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._before: list[Image] | None = None

    def __call__(self, report: StepReport) -> None:
        if report.interrupted or report.last or report.state.step % report.teacher.spec.preview_every:
            return
        file = self.directory / f"previews/step_{report.state.step:05d}.png"
        with reporting_write_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        prompts = shown_prompts(report.teacher)
        self._before = self._before or paint_base(report.teacher, prompts)
        write_atomically(file, png(grid({"base": self._before, "erased": paint_student(report.teacher, prompts)}, prompts)))


def paint_samples(teacher: Teacher) -> dict[str, bytes]:
    """Return the pictures of a training that is done, base and student, by file name: a sheet, and some for the model card."""
    prompts = shown_prompts(teacher)
    before, erased = paint_base(teacher, prompts), paint_student(teacher, prompts)
    chosen = slice(None, None, -(-len(prompts) // SAMPLES))
    sheet = png(grid({"base": before, "erased": erased}, prompts))
    return {"samples/before_after.png": sheet, **sample_files(prompts[chosen], before[chosen], erased[chosen])}


def shown_prompts(teacher: Teacher) -> list[str]:
    """Return the prompts to look at: the first few erased ones, and as many preserved ones."""
    erased = dict.fromkeys(teacher.lessons[i].prompt for i in teacher.erased)
    preserved = [lesson.prompt for lesson in teacher.lessons if lesson.preserves]
    return [*list(erased)[:_PREVIEWED], *preserved[:_PREVIEWED]]


def paint_student(teacher: Teacher, prompts: Sequence[str]) -> list[Image]:
    """Paint prompts of the lessons with the denoiser as it stands, each from a seed of its own."""
    return paint(teacher.base, prompts, range(len(prompts)), encode=teacher.encode, batch=teacher.spec.walk_batch)


def paint_base(teacher: Teacher, prompts: Sequence[str]) -> list[Image]:
    """Paint prompts of the lessons with the adapter off."""
    with teacher.adapter_disabled():
        return paint_student(teacher, prompts)


class Checkpoints:
    """`checkpoint.pt`: now and then, and when the user interrupts."""

    def __init__(self, directory: Path, recipe: Recipe):
        self.directory, self.recipe = directory, dump_recipe(recipe)

    def __call__(self, report: StepReport) -> None:
        every = report.teacher.spec.checkpoint_every
        if report.interrupted or (every and report.state.step % every == 0):
            self.leave(report)

    def leave(self, report: StepReport) -> None:
        """Write a checkpoint of the last step."""
        report.state.save(self.directory, self.recipe, report.teacher.evaluations)


class Tracking:
    """Loss, learning rate and erasure to experiment trackers, through accelerate.

    Raises:
        EsdLoraError: If a tracker is unknown or not installed.
    """

    def __init__(self, names: Sequence[str], recipe: Recipe, directory: Path | None):
        from accelerate import Accelerator
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known = sorted(LOGGER_TYPE_TO_CLASS)
        installed = [str(tracker) for tracker in get_available_trackers()]
        for name in names:
            if name not in known:
                raise EsdLoraError(f"unknown tracker {name!r}{did_you_mean(name, known)}. Known: {', '.join(known)}.")
            if name not in installed:
                raise EsdLoraError(f"tracker {name!r} is not installed. Run: pip install {name}.")
        folder = directory / "tracking" if directory else Path("tracking")
        self.accelerator = Accelerator(log_with=list(names), project_dir=folder)
        settings = {
            key: value if isinstance(value, int | float | str | bool) else str(value)
            for key, value in recipe.train.model_dump().items()
            if value is not None
        }
        self.accelerator.init_trackers("esd-lora", config=settings)
        self._unsent: dict[int, dict[str, float]] = {}

    def __call__(self, report: StepReport) -> None:
        state = report.state
        self._unsent[state.step] = {"lr": state.optimizer.param_groups[0]["lr"]}
        if state.erasure is not None:
            self._unsent[state.step]["erasure"] = state.erasure
        if report.reads:
            self._send(state)
        if report.last:
            self._finish()

    def _send(self, state: TrainState) -> None:
        losses = state.read_losses()
        for step, values in self._unsent.items():
            self.accelerator.log({"loss": losses[step], **values}, step=step)
        self._unsent.clear()

    def _finish(self) -> None:
        for tracker in self.accelerator.trackers:  # `end_training` would part the ranks as well
            tracker.finish()

    def leave(self, report: StepReport) -> None:
        """Send what was not sent yet, and close the trackers."""
        self._send(report.state)
        self._finish()


def watchers_for(
    teacher: Teacher,
    state: TrainState,
    out: Path | None,
    track: Sequence[str],
    progress: bool,
    on_step: Sequence[Watcher],
    given: Recipe,
    solved: Solved | None,
    held_out: HeldOut | None = None,
) -> list[Watcher]:
    """Return the watchers that a recipe asks for, and the user's; those that write need a run directory.

    Args:
        teacher: Knows the recipe.
        state: Where the training begins.
        out: The run directory, if there is one and this is the rank that writes.
        track: Names of experiment trackers.
        progress: Whether to show a progress bar.
        on_step: The user's.
        given: The recipe as it was given, which a checkpoint is made with.
        solved: How far the closed form got, if there was one.
        held_out: Prompts to probe.
    """
    recipe, spec = teacher.recipe, teacher.spec
    watchers: list[Watcher] = []
    if spec.probe_every and not recipe.probed:
        watchers.append(ErasureProbe())
    watchers += [*on_step, check_losses, stop_together]  # those that may end the training first, so that all others know
    if track:
        watchers.append(Tracking(track, recipe, out))
    if progress:
        describe_start(teacher, solved)
        if spec.steps and not state.stopped:
            watchers.append(ProgressBar(teacher, state, held_out))
    if out is not None:
        watchers.append(JsonLog(out, state.step))
        if spec.preview_every:
            watchers.append(Previews(out))
    if out is not None:
        watchers.append(Checkpoints(out, given))  # last: what any of them decided is in it
    return watchers
