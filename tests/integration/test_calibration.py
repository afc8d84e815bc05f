"""What `auto` measures: a step of a given size, what is left and what drifted, and how a training goes on from that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from esd_lora import training
from esd_lora.adapter import add_adapter
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.calibration import DRIFT, FIRST_STEP, GONE, Probe, ending, last_step, measure_rate, steer
from esd_lora.erasers.eraser import CURVES_NAME, LOG_NAME, Eraser
from esd_lora.erasers.header import Reading
from esd_lora.errors import EsdLoraError
from esd_lora.lessons import HeldOut, first_eta, frames_for, hold_out, likeness_to, plan
from esd_lora.optimizers import make_optimizer
from esd_lora.recipe import Recipe
from esd_lora.seeds import probe_seed
from esd_lora.teacher import ReplayBuffers, Teacher, refill
from esd_lora.train_state import TrainState
from esd_lora.training import train
from tiny import save_tiny, tiny_recipe

KEEP = ["a dog", "a hat", "a dog in a park", "a hat in a park", "a car in a park", "a car"]
AUTOS: dict[str, object] = {
    "eta": "auto",
    "frames": "auto",
    "lr": "auto",
    "steps": "auto",
    "preserve_weight": "auto",
    "probe_every": 2,
    "preserve": KEEP,
}


def auto_recipe(base: Path | str, **settings: object) -> Recipe:
    return tiny_recipe(base, **{**AUTOS, **settings})


@pytest.fixture
def base(tiny_dir: Path) -> Base:
    return load_base(tiny_dir)


def measuring(base: Base, recipe: Recipe) -> tuple[Teacher, list[torch.nn.Parameter]]:
    lessons = plan(recipe)
    teacher = Teacher(base, recipe, lessons, (), hold_out(recipe, lessons, base.keep, base.encode).prompts())
    return teacher, add_adapter(base, base.family.modules(base.model, recipe.scope), recipe.lora, 0)


@pytest.mark.parametrize("scope", ["xattn", "noxattn"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_first_step_goes_a_given_part_of_the_way(base: Base, scope: str, optimizer: str) -> None:
    recipe = auto_recipe(base.id, scope=scope, optimizer=optimizer)
    teacher, parameters = measuring(base, recipe)
    before = [parameter.detach().clone() for parameter in parameters]

    def make(lr: float) -> torch.optim.Optimizer:
        return make_optimizer(optimizer, parameters, lr, {})

    rate = measure_rate(teacher, parameters, make)
    assert all(not p.grad.any() for p in parameters if p.grad is not None)
    up = [p for p in parameters if not p.any()]
    assert len(up) == len(before) // 2, "the update is still zero"
    few = recipe.train.model_copy(update={"trajectory_steps": 5, "points": "all", "x_t_from": "base"})
    generator = torch.Generator().manual_seed(probe_seed(recipe.train.seed) + 1)
    tried = (teacher.erased * 4)[:4]
    learned = teacher.fill(torch.tensor(tried), generator, few).taught.points
    probe = Probe(teacher, HeldOut([teacher.lessons[i][:3] for i in tried], []))
    prediction = base.predict(learned.x_t, learned.t, teacher.condition(learned.lesson))
    (prediction - learned.target).square().flatten(1).mean().backward()
    make(rate).step()
    assert 1 - probe.read(1).residual == pytest.approx(FIRST_STEP, rel=0.2)


def scaled_text(folder: Path, factor: float) -> Path:
    """The tiny base with its text embeddings scaled, and the weights that read them scaled back: the same function."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(save_tiny(folder / "plain"))
    with torch.no_grad():
        for parameter in pipe.text_encoder.final_layer_norm.parameters():
            parameter.mul_(factor)
        for name, module in pipe.unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                module.weight.div_(factor)
    pipe.save_pretrained(folder / "scaled")
    return folder / "scaled"


def trained_predictions(place: Path, recipe: Recipe) -> torch.Tensor:
    from esd_lora.adapter import applied

    base = load_base(place)
    eraser = train(recipe.model_copy(update={"base": str(place)}), base=base, progress=False)
    x_t, t = torch.randn(2, *base.latent_shape(), generator=torch.Generator().manual_seed(0)), torch.tensor([300, 700])
    with torch.no_grad():
        before = base.predict(x_t, t, base.encode(["a cat"] * 2))
        with applied(base, [eraser]):
            return base.predict(x_t, t, base.encode(["a cat"] * 2)) - before


