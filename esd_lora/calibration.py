"""Calibration: what a training wants to know of the model in front of it, measured there instead of carried from another.

A recipe for a base that nobody tuned says `auto` where it cannot know a number. What is measured has no unit, so neither scales
of weights and latents nor the kind of model matter:

- **How large a step is.** `normalise_adapter` scales the fresh LoRA so that an update of size 1 changes what each layer puts
  out by as much as the layer puts out. Then one optimiser step is tried (`measure_rate`), and the learning rate is the one at
  which it takes `FIRST_STEP` of the push towards the concept away.
- **How far the student is.** A `Probe` compares student and base on prompts and trajectories that no step trains on, guided as
  pictures are sampled: how much of the push towards the concept is left, and how far kept prompts have drifted.
- **What is short.** `steer` raises the push (eta) where erasing stands still and no anchor is there to arrive at, weighs kept
  prompts by their drift, and begins the cool-down, in which the rate falls, once the concept is gone. If it came back
  meanwhile, the training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from esd_lora.adapter import ADAPTER, adapted_layers
from esd_lora.bases.base import Base
from esd_lora.erasers.header import Calibration, EraserHeader, Reading
from esd_lora.errors import EsdLoraError
from esd_lora.lessons import HeldOut, Lesson
from esd_lora.progress import stage
from esd_lora.ranks import from_main
from esd_lora.recipe import AUTO, Recipe, TrainSpec
from esd_lora.recognising import TRAJECTORIES, effects, warn_of_unknown
from esd_lora.seeds import probe_seed
from esd_lora.teacher import Teacher
from esd_lora.train_state import TrainState
from esd_lora.trajectory import NoisySample, Points

FIRST_STEP = 0.03
"""Share of the guided push towards the concept that the first optimiser step takes away: 2 to 10 %."""
_TRIED_RATE = 1e-3  # of the step that is tried first
_LOSS_SCALE = 1024  # of float16 gradients, which would vanish; Adam's steps do not depend on it
_STEPS = 5  # points of a probe's trajectory
TRIES = 2
"""Steps that are tried to measure the rate."""
_TRAJECTORIES = 4  # walked to measure the rate, for the gradient and as many for the effect
GONE, GONE_WORST = -0.25, 0.0
"""Residual of held-out prompts, on the mean and in the worst quarter, at which a concept counts as gone."""
ARRIVED, ARRIVED_WORST = 0.1, 0.2
"""The same where what should appear instead is a prompt of its own: nothing has to be pushed beyond it."""
DRIFT = 0.3
"""Drift of kept prompts, in units of what the prompt itself does, up to which a picture stays what it is."""
_STALE = 0.03  # less fall of the residual between two readings is standing still
_PATIENCE = 4  # probes without any fall, after which a training that cannot push harder cools down
_MOST_ETA = 5.0  # beyond it the targets are predictions of no picture
_LEAST_WEIGHT, _MOST_WEIGHT = 0.25, 4.0
FIRST_WEIGHT = 1.5
"""Weight of preserved points to begin with where it is measured."""
_LEAST_COOLING = 20  # steps


def normalise_adapter(base: Base, predict: Callable[[], object]) -> None:
    """Scale a fresh LoRA so that an update of size 1 changes what each layer puts out by as much as the layer puts out.

    With A scaled to a mean square of 1, and the product by `rms(W x) / rms(A x)`, both factors have no unit: scaling a layer's
    input or output, with the inverse next to it, leaves every later step of Adam's as it is.

    Args:
        base: Carries an adapter that is still zero.
        predict: Runs the layers over what is typical of them, without gradients.
    """
    sizes: dict[str, dict[str, list[Tensor]]] = {}
    layers = dict(adapted_layers(base))

    def measure(path: str, what: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(layer: Any, _inputs: Any, output: Tensor) -> None:
            bias = getattr(layer, "bias", None)
            if bias is not None:
                output = output - (bias if output.shape[-1] == len(bias) and output.dim() != 4 else bias[:, None, None])
            sizes.setdefault(path, {}).setdefault(what, []).append(output.float().square().mean())

        return hook

    with ExitStack() as hooks:
        for path, layer in layers.items():
            for what, part in (("W x", layer.base_layer), ("A x", layer.lora_A[ADAPTER])):
                hooks.callback(part.register_forward_hook(measure(path, what)).remove)
        with torch.no_grad():
            predict()
    for path, layer in layers.items():
        size = {what: float(torch.stack(squares).mean().sqrt()) for what, squares in sizes.get(path, {}).items()}
        down = layer.lora_A[ADAPTER].weight
        unit = float(down.detach().square().mean().sqrt())
        if size.get("A x") and size.get("W x"):  # a layer that reads or makes nothing has no size
            down.data.div_(unit)
            layer.scaling[ADAPTER] = size["W x"] / (size["A x"] / unit)


def measure_rate(teacher: Teacher, parameters: Sequence[torch.nn.Parameter], optimizer: Callable[[float], Any]) -> float:
    """Return the learning rate at which the first optimiser step takes `FIRST_STEP` of the push towards the concept away.

    Some trajectories give the gradient, others the effect, as a probe reads it: guided, so that what a step does to the empty
    prompt as well, which guidance cancels, does not count.

    Args:
        teacher: Its base carries a fresh adapter.
        parameters: The adapter's, which are left as they were.
        optimizer: Makes an optimiser of them with a rate.

    Raises:
        EsdLoraError: If a step takes nothing away.
    """
    with stage("measuring the learning rate"):
        return _measure_rate(teacher, parameters, optimizer)


def _measure_rate(teacher: Teacher, parameters: Sequence[torch.nn.Parameter], optimizer: Callable[[float], Any]) -> float:
    """Measure as `measure_rate` does."""
    spec = teacher.spec
    points, probe = prepare_rate(teacher)
    before = [parameter.detach().clone() for parameter in parameters]
    for part in points.split(spec.batch_size):
        prediction = teacher.base.predict(part.x_t, part.t, teacher.condition(part.lesson))
        loss = teacher.losses(prediction, part).sum() / len(points.t)
        (loss * (_LOSS_SCALE if teacher.base.model.dtype == torch.float16 else 1)).backward()
    rate = _TRIED_RATE
    for _ in range(TRIES):  # a step's effect grows in proportion, but for the largest: the second try corrects the first
        optimizer(rate).step()
        taken = 1 - probe.read(0).residual
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        if not taken > 0:
            raise EsdLoraError(
                f"lr: auto cannot be measured on base {teacher.base.id!r}: a step tried there takes {taken:.1e} of the push"
                " towards the concept away. Give a number (-s train.lr=1e-4), or load the base in float32 (--dtype float32)."
            )
        rate *= FIRST_STEP / taken
    for parameter in parameters:
        parameter.grad = None
    return rate


def prepare_rate(teacher: Teacher) -> tuple[Points, Probe]:
    """Return the points that give the gradient of the step to try, and what reads its effect; the adapter is normalised."""
    tried = (teacher.erased * _TRAJECTORIES)[:_TRAJECTORIES]
    generator = torch.Generator().manual_seed(probe_seed(teacher.spec.seed) + 1)
    lesson = torch.tensor(tried, device=teacher.base.model.device)
    points = teacher.fill(lesson, generator, _short(teacher.spec)).taught.points
    # On all points in every rank: what layers make of them is measured, those of text encoders too.
    normalise_adapter(
        teacher.base, lambda: teacher.predict(points.x_t, points.t, teacher.condition(points.lesson), shared=False)
    )
    return points, Probe(teacher, HeldOut([teacher.lessons[i][:3] for i in tried], []))


def _short(spec: TrainSpec) -> TrainSpec:
    return spec.model_copy(update={"x_t_from": "base", "points": "all", "trajectory_steps": _STEPS, "null_batch": 0})


class Probe:
    """Prompts and trajectories that no step trains on, with what the base predicts there.

    Pictures are made of guided predictions `G = null + g (prompted - null)`, so those are compared, at the guidance g that the
    base is sampled with (1 where trajectories are not guided):

        residual = 1 - <G(prompt) - G_student(prompt), way> / |way|^2,    way = g (concept - anchor)
        drift    = |G_student(kept) - G(kept)| / |G(kept) - null|

    A residual of 1 is the untouched base, 0 an anchor's picture, and less is pushed beyond it. Where the anchor is the prompt
    itself, from which something else is erased, the way is that of the concept from the empty prompt.

    Args:
        teacher: Knows the held-out prompts; its base's adapter may be on or off.
        held_out: From `lessons.hold_out`.
    """

    def __init__(self, teacher: Teacher, held_out: HeldOut):
        self.teacher = teacher
        self.guidance = 1.0 if teacher.spec.guidance == 1 else 1 + teacher.base.guidance - teacher.base.family.unguided
        self._prompts = [prompt for prompt, _, _ in held_out.erased] + list(held_out.kept)
        self._erased = len(held_out.erased)
        shape = teacher.base.latent_shape()
        generator = torch.Generator().manual_seed(probe_seed(teacher.spec.seed))
        bare = [name for name in held_out.concepts for _ in range(TRAJECTORIES)] if held_out.kept else []
        with stage("walking trajectories to probe on", len([*self._prompts, *bare]) * _STEPS, "point"):
            visited = teacher.walk_prompts(self._prompts, shape, generator, _short(teacher.spec))
            self.shares = self._shares(visited, bare, shape, generator)
            """Concept to how far its name moves predictions, in units of kept prompts'; below a threshold it is warned of."""
        warn_of_unknown(self.shares, teacher.base.id)
        self._x_t = torch.stack([sample.x_t for sample in visited], 1)
        """[prompts, steps, ...]."""
        self._t = torch.stack([sample.t for sample in visited], 1)
        with stage("preparing the probe"), teacher.adapter_disabled():
            self._null, self._prompted = self._predict([""] * len(self._prompts)), self._predict(self._prompts)
            concept = self._predict([concept for _, concept, _ in held_out.erased])
            anchor = self._predict(["" if anchor == prompt else anchor for prompt, _, anchor in held_out.erased])
        self._way = self.guidance * (concept - anchor)

    def _shares(
        self, visited: Sequence[NoisySample], bare: Sequence[str], shape: Sequence[int], generator: torch.Generator
    ) -> dict[str, float]:
        """Return how far concepts' names move predictions, each walked under `TRAJECTORIES` times, beside kept prompts."""
        usual = effects(visited)
        if usual is None or not bare:
            return {}
        own = effects(self.teacher.walk_prompts(bare, shape, generator, _short(self.teacher.spec)))
        assert own is not None, "walked like the others"
        reference = float(usual[self._erased :].median())
        names = list(dict.fromkeys(bare))
        means = own.reshape(len(names), TRAJECTORIES).mean(1).tolist()
        return {name: mean / reference for name, mean in zip(names, means, strict=True)} if reference else {}

    def _predict(self, prompts: Sequence[str]) -> Tensor:
        """Return the predictions under prompts at the points of as many trajectories, [prompts, steps, values]."""
        x_t, t = self._x_t[: len(prompts)], self._t[: len(prompts)]
        condition = self.teacher.encode([prompt for prompt in prompts for _ in range(x_t.shape[1])])
        return self.teacher.predict(x_t.flatten(0, 1), t.flatten(), condition).reshape(*x_t.shape[:2], -1)

    def read(self, step: int) -> Reading:
        """Return how far the student is, with the adapter as it stands.

        Args:
            step: Number of optimiser steps done.
        """
        with stage("probing how far it is"):
            null, prompted = self._predict([""] * len(self._prompts)), self._predict(self._prompts)
        guided = null + self.guidance * (prompted - null)
        of_base = self._null + self.guidance * (self._prompted - self._null)
        n, way = self._erased, self._way
        residual = 1 - ((of_base - guided)[:n] * way).sum((1, 2)) / way.square().sum((1, 2)).clamp_min(1e-12)
        effect = (of_base - self._null).square().sum((1, 2)).clamp_min(1e-12)
        drift = ((guided - of_base)[n:].square().sum((1, 2)) / effect[n:]).sqrt()
        worst = residual.sort(descending=True).values[: max(1, len(residual) // 4)]
        moved = (null - self._null)[:n].square().sum() / (self._prompted - self._null)[:n].square().sum().clamp_min(1e-12)
        reading = Reading(
            step=step,
            residual=float(residual.mean()),
            residual_worst=float(worst.mean()),
            drift=float(drift.mean()) if len(drift) else 0.0,
            drift_worst=float(drift.max()) if len(drift) else 0.0,
            null_drift=float(moved.sqrt()),
        )
        return from_main(lambda: reading)  # what ranks decide on is the same to the last bit


def steer(state: TrainState, reading: Reading, recipe: Recipe) -> bool:
    """Decide how a training goes on from what a probe read; return whether the push was raised, so that targets change.

    Args:
        state: Its etas, preserve weights and cool-down are set.
        reading: The latest.
        recipe: What it leaves to be measured.
    """
    spec, before = recipe.train, _reading_before(state, recipe.train)
    state.readings.append(reading.model_dump())
    state.erasure = 1 - reading.residual
    gone = is_gone(reading, anchored=state.anchored)
    weight = state.preserve_weight
    if reading.drift > DRIFT and (gone or not state.cooling):
        weight = min(weight * 1.3, _MOST_WEIGHT)
    elif reading.drift < DRIFT / 2 and not gone and not state.cooling:
        weight = max(weight / 1.3, _LEAST_WEIGHT)
    if spec.preserve_weight == AUTO and weight != state.preserve_weight:
        state.preserve_weights.append((state.step, weight))
    # An anchor is a place to arrive at: pushed beyond it, the concept becomes something else, and the anchor with it.
    may_push = recipe.eta == AUTO and not state.anchored and state.eta < _MOST_ETA
    came_back = False
    if state.cooling:
        was_gone = any(
            is_gone(Reading.model_validate(each), anchored=state.anchored)
            for each in state.readings
            if each["step"] == state.cooling
        )
        came_back = was_gone and not gone and state.step == last_step(spec, state.cooling) < spec.most_steps * 2 // 3
        if not came_back:
            return False
        state.cooling = 0
    stuck = not may_push and _stands_still(state)
    if spec.steps == AUTO and (gone or stuck or state.step >= spec.most_steps * 2 // 3):
        state.cooling = state.step
        return False
    stale = came_back or (before is not None and before["residual_worst"] - reading.residual_worst < _STALE)
    if gone or not stale or not may_push:
        return False
    # Held-out prompts go a share f of the way to their target: residual = 1 - f (1 + eta). Enough is eta = 1 / f - 1.
    share = max((1 - reading.residual_worst) / (1 + state.eta), 1e-3)
    wanted = min(max(1 / share - 1, state.eta + 0.5), state.eta + 1, _MOST_ETA)
    state.etas.append((state.step, wanted))
    return True


def _stands_still(state: TrainState) -> bool:
    """Return whether the last probes saw no more erased than those before them, so that more of the same would not either."""
    worst = [each["residual_worst"] for each in state.readings]
    return len(worst) > _PATIENCE and min(worst[:-_PATIENCE]) - min(worst[-_PATIENCE:]) < _STALE


def _reading_before(state: TrainState, spec: TrainSpec) -> dict[str, float] | None:
    """Return the reading to compare the next one with, to see whether erasing stands still.

    That is the one before; where the student walks, whose trajectories are soon learnt, one since which it walked anew.
    """
    if spec.x_t_from != "student":
        return state.readings[-1] if state.readings else None
    since, until = state.etas[-1][0], state.step - spec.walk_every
    return next((each for each in reversed(state.readings) if since <= each["step"] <= until), None)


def last_step(spec: TrainSpec, cooling: int) -> int:
    """Return the number of the step that ends a training: with `steps: auto`, of the cool-down if it began."""
    if spec.steps != AUTO or not cooling:
        return spec.most_steps
    probes = -(-max(_LEAST_COOLING, cooling // 2) // spec.probe_every)  # whole ones, so that the end is read
    return min(cooling + probes * spec.probe_every, spec.most_steps)


def gone_at(*, anchored: bool) -> tuple[float, float]:
    """Return the residual on the mean and in the worst quarter at which a concept is gone."""
    return (ARRIVED, ARRIVED_WORST) if anchored else (GONE, GONE_WORST)


def is_gone(reading: Reading, *, anchored: bool) -> bool:
    """Return whether nothing draws towards the concept any more."""
    mean, worst = gone_at(anchored=anchored)
    return reading.residual <= mean and reading.residual_worst <= worst


def is_content(reading: Reading, *, anchored: bool) -> bool:
    """Return whether nothing is short: the concept is gone, and kept prompts stay what they are."""
    return is_gone(reading, anchored=anchored) and reading.drift <= DRIFT


def in_words(reading: Reading, *, anchored: bool) -> str:
    """Return in a few words how far a training is: `gone, kept prompts moved 0.3 %`; nothing of these where none is kept."""
    gone = "gone" if is_gone(reading, anchored=anchored) else f"{100 * min(max(1 - reading.residual, 0), 0.99):.0f} % gone"
    return f"{gone}, kept prompts moved {100 * reading.drift:.1f} %" if reading.drift else gone


def verdict(reading: Reading, *, anchored: bool, by_words: bool = False) -> str:
    """Return in a sentence what a training came to, and what to do if it is short.

    Args:
        reading: The last one.
        anchored: As for `is_gone`.
        by_words: Whether words that were learnt from pictures stand for the concept, which no further step helps.
    """
    left, worst = (f"{100 * x:.0f} %" if x > 0 else "nothing" for x in (reading.residual, reading.residual_worst))
    measured = f"of the push towards it {left} is left on prompts that no step trained on, {worst} in their worst quarter"
    if is_gone(reading, anchored=anchored):
        gone = f"gone at the guidance that pictures are sampled with ({measured})"
    else:
        most = " and ".join(f"{100 * x:.0f} %" for x in gone_at(anchored=anchored))
        remedy = "train longer (-s train.steps=400), at a higher rank (-s lora.rank=8) or in more layers (--scope full)"
        if by_words:
            remedy = "give more pictures, some in every style and place that it may be drawn in"
        gone = f"short: not gone ({measured}; gone is up to {most}): {remedy}"
    if not reading.drift:  # to the last bit: no prompt is kept
        return gone
    kept = f"kept prompts moved {100 * reading.drift:.1f} %"
    if reading.drift > DRIFT:
        kept = f"short: {kept}, beyond {100 * DRIFT:.0f} % they may draw something else: --guard those that matter most"
    return f"{gone}; {kept}"


def outcome(header: EraserHeader) -> str:
    """Return in a few words what a measured training came to; nothing where none was measured.

    Args:
        header: Of its eraser.
    """
    readings = [reading for calibration in header.calibrations for reading in calibration.readings]
    lessons = [Lesson(prompt, prompt, anchor, 0.0) for concept in header.concepts for prompt, anchor in concept.pairs]
    return in_words(readings[-1], anchored=all(lesson.replaces for lesson in lessons)) if readings else ""


def ending(state: TrainState) -> str:
    """Return in a sentence how a measured training ended, and what is short."""
    if not state.readings:
        return f"ended after {state.step} steps, without a probe"
    reading = Reading.model_validate(state.readings[-1])
    mean, worst = gone_at(anchored=state.anchored)
    gone = "gone" if is_gone(reading, anchored=state.anchored) else f"short: gone is up to {mean:.0%} and {worst:.0%}"
    kept = "kept" if reading.drift <= DRIFT else f"short: kept is up to {DRIFT:.0%}"
    return (
        f"ended after {state.step} steps: of the push towards the concept {reading.residual:.0%} is left on held-out prompts,"
        f" {reading.residual_worst:.0%} in their worst quarter ({gone}); kept prompts drifted by {reading.drift:.0%} of what"
        f" they do ({kept})"
    )


def calibration_of(state: TrainState) -> Calibration:
    """Return the record of what a training measured, for the header."""
    return Calibration(
        lr=state.lr,
        etas=tuple(state.etas),
        preserve_weights=tuple(state.preserve_weights),
        evaluations=state.measured,
        readings=tuple(Reading.model_validate(reading) for reading in state.readings),
        ending=ending(state),
    )
