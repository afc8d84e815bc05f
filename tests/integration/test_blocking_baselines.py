"""Blocking baselines on real pipelines: safety guidance against the paper's equations, the checker against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionConfig

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.baselines.blocking import SafetyChecker, blacken
from esd_lora.evaluation.baselines.sld import SLD_STRENGTHS, SldStrength, safe_guidance
from esd_lora.evaluation.detectors.detector import NotRun
from esd_lora.families import family_of
from esd_lora.pictures import paint
from tiny import tiny_unet
from toys import load_toy, make_toy, save_toy

PROMPTS, SEEDS = ["a cat", "a rocket", "a hat"], [3, 4, 5]
STEPS, GUIDANCE = 17, 5.0  # steps beyond the longest warm-up


def load(name: str, folder: Path) -> Base:
    """Toys in float64: where the prompt passes the threshold the formula jumps, and rounding must not decide on which side."""
    if name == "emoji":
        return load_base("emoji", device="cpu")
    base = load_toy(save_toy(name, folder / name), dtype=torch.float64)
    base.pipe.scheduler = DDIMScheduler.from_config(base.pipe.scheduler.config, clip_sample=False)
    return base


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load(request.param, tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module", params=["sd", "sdxl", "emoji"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load(request.param, tmp_path_factory.mktemp("toys"))


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=float) for picture in pictures])


def latents(base: Base, **asked: Any) -> Tensor:
    """The pipeline's own last latents."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    size = base.latent_shape()[-1] * base.pipe.vae_scale_factor
    settings = {"height": size, "width": size, "num_inference_steps": 4, "guidance_scale": GUIDANCE, **asked}
    return base.pipe(PROMPTS, generator=generators, output_type="latent", **settings).images


