"""Guidance-distilled and few-step models: Flux.1 dev and LCM read a guidance scale, schnell and turbo models know none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.errors import EsdLoraError
from esd_lora.families.ddim import GridDDIM
from esd_lora.families.sd import StableDiffusion
from esd_lora.lessons import plan
from esd_lora.sampling import generate
from esd_lora.teacher import Teacher
from esd_lora.training import train
from esd_lora.trajectory import Condition, walk
from tiny import tiny_pipeline, tiny_recipe, tiny_unet
from toys import load_toy, save_toy


def save_lcm(folder: Path) -> Path:
    """SD's toy with a U-Net that embeds a guidance scale, as in SimianLuo/LCM_Dreamshaper_v7."""
    parts = tiny_pipeline().components
    scheduler = LCMScheduler.from_config(parts["scheduler"].config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = tiny_unet(time_cond_proj_dim=8)
    LatentConsistencyModelPipeline(
        **{**parts, "unet": unet, "scheduler": scheduler}, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["lcm", "flux-dev"])
def distilled_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled") / request.param
    return save_lcm(folder) if request.param == "lcm" else save_toy(request.param, folder)


@pytest.fixture
def distilled(distilled_dir: Path) -> Base:
    return load_toy(distilled_dir)


def test_what_is_distilled_in_is_not_asked_for_another_way(distilled: Base) -> None:
    with pytest.raises(EsdLoraError, match="takes no negative prompt: its guidance is distilled into it"):
        generate(distilled, ["a cat"], steps=2, negative_prompt="a dog")
    if distilled.family.name == "sd":  # LCM's pipeline hands its scheduler what no other takes
        with pytest.raises(EsdLoraError, match="is painted by its own scheduler alone: leave DDIM out"):
            generate(distilled, ["a cat"], steps=2, scheduler="DDIM")


@torch.no_grad()
def test_scale_reaches_the_denoiser_as_in_its_pipeline(distilled: Base) -> None:
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        calls.append((x, t.expand(1), output[0]))

    hook = distilled.model.register_forward_hook(record, with_kwargs=True)
    call_kwargs = {**distilled.family.call_kwargs(distilled.pipe), "height": 64, "width": 64}
    if distilled.family.name == "sd":
        call_kwargs = {}  # its pixels are two to a latent
    distilled.pipe("a cat", num_inference_steps=2, guidance_scale=6.0, output_type="latent", **call_kwargs)
    hook.remove()
    assert len(calls) == 2  # one prediction a step: no classifier-free guidance
    condition, other_condition = (distilled.encode(["a cat"], guidance=scale) for scale in (6.0, 1.0))
    for (x, _, expected), t in zip(calls, distilled.pipe.scheduler.timesteps, strict=True):
        if distilled.family.name == "flux":
            x, expected = (distilled.pipe._unpack_latents(y, 64, 64, 8) for y in (x, expected))
        torch.testing.assert_close(distilled.predict(x, t.expand(1), condition), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(distilled.predict(x, t.expand(1), other_condition), expected, rtol=1e-3, atol=1e-4)


LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SAMPLERS: dict[str, tuple[Any, dict[str, Any], list[int]]] = {
    "lcm": (LCMScheduler, {}, [999, 759, 499, 259]),
    "lcm that names a spacing": (LCMScheduler, {"timestep_spacing": "trailing", "steps_offset": 1}, [999, 759, 499, 259]),
    "tcd": (TCDScheduler, {}, [999, 759, 499, 259]),
    "turbo": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, [999, 749, 499, 249]),
    "lightning": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, [999, 749, 499, 249]),
    "linspace": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}, [999, 666, 333, 0]),
    "ddim": (DDIMScheduler, {"steps_offset": 1}, [751, 501, 251, 1]),
    "solver": (DPMSolverMultistepScheduler, {}, [999, 749, 500, 250]),
    "solver from the last step": (
        UniPCMultistepScheduler,
        {"timestep_spacing": "leading", "steps_offset": 1},
        [801, 601, 401, 201],
    ),
}
"""Samplers with what they are configured by, to the timesteps that four of their steps visit."""


