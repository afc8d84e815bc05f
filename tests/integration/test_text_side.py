"""Erasers on the text encoder: the student reads its own text, the file is diffusers' own, every verb takes or refuses it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel

from esd_lora.adapter import adapted_layers, add_adapter, applied, remove_adapter
from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser, on_text_encoder
from esd_lora.errors import EsdLoraError
from esd_lora.lessons import plan
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe
from esd_lora.sampling import generate
from esd_lora.teacher import Teacher
from esd_lora.training import train
from tiny import tiny_recipe
from toys import load_toy, save_toy

LAYERS = {"sd": 6, "sdxl": 24}  # six of each layer of each encoder; SDXL's toy has two encoders of two layers


@pytest.fixture(scope="module", params=LAYERS)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved toy pipeline. Tests only read it."""
    return save_toy(request.param, tmp_path_factory.mktemp("toys") / request.param)


@pytest.fixture
def base(toy: Path) -> Base:
    return load_toy(toy)


def recipe_for(toy: Path, **settings: Any) -> Recipe:
    size = {} if toy.name == "sd" else {"resolution": 64}
    return tiny_recipe(toy, **{"scope": "text-encoder", "lr": 0.02, "steps": 6, **size, **settings})


@pytest.fixture(scope="module")
def eraser_dir(toy: Path) -> Path:
    """An eraser on the text encoders, trained hard enough to change pictures. Tests only read it."""
    out = toy.with_name(f"{toy.name}-eraser")
    train(recipe_for(toy), out=out, progress=False)
    return out


def pictures(painted: Any) -> list[np.ndarray]:
    return [np.asarray(picture, np.int16) for picture in painted]


def test_an_eraser_of_text_has_every_attention_and_mlp_of_clip(toy: Path, eraser_dir: Path, base: Base) -> None:
    eraser = Eraser.load(eraser_dir)
    assert eraser.pairs.keys() == base.modules("text-encoder").keys() == eraser.header.base_hashes.keys()
    assert len(eraser.pairs) == LAYERS[toy.name]
    assert eraser.header.scope == "text-encoder"
    assert eraser.changes_text
    assert all(map(on_text_encoder, eraser.pairs))
    assert any(pair.norm() > 0 for pair in eraser.pairs.values())
    base.check(eraser)  # shapes and hashes are this base's


def test_only_the_student_reads_adapted_text(toy: Path, base: Base) -> None:
    recipe = recipe_for(toy, x_t_from="student")
    teacher = Teacher(base, recipe, plan(recipe))
    prompts = ["a cat", "a dog", ""]
    before = base.encode(prompts)
    add_adapter(base, base.modules(recipe.scope), recipe.lora, 0)
    for _, layer in adapted_layers(base):
        torch.nn.init.normal_(layer.lora_B["esd"].weight, std=0.3)
    with teacher.adapter_disabled():
        torch.testing.assert_close(teacher.encode(prompts), before)
    now = teacher.encode(prompts)
    torch.testing.assert_close(now, base.encode(prompts))
    for prompt, own, adapted in zip(prompts, before["prompt_embeds"], now["prompt_embeds"], strict=True):
        zeros = prompt == "" and not own.any()  # SDXL's guidance is against zeros, which no encoder makes
        assert torch.equal(own, adapted) == zeros

    def walked(**changes: Any) -> list[torch.Tensor]:
        spec = recipe.train.model_copy(update={"points": "all", **changes})
        visited = teacher.walk_prompts(["a cat"], base.latent_shape(), torch.Generator().manual_seed(0), spec)
        return [tensor for sample in visited for tensor in (sample.x_t, sample.null, sample.prompted) if tensor is not None]

    student, by_base = walked(), walked(x_t_from="base")
    remove_adapter(base)
    torch.testing.assert_close(by_base, walked(), rtol=1e-4, atol=1e-4)  # encoded in batches of another size
    assert not torch.allclose(student[-1], by_base[-1])
    if base.family.name == "sd":  # on the other side of guidance too
        assert not torch.allclose(student[1], by_base[1])