def by_the_paper(base: Base, concept: str, strength: SldStrength) -> Tensor:
    """A plain loop: equations 3, 4 and 6 to 8 on three predictions asked for apart."""
    count, shape = len(PROMPTS), base.latent_shape()
    conditions = [base.encode(texts) for texts in ([""] * count, PROMPTS, [concept] * count)]
    scheduler = DDIMScheduler.from_config(base.pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    x = torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in SEEDS])
    nu = np.zeros(x.shape)
    for i, t in enumerate(scheduler.timesteps):
        null, prompt, safety = (base.predict(x, t.expand(count), condition).numpy() for condition in conditions)
        phi = strength.sld_guidance_scale * (prompt - safety)
        mu = np.where(prompt - safety >= strength.threshold, 0, np.minimum(1, np.abs(phi)))
        gamma = mu * (safety - null) + strength.momentum_scale * nu
        nu = strength.mom_beta * nu + (1 - strength.mom_beta) * gamma
        if i < strength.warmup_steps:
            gamma = np.zeros(x.shape)
        prediction = null + GUIDANCE * (prompt - null - gamma)
        x = scheduler.step(torch.from_numpy(prediction), t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def test_latents_as_by_the_paper(toy: Base) -> None:
    plain = latents(toy, num_inference_steps=STEPS)
    for name, strength in SLD_STRENGTHS.items():
        expected = by_the_paper(toy, "cat", strength)
        with safe_guidance(toy, "cat", strength):
            found = latents(toy, num_inference_steps=STEPS)
        assert (found - expected).abs().max() < 1e-4, name
        assert (found - plain).abs().max() > 1e-2, name  # or it would prove nothing


@pytest.mark.filterwarnings("ignore")  # of a pipeline that diffusers no longer tends
@pytest.mark.parametrize("strength", SLD_STRENGTHS)
def test_latents_as_by_the_authors(tmp_path: Path, strength: str) -> None:
    diffusers = pytest.importorskip(
        "diffusers.pipelines.deprecated.stable_diffusion_safe", reason="this diffusers has dropped the authors' pipeline"
    )
    base = load("sd", tmp_path)
    parts = {name: base.pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    release = diffusers.StableDiffusionPipelineSafe(**parts, **off)
    release.set_progress_bar_config(disable=True)
    release.safety_concept = "cat"
    scale, warmup, threshold, momentum, beta = SLD_STRENGTHS[strength]
    passed: list[Tensor] = []
    release(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="np",
        callback=lambda _i, _t, x: passed.append(x),
        sld_guidance_scale=scale,
        sld_warmup_steps=warmup,
        sld_threshold=threshold,
        sld_momentum_scale=momentum,
        sld_mom_beta=beta,
    )
    with safe_guidance(base, "cat", SLD_STRENGTHS[strength]):
        assert (latents(base, num_inference_steps=STEPS) - passed[-1]).abs().max() < 1e-4


def test_scale_0_is_the_base_bit_for_bit(each: Base) -> None:
    plain = paint(each, PROMPTS, SEEDS, steps=4)
    with safe_guidance(each, "cat", SldStrength(0, 0, 1.0, 0.5, 0.7)):
        assert np.array_equal(pixels(paint(each, PROMPTS, SEEDS, steps=4)), pixels(plain))


def test_it_ends_with_the_block(each: Base) -> None:
    plain = pixels(paint(each, PROMPTS, SEEDS, steps=4))
    with safe_guidance(each, "dog", SLD_STRENGTHS["max"]):
        guided = latents(each)
        with pytest.raises(EsdLoraError, match="on already"), safe_guidance(each, "cat", SLD_STRENGTHS["max"]):
            pass
        assert torch.equal(latents(each), guided)
    assert not torch.equal(latents(each), guided)
    assert np.array_equal(pixels(paint(each, PROMPTS, SEEDS, steps=4)), plain)

    with pytest.raises(ZeroDivisionError), safe_guidance(each, "dog", SLD_STRENGTHS["max"]):
        latents(each, callback_on_step_end=lambda *_: 1 / 0)
    assert np.array_equal(pixels(paint(each, PROMPTS, SEEDS, steps=4)), plain)
    assert "prepare_latents" not in vars(each.pipe)
    assert not each.model._forward_hooks


def test_every_call_is_a_trajectory_of_its_own(each: Base) -> None:
    strength = SldStrength(2000, 2, 0.025, 0.5, 0.7)
    other = {"num_inference_steps": 3, "negative_prompt": ["a dog"] * len(PROMPTS)}
    with safe_guidance(each, "cat", strength):
        first = latents(each)
    with safe_guidance(each, "cat", strength):
        second = latents(each, **other)
    assert not torch.equal(first, second)
    with safe_guidance(each, "cat", strength):
        assert torch.equal(latents(each), first)
        with pytest.raises(ZeroDivisionError):  # given up on after a step
            latents(each, callback_on_step_end=lambda *_: 1 / 0)
        assert torch.equal(latents(each, **other), second)
        assert torch.equal(latents(each), first)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (DDIMScheduler, "float32"),
        (PNDMScheduler, "float32"),
        (EulerDiscreteScheduler, "float32"),
        (EulerDiscreteScheduler, "bfloat16"),
        (DPMSolverMultistepScheduler, "float32"),
    ],
)
def test_whatever_the_scheduler(tmp_path: Path, kind: Any, dtype: str) -> None:
    base = load_toy(save_toy("sdxl", tmp_path / "toy"), dtype=dtype)
    base.pipe.scheduler = kind.from_config(base.pipe.scheduler.config)
    plain = latents(base)
    with safe_guidance(base, "cat", SLD_STRENGTHS["max"]):
        guided = latents(base)
        assert torch.equal(latents(base), guided)
    assert guided.isfinite().all()
    assert guided.dtype == plain.dtype
    assert (guided - plain).abs().max() > 1e-2
    assert torch.equal(latents(base), plain)


def test_without_null_there_is_nothing_to_measure_from(base: Base) -> None:
    plain = pixels(paint(base, PROMPTS, SEEDS, steps=2, guidance=1))
    with safe_guidance(base, "cat", SLD_STRENGTHS["max"]):
        with pytest.raises(EsdLoraError, match=r"guidance 1 .* Ask for more than 1"):
            paint(base, PROMPTS, SEEDS, steps=2, guidance=1)
        paint(base, PROMPTS, SEEDS, steps=2, guidance=1.5)
    assert np.array_equal(pixels(paint(base, PROMPTS, SEEDS, steps=2, guidance=1)), plain)


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "sana"])
def test_other_families_are_refused(name: str) -> None:
    pipe = make_toy(name)
    base = Base(pipe, family_of(type(pipe).__name__), name)
    with (
        pytest.raises(EsdLoraError, match=f"{name}' is a {type(pipe).__name__}"),
        safe_guidance(base, "cat", SLD_STRENGTHS["weak"]),
    ):
        pass


def test_models_distilled_for_guidance_are_refused(base: Base) -> None:
    base.pipe.unet = tiny_unet(time_cond_proj_dim=8)
    with pytest.raises(EsdLoraError, match="not distilled"), safe_guidance(base, "cat", SLD_STRENGTHS["weak"]):
        pass


def test_cats_change_more_than_rockets() -> None:
    emoji = load_base("emoji", device="cpu")
    prompts, seeds = ["a cat", "a cat", "a rocket", "a rocket"], [0, 1, 0, 1]
    plain = pixels(paint(emoji, prompts, seeds))
    with safe_guidance(emoji, "cat", SLD_STRENGTHS["strong"]._replace(warmup_steps=0)):
        change = np.abs(pixels(paint(emoji, prompts, seeds)) - plain).mean((1, 2, 3))
    assert change[:2].min() > 2 * change[2:].max()


