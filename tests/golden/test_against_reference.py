"""The package against the method written out a second time (reference.py), in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from esd_lora import teacher as teacher_module
from esd_lora.adapter import ADAPTER, add_adapter
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.families.family import ModelFamily
from esd_lora.lessons import plan
from esd_lora.objectives import Predictions, esd
from esd_lora.recipe import Recipe
from esd_lora.teacher import Teacher
from esd_lora.training import train
from esd_lora.trajectory import Condition, Points, TrajectoryBuffer, concatenate, walk
from golden import reference
from tiny import tiny_recipe
from toys import TOYS, load_toy, save_toy

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
PROMPT = "a cat"
BETAS: dict[str, dict[str, Any]] = {"kolors": {"end": 0.014, "trained": 1100}}
"""Noise schedules that are not Stable Diffusion's."""
SAMPLERS: dict[str, Callable[[int], reference.Sampler]] = {
    "sd": lambda steps: reference.ddim(steps, "leading", "epsilon"),
    "sd2-v": lambda steps: reference.ddim(steps, "trailing", "v_prediction"),
    "sdxl": lambda steps: reference.ddim(steps, "leading", "epsilon"),
    "sd3": lambda steps: reference.euler(reference.flow_grid(steps, 3.0, from_one=False)),
    "sd35": lambda steps: reference.euler(reference.flow_grid(steps, 3.0, from_one=False)),
    "flux-dev": lambda steps: reference.euler(reference.flow_grid(steps, reference.flux_shift(4 * 4), from_one=True)),
    "flux-schnell": lambda steps: reference.euler(reference.flow_grid(steps, 1.0, from_one=True)),
    "sana": lambda steps: reference.euler(reference.flow_grid(steps, 3.0, from_one=True)),
    "pixart": lambda steps: reference.ddim(steps, "linspace", "epsilon", reference.linear()),
    "lumina2": lambda steps: reference.euler(reference.flow_grid(steps, 6.0, from_one=True)),
    "qwen-image": lambda steps: reference.euler(reference.qwen_grid(steps, 4 * 4)),
    "kolors": lambda steps: reference.ddim(steps, "leading", "epsilon", reference.scaled_linear(**BETAS["kolors"]), 1100),
    "flux2-klein": lambda steps: reference.euler(
        reference.flow_grid(steps, reference.flux2_shift(4 * 4, steps), from_one=True)
    ),
    "flux2-dev": lambda steps: reference.euler(reference.flow_grid(steps, reference.flux2_shift(4 * 4, steps), from_one=True)),
    "z-image": lambda steps: reference.euler(reference.flow_grid(steps, 3.0, from_one=True)),
    "wan": lambda steps: reference.euler(reference.flow_grid(steps, 3.0, from_one=True, last=1 / 1000)),
}
"""The schedule of each toy, written down a second time."""


def in_double(scheduler: Any, **betas: Any) -> Any:
    """The scheduler with a table in float64 in place of diffusers' float32 one, once it has been found to be the same."""
    ddim = getattr(scheduler, "_ddim", scheduler)
    if isinstance(ddim, DDIMScheduler):
        exact = reference.linear() if ddim.config.beta_schedule == "linear" else reference.scaled_linear(**betas)
        torch.testing.assert_close(ddim.alphas_cumprod.double(), exact, rtol=1e-5, atol=0)
        ddim.alphas_cumprod, ddim.final_alpha_cumprod = exact, exact[0]
    return scheduler


def flow_in_double(scheduler: Any, grid: list[float]) -> Any:
    """As `in_double`; flow schedulers make their table for each number of steps."""
    exact = torch.tensor(grid, dtype=torch.float64)
    torch.testing.assert_close(scheduler.sigmas.double(), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scheduler.timesteps.double(), 1000 * exact[:-1], rtol=1e-5, atol=0)
    scheduler.sigmas, scheduler.timesteps = exact, 1000 * exact[:-1]
    return scheduler


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch, tiny_dir: Path) -> Base:
    """The toy base in float64."""
    shipped = ModelFamily.scheduler
    monkeypatch.setattr(ModelFamily, "scheduler", lambda *args: in_double(shipped(*args)))
    return load_base(tiny_dir, dtype=torch.float64, device="cpu")


class _Denoiser(nn.Module):
    """A base's denoiser as a module, so that torch can call it with some weights replaced."""

    def __init__(self, base: Base):
        super().__init__()
        self.base, self.denoiser = base, base.model

    def forward(self, x_t: Tensor, t: float, told: Condition) -> Tensor:
        return self.base.predict(x_t, torch.full((len(x_t),), t, dtype=x_t.dtype), told)


def predict(base: Base) -> reference.Predict:
    """The toy denoiser with some weights replaced, called as a plain function."""
    whole = _Denoiser(base)

    def call(weights: Mapping[str, Tensor], x_t: Tensor, t: float, told: Condition) -> Tensor:
        named = {f"denoiser.{name}.weight": weight for name, weight in weights.items()}
        return torch.func.functional_call(whole, named, (x_t, t, told))

    return call


