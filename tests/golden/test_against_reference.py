"""The package against the method written out a second time (reference.py), in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from esd_lora import lessons
from esd_lora.eraser import Eraser
from esd_lora.families import Base, load_base
from esd_lora.families.sd import StableDiffusion
from esd_lora.lessons import Teacher, plan
from esd_lora.objectives import Predictions, esd
from esd_lora.recipe import Recipe
from esd_lora.training import ADAPTER, add_adapter, train
from esd_lora.trajectory import Points, TrajectoryBuffer, walk
from golden import reference
from tiny import tiny_recipe

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
PROMPT = "a cat"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch, tiny_dir: Path) -> Base:
    """The toy base in float64; its schedule too, which diffusers tabulates in float32."""
    shipped = StableDiffusion.scheduler
    monkeypatch.setattr(StableDiffusion, "scheduler", lambda self, pipe: in_double(shipped(self, pipe)))
    return load_base(tiny_dir, dtype=torch.float64, device="cpu")


def in_double(scheduler: Any) -> Any:
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def predict(base: Base) -> reference.Predict:
    """The toy U-Net with some weights replaced, called as a plain function."""

    def call(weights: Mapping[str, Tensor], x_t: Tensor, t: int, text: Tensor) -> Tensor:
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        return torch.func.functional_call(base.model, named, (x_t, t, text)).sample

    return call


def test_objective_is_the_paper_s_target() -> None:
    generator = torch.Generator().manual_seed(0)
    null, concept, anchor = torch.randn(3, 5, 4, 8, 8, generator=generator, dtype=torch.float64)
    for eta in (0.0, 0.5, 1.0, 3.0):
        found = esd(Predictions(null, concept, anchor), torch.full((5, 1, 1, 1), eta, dtype=torch.float64))
        torch.testing.assert_close(found, reference.esd_target(null, concept, anchor, eta), **CLOSE)


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.0), (7, 3.0), (50, 3.0)])
def test_walk_is_guided_ddim(exact: Base, steps: int, guidance: float) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    texts = exact.encode(["", PROMPT, "a dog in the rain"])["text"]
    null, prompts = texts[:1].expand(2, -1, -1), texts[1:]
    scheduler = exact.family.scheduler(exact.pipe)
    found = walk(exact.predict, scheduler, noise, {"text": prompts}, {"text": null}, steps=steps, guidance=guidance)
    with torch.no_grad():
        expected = reference.guided_walk(
            lambda x_t, t, text: predict(exact)({}, x_t, t, text),
            noise,
            prompts,
            null,
            scheduler.alphas_cumprod,
            steps=steps,
            guidance=guidance,
        )
    assert [point.t.tolist() for point in found] == [[t, t] for _, t in expected]
    for point, (x_t, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(point.x_t, x_t, **CLOSE)


def test_schedule_is_the_base_s_own(base: Base) -> None:
    """Stable Diffusion's "scaled linear" betas: the square of a line between two square roots."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    found = base.family.scheduler(base.pipe).alphas_cumprod
    torch.testing.assert_close(found.double(), (1 - betas).cumprod(0), rtol=1e-5, atol=0)  # tabulated in float32
    assert isinstance(base.family.scheduler(base.pipe), DDIMScheduler)


def student_of(base: Base, recipe: Recipe) -> reference.Student:
    """The reference's student where `train` starts: A drawn from the recipe's seed."""
    frozen = dict(base.weights(base.family.modules(base.model, recipe.scope)))
    other = load_base(base.id, dtype=torch.float64, device="cpu")
    add_adapter(other, list(frozen), recipe.lora, recipe.train.seed)
    downs = {name: other.model.get_submodule(name).lora_A[ADAPTER].weight.detach() for name in frozen}
    return reference.Student(predict(base), frozen, downs, recipe.lora.alpha / recipe.lora.rank)


def assert_learned_the_same(eraser: Eraser, student: reference.Student) -> None:
    deltas = student.deltas()
    assert eraser.pairs.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert delta.norm() > 0
        assert (eraser.pairs[name].delta() - delta).norm() <= 1e-9 * delta.norm(), name


@pytest.mark.parametrize("eta", [1.0, 2.5])
def test_paper_preset_is_the_paper_s_loop(exact: Base, monkeypatch: pytest.MonkeyPatch, eta: float) -> None:
    small = {"steps": 5, "trajectory_steps": 6, "seed": 11, "lora": {"rank": 3, "alpha": 4.5}}
    recipe = tiny_recipe(exact.id, "paper", [PROMPT], preserve=[], eta=eta, **small)
    # The reference is told what chance drew.
    draws: list[tuple[Tensor, int]] = []

    def recorded(denoiser: Any, scheduler: Any, noise: Tensor, *conditions: Any, **shape: Any) -> Any:
        draws.append((noise, shape["stop"]))
        return walk(denoiser, scheduler, noise, *conditions, **shape)

    monkeypatch.setattr(lessons, "walk", recorded)
    losses: list[float] = []
    eraser = train(recipe, base=exact, progress=False, on_step=[lambda report: losses.append(report.state.loss)])
    assert len(draws) == 5
    assert len({stop for _, stop in draws}) > 1
    assert len({noise.sum().item() for noise, _ in draws}) == 5

    plain = load_base(exact.id, dtype=torch.float64, device="cpu")
    null, concept = plain.encode(["", PROMPT])["text"].split(1)
    student = student_of(plain, recipe)
    expected = reference.esd(
        student,
        draws,
        concept,
        null,
        exact.family.scheduler(exact.pipe).alphas_cumprod,
        trajectory_steps=6,
        guidance=3.0,
        eta=eta,
        lr=recipe.train.lr,
    )
    assert losses == pytest.approx(expected, rel=1e-9)
    assert all(".attn2." in name for name in student.frozen)
    assert_learned_the_same(eraser, student)