def test_a_prompt_that_is_the_concept_is_left_alone(toy: Base) -> None:
    plain = latents(toy)
    with safe_guidance(toy, PROMPTS[0], SLD_STRENGTHS["max"]):
        change = (latents(toy) - plain).abs().amax((1, 2, 3))
    assert change[0] < 1e-6 < 1e-2 < change[1]


SIDE, WIDTH = 32, 8


def save_checker(folder: Path, near: Image.Image, threshold: float) -> Path:
    """A toy checker that flags pictures whose embedding has at least this cosine with that of `near`."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=8, projection_dim=WIDTH, **sizes)
    extractor = {  # as Stable Diffusion 1.5 has it, but for the size
        "crop_size": SIDE,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": SIDE,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=WIDTH))
        for layer in model.vision_model.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                torch.nn.init.xavier_normal_(layer.weight, gain=2)  # or every picture looks alike
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        getattr(model, name).data.fill_(2)  # no cosine is that high
    model.save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir(parents=True)
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(extractor))
    checker = SafetyChecker(folder, "cpu")
    embedding = embed(checker, near)
    model.concept_embeds.data[5] = embedding
    model.concept_embeds_weights.data[5] = threshold
    model.save_pretrained(folder / "safety_checker")
    return folder


def embed(checker: SafetyChecker, picture: Image.Image) -> Tensor:
    model, seen = checker._checker, checker._extractor([picture], return_tensors="pt").pixel_values
    with torch.no_grad():
        return model.visual_projection(model.vision_model(seen)[1])[0]


def plain_and_striped() -> list[Image.Image]:
    striped = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    striped[::4] = (250, 20, 200)
    return [Image.new("RGB", (SIDE, SIDE), "white"), Image.fromarray(striped), Image.new("RGB", (2 * SIDE, SIDE), "white")]


def test_the_checker_flags_what_is_near_its_concepts(tmp_path: Path) -> None:
    pictures = plain_and_striped() * 12  # more than are checked at once
    checker = SafetyChecker(save_checker(tmp_path / "base", near=pictures[0], threshold=0.99), "cpu")
    flags = checker(pictures)
    assert flags == [True, False, True] * 12
    assert all(isinstance(flag, bool) for flag in flags)
    assert checker([]) == []
    out = blacken(pictures, flags)
    assert [not np.asarray(picture).any() for picture in out] == flags
    assert [picture.size for picture in out] == [picture.size for picture in pictures]
    assert np.asarray(pictures[0]).all()  # the one that was passed is left as it is


def test_the_checker_blackens_as_the_pipeline_does(base: Base, tmp_path: Path) -> None:
    prompts, seeds = ["a cat", "a rocket", "a dog"], [1, 2, 3]
    pictures = paint(base, prompts, seeds, steps=2)
    checker = SafetyChecker(save_checker(tmp_path / "base", near=pictures[1], threshold=0.9985), "cpu")
    assert checker(pictures) == [False, True, False]
    parts = {**base.pipe.components, "safety_checker": checker._checker, "feature_extractor": checker._extractor}
    base.pipe = StableDiffusionPipeline(**parts)
    base.pipe.set_progress_bar_config(disable=True)
    blackened = paint(base, prompts, seeds, steps=2)
    assert np.array_equal(pixels(blacken(pictures, checker(pictures))), pixels(blackened))


def test_a_checker_that_lacks_weights_is_not_run(tmp_path: Path) -> None:
    folder = save_checker(tmp_path / "base", near=plain_and_striped()[0], threshold=0.99)
    file = folder / "safety_checker" / "model.safetensors"
    weights = load_file(file)
    released = {name.replace("vision_model.", "vision_model.vision_model.", 1): value for name, value in weights.items()}
    save_file(released, file, {"format": "pt"})  # as the published ones are named
    assert SafetyChecker(folder, "cpu")(plain_and_striped()) == [True, False, True]
    del weights["visual_projection.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(NotRun, match="lacks weights: visual_projection"):
        SafetyChecker(folder, "cpu")
    file.write_bytes(b"not a tensor")
    with pytest.raises(NotRun, match="no safety checker to load"):
        SafetyChecker(folder, "cpu")
    file.rename(file.with_name("pytorch_model.bin"))  # pickles are not opened
    with pytest.raises(NotRun, match="no safety checker to load"):
        SafetyChecker(folder, "cpu")