def told(base: Base, *prompts: str) -> list[Condition]:
    """The condition of each prompt alone."""
    return [base.encode([prompt]) for prompt in prompts]


def test_objective_is_the_paper_s_target() -> None:
    generator = torch.Generator().manual_seed(0)
    null, concept, anchor = torch.randn(3, 5, 4, 8, 8, generator=generator, dtype=torch.float64)
    for eta in (0.0, 0.5, 1.0, 3.0):
        found = esd(Predictions(null, concept, anchor), torch.full((5, 1, 1, 1), eta, dtype=torch.float64))
        torch.testing.assert_close(found, reference.esd_target(null, concept, anchor, eta), **CLOSE)


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.0), (7, 3.0), (50, 3.0)])
def test_walk_is_guided_ddim(exact: Base, steps: int, guidance: float) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    null, *prompts = told(exact, "", PROMPT, "a dog in the rain")
    null, prompts = concatenate(null, null), concatenate(*prompts)
    scheduler = exact.family.scheduler(exact.pipe, steps, exact.latent_shape())
    found = walk(exact.predict, scheduler, noise, prompts, null, guidance=guidance)
    with torch.no_grad():
        expected = reference.guided_walk(
            lambda x_t, t, text: predict(exact)({}, x_t, t, text),
            noise,
            prompts,
            null,
            SAMPLERS["sd"](steps),
            guidance=guidance,
        )
    assert [point.t.tolist() for point in found] == [[t, t] for _, t in expected]
    for point, (x_t, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(point.x_t, x_t, **CLOSE)


def test_schedule_is_the_base_s_own(base: Base) -> None:
    scheduler = base.family.scheduler(base.pipe, 4, base.latent_shape())
    assert isinstance(scheduler, DDIMScheduler)
    # Tabulated in float32.
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), reference.scaled_linear(), rtol=1e-5, atol=0)


def student_of(base: Base, recipe: Recipe, other: Base | None = None) -> reference.Student:
    """The reference's student where `train` starts: A drawn from the recipe's seed, on another copy of the base."""
    frozen = dict(base.weights(base.family.modules(base.model, recipe.scope)))
    other = other or load_base(base.id, dtype=torch.float64, device="cpu")
    add_adapter(other, other.family.modules(other.model, recipe.scope), recipe.lora, recipe.train.seed)
    downs = {name: other.model.get_submodule(name).lora_A[ADAPTER].weight.detach() for name in frozen}
    return reference.Student(predict(base), frozen, downs, recipe.lora.alpha / recipe.lora.rank)


def assert_learned_the_same(eraser: Eraser, student: reference.Student, tolerance: float = 1e-9) -> None:
    deltas = student.deltas()
    assert eraser.pairs.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert delta.norm() > 0
        assert (eraser.pairs[name].delta() - delta).norm() <= tolerance * delta.norm(), name


def recorded_draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, int]]:
    """Noise and stop of every walk from here on: the reference is told what chance drew."""
    draws: list[tuple[Tensor, int]] = []

    def recorded(denoiser: Any, scheduler: Any, noise: Tensor, *conditions: Any, **shape: Any) -> Any:
        draws.append((noise, shape["stop"]))
        return walk(denoiser, scheduler, noise, *conditions, **shape)

    monkeypatch.setattr(teacher_module, "walk", recorded)
    return draws


@pytest.mark.parametrize("eta", [1.0, 2.5])
def test_paper_preset_is_the_paper_s_loop(exact: Base, monkeypatch: pytest.MonkeyPatch, eta: float) -> None:
    small = {"steps": 5, "trajectory_steps": 6, "seed": 11, "lora": {"rank": 3, "alpha": 4.5}}
    recipe = tiny_recipe(exact.id, "paper", [PROMPT], preserve=[], eta=eta, **small)
    draws, losses = recorded_draws(monkeypatch), []
    eraser = train(recipe, base=exact, progress=False, on_step=[lambda report: losses.append(report.state.loss)])
    assert len(draws) == 5
    assert len({stop for _, stop in draws}) > 1
    assert len({noise.sum().item() for noise, _ in draws}) == 5

    plain = load_base(exact.id, dtype=torch.float64, device="cpu")
    null, concept = told(plain, "", PROMPT)
    student = student_of(plain, recipe)
    shape = {"guidance": 3.0, "eta": eta, "lr": recipe.train.lr}
    expected = reference.esd(student, draws, concept, null, SAMPLERS["sd"](6), **shape)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert all(".attn2." in name for name in student.frozen)
    assert_learned_the_same(eraser, student)