def test_fast_preset_replays_a_weighted_loss(exact: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"steps": 4, "batch_size": 3, "preserve_batch": 2, "preserve_weight": 0.25, "refresh_every": 3}
    recipe = tiny_recipe(exact.id, "fast", [PROMPT, "a car"], preserve=["a dog"], **small)
    batches: list[Points] = []
    as_usual = TrajectoryBuffer.sample

    def recorded(buffer: TrajectoryBuffer, count: int, generator: torch.Generator) -> Points:
        batches.append(as_usual(buffer, count, generator))
        return batches[-1]

    monkeypatch.setattr(TrajectoryBuffer, "sample", recorded)
    losses: list[float] = []
    eraser = train(recipe, base=exact, progress=False, on_step=[lambda report: losses.append(report.state.loss)])
    assert [len(batch.t) for batch in batches] == [3, 2] * 4
    assert len({batch.x_t.sum().item() for batch in batches}) == 8

    plain = load_base(exact.id, dtype=torch.float64, device="cpu")
    prompts = plain.encode([PROMPT, "a car", "a dog"])["text"]
    student = student_of(plain, recipe)
    for step, (erased, preserved) in enumerate(zip(batches[::2], batches[1::2], strict=True)):

        def error(points: Points) -> Tensor:
            """Sum over the points of each one's mean square error."""
            found = [student(x[None], t, prompts[i][None])[0] for x, t, i in zip(*points[:3], strict=True)]
            return sum(((a - b) ** 2).mean() for a, b in zip(found, points.target, strict=True))

        def loss(erased: Points = erased, preserved: Points = preserved) -> Tensor:
            return (error(erased) + 0.25 * error(preserved)) / 3

        assert set(erased.lesson.tolist()) <= {0, 1}
        assert set(preserved.lesson.tolist()) == {2}
        assert losses[step] == pytest.approx(student.learn(loss, reference.cosine(recipe.train.lr, step, 4)), rel=1e-9)
    assert_learned_the_same(eraser, student)


def test_fast_preset_s_targets_are_the_paper_s(exact: Base) -> None:
    """Erased with and without an anchor, another prompt to erase from, and a preserved one, on one buffer."""
    concepts = [
        PROMPT,
        {"name": "hat", "prompts": [{"prompt": "a hat", "anchor": "a head"}]},
        {"name": "boots", "erase_from": "cowboy"},
        {"name": "ink", "anchor": "ink"},
    ]
    recipe = tiny_recipe(exact.id, "fast", concepts, preserve=["a dog"], eta=1.5, trajectory_steps=5)
    assert recipe.train.x_t_from == "base"
    plans = plan(recipe)
    teacher = Teacher(exact, recipe, plans)
    add_adapter(exact, list(exact.family.modules(exact.model, "xattn")), recipe.lora, 0)
    chance = torch.Generator().manual_seed(5)
    buffer = teacher.fill(torch.arange(len(plans)), chance)
    assert len(buffer) == len(plans) * 5

    plain = load_base(exact.id, dtype=torch.float64, device="cpu")
    noise = torch.randn(len(plans), 4, 8, 8, generator=torch.Generator().manual_seed(5)).double()
    told = {
        0: (PROMPT, PROMPT, "", 1.5),
        1: ("a hat", "a hat", "a head", 1.5),
        2: ("cowboy", "boots", "", 1.5),
        3: ("ink", "ink", "ink", 1.5),
        4: ("a dog", "a dog", "a dog", 0.0),
    }

    @torch.no_grad()
    def says(text: Tensor, x_t: Tensor, t: int) -> Tensor:
        return predict(plain)({}, x_t, t, text)

    for lesson, (prompt, concept, anchor, eta) in told.items():
        null, prompted, erased, instead = plain.encode(["", prompt, concept, anchor])["text"].split(1)
        walked = reference.guided_walk(
            lambda x_t, t, text: says(text, x_t, t),
            noise[lesson : lesson + 1],
            prompted,
            null,
            exact.family.scheduler(exact.pipe).alphas_cumprod,
            steps=5,
            guidance=3.0,
        )
        mine = buffer.points.lesson == lesson
        found = zip(buffer.points.x_t[mine].split(1), buffer.points.t[mine], buffer.points.target[mine].split(1), strict=True)
        for (x_t, t, target), (expected_x_t, expected_t) in zip(found, walked, strict=True):
            assert t == expected_t
            torch.testing.assert_close(x_t, expected_x_t, **CLOSE)
            expected = reference.esd_target(says(null, x_t, t), says(erased, x_t, t), says(instead, x_t, t), eta)
            torch.testing.assert_close(target, expected, **CLOSE)