def test_scales_of_weights_do_not_matter(tmp_path: Path) -> None:
    """Embeddings 4 times as large, read by weights a fourth as large, compute the same; `auto` learns the same there."""
    scaled = scaled_text(tmp_path, 4.0)
    measured = tiny_recipe("any", lr="auto", steps=6, batch_size=4, preserve=[])
    fixed = tiny_recipe("any", lr=0.02, steps=6, batch_size=4, preserve=[])

    def difference(recipe: Recipe) -> float:
        one, other = (trained_predictions(place, recipe) for place in (tmp_path / "plain", scaled))
        return float((one - other).norm() / one.norm())

    assert difference(measured) < 0.02
    assert difference(fixed) > 0.1


def test_a_probe_of_the_untouched_base(base: Base) -> None:
    recipe = auto_recipe(base.id)
    teacher, _ = measuring(base, recipe)
    reading = Probe(teacher, hold_out(recipe, plan(recipe), base.keep, base.encode)).read(0)
    assert (reading.residual, reading.residual_worst) == pytest.approx((1, 1), abs=1e-5)
    assert (reading.drift, reading.drift_worst, reading.null_drift) == pytest.approx((0, 0, 0), abs=1e-5)


def test_a_probe_reads_what_its_formula_says(base: Base) -> None:
    """Against loops over prompts and points in float64."""
    recipe = auto_recipe(base.id)
    teacher, parameters = measuring(base, recipe)
    held_out = hold_out(recipe, plan(recipe), base.keep, base.encode)
    probe = Probe(teacher, held_out)
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    reading, g = probe.read(7), base.guidance

    def predicted(prompt: str, row: int, step: int) -> torch.Tensor:
        with torch.no_grad():
            return base.predict(probe._x_t[row, step][None], probe._t[row, step][None], base.encode([prompt])).double()

    residuals, drifts = [], []
    rows = [*((prompt, anchor) for prompt, _, anchor in held_out.erased), *((kept, "") for kept in held_out.kept)]
    for row, (prompt, anchor) in enumerate(rows):
        over = under = moved = effect = 0.0
        for step in range(probe._x_t.shape[1]):
            student = [predicted(text, row, step) for text in ("", prompt)]
            with teacher.adapter_disabled():
                null, concept, aim = (predicted(text, row, step) for text in ("", prompt, anchor))
            guided = student[0] + g * (student[1] - student[0])
            way = g * (concept - aim)
            over += float(((guided - (null + g * (aim - null))) * way).sum())
            under += float(way.square().sum())
            moved += float((guided - (null + g * (concept - null))).square().sum())
            effect += float((g * (concept - null)).square().sum())
        if row < len(held_out.erased):
            residuals.append(over / under)
        else:
            drifts.append((moved / effect) ** 0.5)
    worst = sorted(residuals)[-max(1, len(residuals) // 4) :]
    assert reading.step == 7
    assert reading.residual == pytest.approx(sum(residuals) / len(residuals), rel=1e-3)
    assert reading.residual_worst == pytest.approx(sum(worst) / len(worst), rel=1e-3)
    assert (reading.drift, reading.drift_worst) == pytest.approx((sum(drifts) / len(drifts), max(drifts)), rel=1e-3)


def test_held_out_prompts_are_in_no_lesson(base: Base) -> None:
    style = {"name": "ink", "prompts": [{"prompt": "{x} in ink", "anchor": "{x}"}], "fill": ["a cat", "a car"]}
    for concept in ("a cat", style, {"name": "nudity", "prompts": ["nudity", "a nude man"]}):
        recipe = tiny_recipe(base.id, concepts=[concept], preserve=KEEP, frames="auto")
        lessons = plan(recipe)
        held_out = hold_out(recipe, lessons, base.keep, base.encode)
        trained = {text for lesson in lessons for text in lesson[:3]}
        assert held_out.erased
        assert held_out.kept
        assert not trained & {prompt for prompt, _, _ in held_out.erased}
        assert not trained & set(held_out.kept)
        assert not [kept for kept in held_out.kept if recipe.concepts[0].named_in(kept)]
    recipe = tiny_recipe(base.id, concepts=[style], preserve=KEEP)
    assert ("a dog in ink", "a dog in ink", "a dog") in hold_out(recipe, plan(recipe), base.keep, base.encode).erased


def test_frames_are_what_stands_around_several_preserved_prompts() -> None:
    recipe = tiny_recipe("emoji", preserve=KEEP, frames="auto")
    trained, probed = frames_for(recipe, KEEP)
    assert trained[0] == "{} in a park"
    assert "a photo of {}" in trained
    assert probed
    assert not set(trained) & set(probed)
    assert {"a cat", "a cat in a park", "a photo of a cat"} <= {lesson.prompt for lesson in plan(recipe)}
    named = recipe.model_copy(update={"frames": ("two of {}",)})
    assert [lesson.prompt for lesson in plan(named)][:2] == ["a cat", "two of a cat"]
    assert "two of {}" not in frames_for(named, KEEP)[1]


def state_of(step: int, *, eta: float = 1.0) -> TrainState:
    state = TrainState([], torch.optim.SGD([torch.zeros(1)]), torch.amp.GradScaler(enabled=False))
    state.step, state.etas, state.preserve_weights = step, [(0, eta)], [(0, 1.0)]
    return state


def reading(step: int, worst: float, drift: float = 0.25) -> Reading:
    return Reading(step=step, residual=worst, residual_worst=worst, drift=drift, drift_worst=drift, null_drift=0)


def test_gone_begins_the_cool_down_which_ends_the_training() -> None:
    recipe = auto_recipe("emoji")
    state = state_of(60)
    assert last_step(recipe.train, state.cooling) == recipe.train.most_steps
    assert not steer(state, reading(60, GONE), recipe)
    assert state.cooling == 60
    assert last_step(recipe.train, state.cooling) == 90
    assert "short" not in ending(state)


def test_what_came_back_while_cooling_is_trained_on_with_a_stronger_push() -> None:
    recipe = auto_recipe("emoji")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"probe_every": 15})})
    state = state_of(60)
    steer(state, reading(60, GONE), recipe)
    for step, raised in ((75, False), (90, True)):
        state.step = step
        assert steer(state, reading(step, 0.3), recipe) == raised
    assert state.cooling == 0
    assert state.etas[-1][0] == 90
    assert last_step(recipe.train, state.cooling) == recipe.train.most_steps
    state.step = 105
    steer(state, reading(105, GONE), recipe)
    assert last_step(recipe.train, state.cooling) == 165, "whole probes: half of 105 and a little more"
    state.step = 165
    steer(state, reading(165, GONE), recipe)
    assert (state.cooling, "short" in ending(state)) == (105, False)