@pytest.mark.parametrize("toy", TOYS)
def test_paper_preset_on_every_family(toy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Targets, losses and first updates for noise, v and flow; to 1e-6, for flow schedulers add up in float32."""
    shipped = ModelFamily.scheduler
    sampler = SAMPLERS[toy](5)

    def scheduler(*args: Any) -> Any:
        made = in_double(shipped(*args), **BETAS.get(toy, {}))
        return flow_in_double(made, [t / 1000 for t in (*sampler.times, 0.0)]) if hasattr(made, "sigmas") else made

    monkeypatch.setattr(ModelFamily, "scheduler", scheduler)
    if toy == "wan":
        monkeypatch.setattr(Tensor, "float", Tensor.double)  # in float32 its blocks add up, whatever their weights are
    base, plain, other = (load_toy(save_toy(toy, tmp_path / "toy"), dtype=torch.float64) for _ in range(3))
    for each in (base, plain):
        if toy in ("sana", "lumina2"):
            each.pipe.text_encoder.float()  # transformers' Gemma masks its softmax, always float32, with float64's minimum
    small = {"steps": 3, "trajectory_steps": 5, "seed": 3, "lora": {"rank": 2, "alpha": 3}}
    recipe = tiny_recipe(base.id, "paper", [PROMPT], preserve=[], scope="xattn-kv", **small)
    draws, losses = recorded_draws(monkeypatch), []
    eraser = train(recipe, base=base, progress=False, on_step=[lambda report: losses.append(report.state.loss)])
    assert max(stop for _, stop in draws) > 0
    null, concept = told(plain, "", PROMPT)
    student = student_of(plain, recipe, other)
    shape = {"guidance": 3.0, "eta": 1.0, "lr": recipe.train.lr}
    expected = reference.esd(student, draws, concept, null, sampler, **shape)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert_learned_the_same(eraser, student, 1e-6)


@pytest.mark.parametrize("objective", ["esd", "hinge"])
def test_fast_preset_replays_a_weighted_loss(exact: Base, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    small = {"steps": 4, "batch_size": 3, "preserve_batch": 2, "preserve_weight": 0.25, "refresh_every": 3}
    recipe = tiny_recipe(exact.id, "fast", [PROMPT, "a car"], preserve=["a dog"], objective=objective, eta=0.75, **small)
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
    prompts = told(plain, PROMPT, "a car", "a dog")
    student = student_of(plain, recipe)
    for step, (erased, preserved) in enumerate(zip(batches[::2], batches[1::2], strict=True)):

        def error(points: Points) -> Tensor:
            """Sum over the points of each one's mean square error."""
            total = torch.zeros((), dtype=torch.float64)
            for x, t, i, target in zip(*points[:4], strict=True):
                prediction, concept = student(x[None], t.item(), prompts[i]), student.predict({}, x[None], t.item(), prompts[i])
                hinged = objective == "hinge" and int(i) < 2
                total += reference.hinge(prediction, target, concept, 0.75) if hinged else ((prediction - target) ** 2).mean()
            return total

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
    assert recipe.train.x_t_from == "auto"  # which is the base where layers read text
    plans = plan(recipe)
    teacher = Teacher(exact, recipe, plans)
    add_adapter(exact, exact.family.modules(exact.model, "xattn"), recipe.lora, 0)
    chance = torch.Generator().manual_seed(5)
    buffer = teacher.fill(torch.arange(len(plans)), chance).taught
    assert len(buffer) == len(plans) * 5

    plain = load_base(exact.id, dtype=torch.float64, device="cpu")
    noise = torch.randn(len(plans), 4, 8, 8, generator=torch.Generator().manual_seed(5)).double()
    lessons_told = {
        0: (PROMPT, PROMPT, "", 1.5),
        1: ("a hat", "a hat", "a head", 1.5),
        2: ("cowboy", "boots", "cowboy", 1.5),
        3: ("ink", "ink", "ink", 1.5),
        4: ("a dog", "a dog", "a dog", 0.0),
    }

    @torch.no_grad()
    def says(text: Condition, x_t: Tensor, t: float) -> Tensor:
        return predict(plain)({}, x_t, t, text)

    for lesson, (prompt, concept, anchor, eta) in lessons_told.items():
        null, prompted, erased, instead = told(plain, "", prompt, concept, anchor)
        walked = reference.guided_walk(
            lambda x_t, t, text: says(text, x_t, t),
            noise[lesson : lesson + 1],
            prompted,
            null,
            SAMPLERS["sd"](5),
            guidance=3.0,
        )
        mine = buffer.points.lesson == lesson
        found = zip(buffer.points.x_t[mine].split(1), buffer.points.t[mine], buffer.points.target[mine].split(1), strict=True)
        for (x_t, t, target), (expected_x_t, expected_t) in zip(found, walked, strict=True):
            assert t == expected_t
            torch.testing.assert_close(x_t, expected_x_t, **CLOSE)
            expected = reference.esd_target(says(null, x_t, t), says(erased, x_t, t), says(instead, x_t, t), eta)
            torch.testing.assert_close(target, expected, **CLOSE)