def sampled_by(name: str, **changes: Any) -> Any:
    """The toy with another sampler."""
    pipe, (kind, own, _) = tiny_pipeline(), SAMPLERS[name]
    pipe.scheduler = kind(**LINEAR, **own, **changes)
    return pipe


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of ancestral Euler, with newer numpy
@pytest.mark.parametrize("name", SAMPLERS)
def test_walk_visits_what_the_base_s_sampler_visits(name: str) -> None:
    pipe, grid = sampled_by(name), SAMPLERS[name][2]
    assert StableDiffusion().scheduler(pipe, 4, (4, 8, 8)).timesteps.tolist() == grid
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == grid


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [4, 6, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_latents_have_the_noise_of_their_time(name: str, steps: int, prediction: str) -> None:
    """A walk of a model that knows one picture sees that picture at every t, with the same noise and as much as t says."""
    pipe, picture = sampled_by(name, prediction_type=prediction), torch.full((1, 4, 8, 8), 0.7, dtype=torch.float64)
    alphas = DDIMScheduler(**LINEAR).alphas_cumprod.double()  # type: ignore[arg-type]

    def noise_in(x_t: Tensor, t: Tensor) -> Tensor:
        alpha = alphas[t].view(-1, 1, 1, 1)
        return (x_t - alpha.sqrt() * picture) / (1 - alpha).sqrt()

    def knows(x_t: Tensor, t: Tensor, _condition: Condition) -> Tensor:
        alpha, noise = alphas[t].view(-1, 1, 1, 1), noise_in(x_t, t)
        return noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * picture

    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler, none = StableDiffusion().scheduler(pipe, steps, (4, 8, 8)), {"prompt_embeds": torch.zeros(1)}
    points = walk(knows, scheduler, start, none, none, guidance=1.0)
    assert len(points) == steps
    for point in points:
        torch.testing.assert_close(noise_in(point.x_t, point.t), noise_in(start, points[0].t), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_grid_of_even_steps_is_diffusers_own_ddim(prediction: str) -> None:
    ddim: Any = DDIMScheduler(**LINEAR, steps_offset=1, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
    ddim.set_timesteps(5)
    grid, generator = GridDDIM(ddim, ddim.timesteps), torch.Generator().manual_seed(0)
    x, output = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for t in ddim.timesteps:
        found, expected = grid.step(output, t, x), ddim.step(output, t, x)
        torch.testing.assert_close(found.prev_sample, expected.prev_sample)
        torch.testing.assert_close(found.pred_original_sample, expected.pred_original_sample)
        ts = t.expand(2)
        assert torch.equal(grid.add_noise(x, output, ts), ddim.add_noise(x, output, ts))
        assert torch.equal(grid.get_velocity(x, output, ts), ddim.get_velocity(x, output, ts))


def test_lcm_is_not_walked_in_more_steps_than_it_was_distilled_at() -> None:
    pipe = sampled_by("lcm")
    with pytest.raises(EsdLoraError, match="distilled at 50 timesteps, and a trajectory of 51 steps") as caught:
        StableDiffusion().scheduler(pipe, 51, (4, 8, 8))
    assert "train.trajectory_steps=4" in str(caught.value)


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_teacher_and_student_are_told_the_recipe_s_scale(distilled: Base, scale: float) -> None:
    recipe = tiny_recipe(distilled.id, distilled_guidance=scale)
    teacher = Teacher(distilled, recipe, plan(recipe))
    assert set(teacher.encode(["a cat", ""])["guidance"].tolist()) == {scale}
    assert set(teacher.condition(torch.tensor([0]))["guidance"].tolist()) == {scale}


def test_distilled_model_trains_and_paints(distilled: Base, tmp_path: Path) -> None:
    steps = {"trajectory_steps": 4, "guidance": 1.0, "steps": 2, "resolution": 64 if distilled.family.name == "flux" else None}
    recipe = tiny_recipe(distilled.id, lr=0.05, **steps)
    train(recipe, base=distilled, out=tmp_path / "eraser", progress=False)
    before, after = (generate(distilled, ["a cat"], erasers=erasers) for erasers in ([], [tmp_path / "eraser"]))
    assert before[0].tobytes() != after[0].tobytes()


def test_plain_models_are_told_no_scale(base: Base, tmp_path: Path) -> None:
    schnell = load_toy(save_toy("flux-schnell", tmp_path / "schnell"))
    for plain in (base, schnell):
        assert not plain.family.takes_guidance(plain.pipe)
        assert "guidance" not in plain.encode(["a cat"], guidance=6.0)


@pytest.mark.parametrize(("guidance", "evaluations"), [(1.0, 1), (3.0, 2)])
def test_walk_without_guidance_asks_once_a_step(base: Base, guidance: float, evaluations: int) -> None:
    """Few-step models are walked at guidance 1: what they were distilled for, at half the cost."""
    latents: list[int] = []

    def predict(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        latents.append(len(x_t))
        return base.predict(x_t, t, condition)

    scheduler, noise = base.family.scheduler(base.pipe, 4, base.latent_shape()), torch.zeros(1, *base.latent_shape())
    list(walk(predict, scheduler, noise, base.encode(["a cat"]), base.encode([""]), guidance=guidance))
    assert sum(latents) == 4 * evaluations


def test_lcm_is_of_the_sd_family(tmp_path: Path) -> None:
    base = load_base(save_lcm(tmp_path / "lcm"), device="cpu")
    assert base.family.name == "sd"
    assert base.steps == 4