def test_what_came_back_late_ends_the_training_all_the_same() -> None:
    recipe = auto_recipe("emoji")
    state = state_of(240)
    steer(state, reading(240, GONE), recipe)
    state.step = last_step(recipe.train, state.cooling)
    assert state.step == 360
    assert not steer(state, reading(360, 0.3), recipe)
    assert state.cooling == 240
    assert "short" in ending(state)


def test_student_that_walks_stands_still_after_new_trajectories_alone() -> None:
    """What was learnt by heart looks like standing still, until the student walks anew."""
    auto = auto_recipe("emoji", x_t_from="student", refresh_every=30)
    recipe = auto.model_copy(update={"train": auto.train.model_copy(update={"probe_every": 15})})
    state = state_of(0)
    raised: list[int] = []
    for step in range(15, 135, 15):
        state.step = step
        if steer(state, reading(step, 0.6), recipe):
            raised.append(step)
    assert raised == [45, 75, 105]
    as_ever = state_of(15)
    for step in (15, 30):
        as_ever.step = step
        steer(as_ever, reading(step, 0.6), auto_recipe("emoji"))
    assert as_ever.etas[-1][0] == 30


def test_standing_still_raises_the_push_and_falling_does_not() -> None:
    recipe = auto_recipe("emoji")
    state = state_of(20)
    assert not steer(state, reading(20, 0.9), recipe), "nothing to compare with"
    assert not steer(state, reading(40, 0.6), recipe), "it falls"
    state.step = 60
    assert steer(state, reading(60, 0.6), recipe)
    assert state.etas == [(0, 1.0), (60, 2.0)]  # a share of .2 of the way wants 4, in steps of up to 1
    assert not steer(state, reading(80, 0.3), recipe)
    fixed = state_of(60)
    fixed.readings = [reading(40, 0.6).model_dump()]
    assert not steer(fixed, reading(60, 0.6), recipe.model_copy(update={"eta": 1.0}))


def test_drift_weighs_kept_prompts_up_and_room_weighs_them_down() -> None:
    recipe = auto_recipe("emoji")
    for drift, factor in ((2 * DRIFT, 1.3), (0.9 * DRIFT, 1.0), (0.4 * DRIFT, 1 / 1.3)):
        state = state_of(20)
        steer(state, reading(20, 0.9, drift), recipe)
        assert state.preserve_weight == pytest.approx(factor)
    given = recipe.model_copy(update={"train": recipe.train.model_copy(update={"preserve_weight": 1.0})})
    state = state_of(20)
    steer(state, reading(20, 0.9, 2 * DRIFT), given)
    assert state.preserve_weights == [(0, 1.0)]