def test_gradients_reach_the_text_encoders(toy: Path, base: Base) -> None:
    recipe = recipe_for(toy)
    teacher = Teacher(base, recipe, plan(recipe))
    layers = base.modules(recipe.scope)
    parameters = add_adapter(base, layers, recipe.lora, 0)
    lesson = torch.tensor([0, 0, 1])
    x_t = torch.randn(3, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
    condition = teacher.condition(lesson)
    base.predict(x_t, torch.tensor([500, 100, 300]), condition).square().mean().backward()
    reached = {path for path, layer in adapted_layers(base) if layer.lora_B["esd"].weight.grad is not None}
    # SDXL reads the last layer but one, and only of the second encoder what the last one pools.
    unread = {path for path in layers if path.startswith("text_encoder.") and ".layers.1." in path}
    assert reached == layers.keys() - (unread if base.family.name == "sdxl" else set())
    assert all(parameter.requires_grad for parameter in parameters)
    remove_adapter(base)
    assert not any("lora" in name for name, _ in base.pipe.text_encoder.named_modules())


@torch.no_grad()
def test_diffusers_paints_with_the_file_what_we_paint(toy: Path, eraser_dir: Path, base: Base) -> None:
    plain = DiffusionPipeline.from_pretrained(toy, safety_checker=None)
    plain.set_progress_bar_config(disable=True)

    def paint() -> list[np.ndarray]:
        size = base.picture_size()
        asked = {"width": size[0], "height": size[1], "num_inference_steps": 4, "guidance_scale": 3.0}
        return pictures(plain(["a cat"], generator=[torch.Generator().manual_seed(3)], **asked).images)

    before = paint()
    plain.load_lora_weights(eraser_dir)
    after = paint()
    ours = pictures(generate(base, ["a cat"], erasers=[Eraser.load(eraser_dir)], seeds=[3], steps=4, guidance=3.0))
    # Beside the weights or in them is the same to rounding: a level of a pixel.
    assert max(int(abs(a - b).max()) for a, b in zip(after, ours, strict=True)) <= 1
    assert max(int(abs(a - b).max()) for a, b in zip(after, before, strict=True)) > 1


def test_pictures_are_the_same_whether_the_denoiser_waited_for_text(toy: Path, eraser_dir: Path) -> None:
    waited = generate(load_toy(toy, text_first=True), ["a cat"], erasers=[eraser_dir], steps=2)
    loaded = generate(load_toy(toy), ["a cat"], erasers=[eraser_dir], steps=2)
    assert all(np.array_equal(a, b) for a, b in zip(pictures(waited), pictures(loaded), strict=True))


def test_a_base_comes_back_bit_for_bit(eraser_dir: Path, base: Base) -> None:
    before = {name: value.clone() for name, value in base.pipe.text_encoder.state_dict().items()}
    with applied(base, [Eraser.load(eraser_dir)]):
        changed = [name for name, value in base.pipe.text_encoder.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    assert all(torch.equal(value, before[name]) for name, value in base.pipe.text_encoder.state_dict().items())


def test_refusals_of_recipes(toy: Path) -> None:
    with pytest.raises(EsdLoraError, match=r"has a closed form: it has to be trained"):
        recipe_for(toy, steps=0, closed_form={"keep": 1, "push": 0, "ridge": 1e-3})
    with pytest.raises(EsdLoraError, match="guard leaves prompts alone in layers that read text"):
        load_recipe("fast", base=str(toy), concepts=["a cat"], scope="text-encoder", guard=["a hat"])


def test_models_that_read_more_than_clip_are_refused(tmp_path: Path) -> None:
    base = load_toy(save_toy("sd3", tmp_path / "sd3"))
    with pytest.raises(EsdLoraError, match="is for models whose text comes from CLIP alone"):
        train(recipe_for(tmp_path / "sd3"), base=base, progress=False)


def test_the_file_names_layers_as_diffusers_does(eraser_dir: Path) -> None:
    from safetensors import safe_open

    with safe_open(eraser_dir / WEIGHTS_NAME, "pt") as file:
        keys = list(file.keys())
    assert all(".text_model.encoder.layers." in key for key in keys)
    assert {key.partition(".")[0] for key in keys} <= {"text_encoder", "text_encoder_2"}


LONG = "a cat that sits in the rain and looks at a house, a map, a dog and a hat"
"""More than the toys' 16 tokens."""


@pytest.fixture
def with_text_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give CLIP the module that diffusers 0.42 looks for its last norm in, and transformers 5 has left out."""
    if not hasattr(CLIPTextModel, "text_model"):
        monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["a cat", LONG])
def test_clip_skip_is_that_of_the_pipeline(base: Base, prompt: str, with_text_model: None) -> None:  # noqa: ARG001
    text, null, *pooled = base.pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, clip_skip=1
    )
    whole, skipping = base.encode([prompt, ""]), base.skipping(1).encode([prompt, ""])
    torch.testing.assert_close(skipping["prompt_embeds"], torch.cat([text, null]))
    assert not torch.allclose(skipping["prompt_embeds"][0], whole["prompt_embeds"][0], atol=1e-2)
    assert torch.equal(skipping["prompt_embeds"][1], whole["prompt_embeds"][1])
    if pooled:
        torch.testing.assert_close(skipping["pooled_prompt_embeds"], torch.cat(pooled))


@torch.no_grad()
def test_pictures_with_clip_skip_are_the_pipelines(base: Base, with_text_model: None) -> None:  # noqa: ARG001
    width, height = base.picture_size()
    asked = {"width": width, "height": height, "num_inference_steps": 3, "guidance_scale": 3.0, "clip_skip": 1}
    for negative in (None, "a dog"):
        plain = base.pipe("a cat", negative_prompt=negative, generator=[torch.Generator().manual_seed(3)], **asked).images
        options = {"seeds": [3], "steps": 3, "guidance": 3.0, "negative_prompt": negative}
        ours = generate(base, ["a cat"], clip_skip=1, **options)
        assert abs(pictures(ours)[0] - pictures(plain)[0]).max() <= 1
        assert abs(pictures(ours)[0] - pictures(generate(base, ["a cat"], **options))[0]).max() > 1


def test_a_training_reads_the_text_that_it_is_used_with(toy: Path, base: Base) -> None:
    erasers = [train(recipe_for(toy, scope=scope, clip_skip=1), base=base, progress=False) for scope in ("xattn", "text-encoder")]
    plain = train(recipe_for(toy, scope="xattn"), base=base, progress=False)
    assert any(not torch.equal(plain.pairs[path].up, pair.up) for path, pair in erasers[0].pairs.items())
    unread = [path for path, pair in erasers[1].pairs.items() if not pair.up.any()]
    read = {"sd": 0, "sdxl": 12}[toy.name]  # of the toy SD's one layer nothing is left to read
    assert len(unread) == LAYERS[toy.name] - read
    assert "clip_skip 1" in " ".join(erasers[0].header.making())
    assert not plain.header.making()


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_clip_skip_beyond_what_there_is(name: str, tmp_path: Path) -> None:
    base = load_toy(save_toy(name, tmp_path / name))
    refusal = "can skip from 1 to 1 there" if name == "sd" else "can skip none where text does not come from CLIP alone"
    with pytest.raises(EsdLoraError, match=refusal):
        generate(base, ["a cat"], clip_skip=2, steps=2)


def test_words_that_are_cut_off_are_told_once(
    toy: Path, base: Base, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    cut = r"1 of 2 prompts has more than the 14 tokens that CLIP reads, and the rest is cut off: .* is read up to"
    recipe = recipe_for(toy, concepts=[LONG, "a car"], preserve=["a pen on a table in a room of a tower"], steps=2)
    for verb in (lambda: generate(base, [LONG, "a dog"], steps=2), lambda: train(recipe, base=base)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            verb()
        (told,) = (str(warning.message) for warning in caught if warning.category is UserWarning)
        assert re.match(cut, told)
    said = caplog.text + "".join(capfd.readouterr())
    assert "truncated" not in said
    assert "longer than the specified maximum" not in said
    with torch.no_grad():
        text = base.pipe.encode_prompt(LONG, "cpu", 1, False)[0]
    torch.testing.assert_close(base.encode([LONG])["prompt_embeds"], text)