def test_what_is_short_is_told() -> None:
    recipe = auto_recipe("emoji")
    state = state_of(300)
    steer(state, reading(300, 0.8, 2 * DRIFT), recipe)
    assert state.cooling == 300, "two thirds of the most steps: time to cool down"
    assert ending(state).count("short") == 2


def test_a_measured_training(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esd_lora.recipe._MOST_STEPS", 12)
    eraser = train(auto_recipe(tiny_dir), out=tmp_path / "run", progress=False)
    (calibration,) = Eraser.load(tmp_path / "run").header.calibrations
    assert calibration == eraser.header.calibrations[0]
    assert calibration.etas[0] == (0, 1.0)
    assert eraser.header.concepts[0].eta == calibration.etas[-1][1]
    steps = [reading.step for reading in calibration.readings]
    assert steps == list(range(2, int(eraser.header.cost["steps"]) + 1, 2))
    assert calibration.evaluations <= eraser.header.cost["sample_evaluations"]
    with Image.open(tmp_path / "run" / CURVES_NAME) as plot:
        assert plot.size == (900, 460)
        assert len(plot.convert("RGB").getcolors(2**24)) > 8
    log = [json.loads(line) for line in (tmp_path / "run" / LOG_NAME).read_text().splitlines()]
    assert [line["probe"]["step"] for line in log if "probe" in line] == steps


class CrashError(Exception):
    """Ends a run as a crash would."""


def test_a_measured_training_resumes_bit_for_bit(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esd_lora.recipe._MOST_STEPS", 12)
    monkeypatch.setattr("esd_lora.calibration._STALE", 10.0)  # every reading raises the push
    recipe = auto_recipe(tiny_dir, checkpoint_every=5)
    whole = train(recipe, out=tmp_path / "whole", progress=False)

    def crash(report: Any) -> None:
        if report.state.step == 6:
            raise CrashError

    with pytest.raises(CrashError):
        train(recipe, out=tmp_path / "broken", progress=False, on_step=[crash])
    resumed = train(recipe, out=tmp_path / "broken", progress=False, resume=True)
    assert len(whole.header.calibrations[0].etas) > 2
    assert resumed.header.calibrations == whole.header.calibrations
    for path, pair in whole.pairs.items():
        assert torch.equal(pair.up, resumed.pairs[path].up)
        assert torch.equal(pair.down, resumed.pairs[path].down)


def test_auto_needs_a_probe() -> None:
    with pytest.raises(EsdLoraError, match=r"set train\.probe_every"):
        tiny_recipe("emoji", eta="auto")


def test_a_rate_that_cannot_be_measured(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, parameters = measuring(base, auto_recipe(base.id))
    monkeypatch.setattr("esd_lora.calibration.Probe.read", lambda *_: reading(0, 1.0))
    with pytest.raises(EsdLoraError, match=r"-s train\.lr=1e-4"):
        measure_rate(teacher, parameters, lambda lr: torch.optim.Adam(parameters, lr=lr))


def test_the_header_names_every_prompt_that_was_trained_on(tiny_dir: Path) -> None:
    """So that nobody measures on prompts that the eraser knows."""
    recipe = tiny_recipe(tiny_dir, preserve=KEEP, frames="auto")
    (concept,) = train(recipe, progress=False).header.concepts
    assert [prompt for prompt, _ in concept.pairs] == [lesson.prompt for lesson in plan(recipe) if not lesson.preserves]
    assert ("a cat in a park", "") in concept.pairs


def test_a_rate_that_is_measured_alone_is_recorded(tiny_dir: Path, tmp_path: Path) -> None:
    (calibration,) = train(tiny_recipe(tiny_dir, lr="auto"), out=tmp_path / "run", progress=False).header.calibrations
    assert calibration.lr > 0
    assert (calibration.readings, calibration.ending) == ((), "ended after 4 steps, without a probe")
    assert not (tmp_path / "run" / CURVES_NAME).exists()


def test_the_rate_is_measured_in_as_little_memory_as_the_training_takes(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    from esd_lora import training

    checkpointing: list[bool] = []

    def measure(*_: object) -> float:
        checkpointing.append(base.model.is_gradient_checkpointing)
        return 1e-3

    monkeypatch.setattr(training, "measure_rate", measure)
    train(tiny_recipe(base.id, lr="auto", gradient_checkpointing=True), base=base, progress=False)
    assert checkpointing == [True]
    assert not base.model.is_gradient_checkpointing


def test_nearness_is_told_in_parts(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"a hat {i}" for i in range(7)]
    whole = likeness_to(["a cat", "a dog"], prompts, base)
    monkeypatch.setattr("esd_lora.lessons._COMPARED_AT_ONCE", 3)
    torch.testing.assert_close(likeness_to(["a cat", "a dog"], prompts, base), whole)
    assert whole.shape == (2, 7)


@pytest.mark.parametrize("preserved", [0, 2])
def test_the_empty_prompt_is_held_as_at_the_beginning(base: Base, monkeypatch: pytest.MonkeyPatch, preserved: int) -> None:
    """Where kept prompts leave room their weight falls; guidance would take an erasure back if the empty prompt's fell too."""

    def trained(weight: float) -> Eraser:
        def lighter(state: TrainState, *_: object) -> bool:
            state.preserve_weights.append((state.step, weight))
            return False

        monkeypatch.setattr(training, "steer", lighter)
        recipe = tiny_recipe(base.id, preserve_weight="auto", probe_every=1, null_batch=2, preserve_batch=preserved)
        return train(recipe, base=base, progress=False)

    one, other = trained(0.25), trained(4.0)
    same = [torch.equal(pair.up, other.pairs[path].up) for path, pair in one.pairs.items()]
    assert all(same) == (preserved == 0)


def test_raised_push_moves_the_targets_that_are_there(base: Base) -> None:
    """No prediction is made again."""
    teacher, _ = measuring(base, auto_recipe(base.id, x_t_from="base"))

    def filled(eta: float) -> ReplayBuffers:
        teacher.push(eta)
        return refill(teacher, 0, [base.latent_shape()])[0]

    buffers, pushed = filled(1.0), filled(2.0)
    teacher.push(1.0)
    before = buffers.erasing.points.target
    teacher.push(2.0, [buffers])
    assert not torch.equal(buffers.erasing.points.target, before)
    torch.testing.assert_close(buffers.erasing.points.target, pushed.erasing.points.target)


def test_nothing_is_pushed_beyond_an_anchor() -> None:
    """Where a dog replaces the cat, a stronger push would make something else of both."""
    recipe = auto_recipe("emoji", concepts=[{"name": "a cat", "anchor": "a dog"}])
    assert first_eta(recipe) == 0
    state = state_of(0)
    state.anchored, state.etas = True, [(0, 0.0)]
    for step in range(20, 320, 20):
        state.step = step
        assert not steer(state, reading(step, 0.6), recipe)
    assert state.etas == [(0, 0.0)]


def test_what_stands_still_and_cannot_be_pushed_harder_cools_down() -> None:
    recipe = auto_recipe("emoji", concepts=[{"name": "a cat", "anchor": "a dog"}])
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"probe_every": 15})})
    state = state_of(0)
    state.anchored, state.etas = True, [(0, 0.0)]
    falls = [0.9, 0.6, 0.45, 0.4, 0.41, 0.39, 0.42]
    for number, worst in enumerate(falls, 1):
        state.step = 15 * number
        steer(state, reading(state.step, worst), recipe)
        assert not state.cooling
    state.step = 120
    steer(state, reading(120, 0.4), recipe)
    assert state.cooling == 120, "four probes no better than the four before"
    state.step = last_step(recipe.train, state.cooling)
    steer(state, reading(state.step, 0.4), recipe)
    assert (state.cooling, state.step) == (120, 180), "nothing came back that was never gone"
    pushed = state_of(0)
    for number, worst in enumerate([*falls, 0.4], 1):
        pushed.step = 15 * number
        steer(pushed, reading(pushed.step, worst), auto_recipe("emoji"))
    assert not pushed.cooling, "it is pushed harder instead"


def test_probe_does_not_read_what_is_no_number(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are read now and then, but in any case before a probe looks at what they made of the student."""
    recipe = auto_recipe(base.id, lr=1e-3, steps=20)
    as_usual, steps = Base.predict, []

    def predict(self: Base, *given: Any) -> torch.Tensor:
        return as_usual(self, *given) * (float("nan") if torch.is_grad_enabled() and len(steps) else 1.0)

    monkeypatch.setattr(Base, "predict", predict)
    with pytest.raises(EsdLoraError, match=r"the loss became nan at step 2: lower train\.lr"):
        train(recipe, base=base, progress=False, on_step=[lambda report: steps.append(report.state.step)])
