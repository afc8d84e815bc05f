"""Erasers on the text encoder: the student reads its own text, the file is diffusers' own, every verb takes or refuses it."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel

from esd_lora.adapter import adapted_layers, add_adapter, applied, remove_adapter
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser, on_text_encoder
from esd_lora.erasers.stacking import Strength, stack
from esd_lora.errors import EsdLoraError
from esd_lora.estimates.training import estimate_training
from esd_lora.evaluation.detectors.judge import Judge
from esd_lora.families import family_of
from esd_lora.formats.exporting import export
from esd_lora.formats.importing import import_lora
from esd_lora.formats.inspecting import inspect_file
from esd_lora.fusing.closed_form import fuse
from esd_lora.fusing.harmonising import harmonise
from esd_lora.fusing.interference import measure_interference
from esd_lora.gating import gated
from esd_lora.lessons import plan
from esd_lora.memory_plans import fit_recipe
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_harmonise_spec, load_recipe
from esd_lora.sampling import generate
from esd_lora.teacher import Teacher
from esd_lora.training import train
from esd_lora.weights.merging import merge
from esd_lora.weights.verifying import verify
from original_checkpoints import checkpoint, save_checkpoint
from random_erasers import build_header, eraser_on, random_pair
from tiny import tiny_recipe
from toys import load_toy, make_toy, save_toy

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
        options = {"width": size[0], "height": size[1], "num_inference_steps": 4, "guidance_scale": 3.0}
        return pictures(plain(["a cat"], generator=[torch.Generator().manual_seed(3)], **options).images)

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


@pytest.mark.slow
@torch.no_grad()
def test_pictures_with_clip_skip_are_the_pipelines(base: Base, with_text_model: None) -> None:  # noqa: ARG001
    width, height = base.picture_size()
    options = {"width": width, "height": height, "num_inference_steps": 3, "guidance_scale": 3.0, "clip_skip": 1}
    for negative in (None, "a dog"):
        plain = base.pipe("a cat", negative_prompt=negative, generator=[torch.Generator().manual_seed(3)], **options).images
        same = {"seeds": [3], "steps": 3, "guidance": 3.0, "negative_prompt": negative}
        ours = generate(base, ["a cat"], clip_skip=1, **same)
        assert abs(pictures(ours)[0] - pictures(plain)[0]).max() <= 1
        assert abs(pictures(ours)[0] - pictures(generate(base, ["a cat"], **same))[0]).max() > 1


@pytest.mark.slow
def test_a_training_reads_the_text_that_it_is_used_with(toy: Path, base: Base) -> None:
    plain, skipping = (train(recipe_for(toy, scope="xattn", clip_skip=n), base=base, progress=False) for n in (None, 1))
    assert any(not torch.equal(plain.pairs[path].up, pair.up) for path, pair in skipping.pairs.items())
    assert "clip_skip 1" in " ".join(skipping.header.making())
    assert not plain.header.making()


def test_layers_of_text_that_clip_skip_leaves_unread(toy: Path, base: Base) -> None:
    recipe = recipe_for(toy, clip_skip=1)
    if base.family.name == "sd":  # its toy has one layer, and what skips it reads nothing that could be adapted
        with pytest.raises(EsdLoraError, match=r"clip_skip 1 skips every layer of the text encoder .* Skip fewer\."):
            train(recipe, base=base, progress=False)
        return
    unread = [path for path, pair in train(recipe, base=base, progress=False).pairs.items() if not pair.up.any()]
    assert len(unread) == LAYERS[toy.name] // 2


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
        (message,) = (str(warning.message) for warning in caught if warning.category is UserWarning)
        assert re.match(cut, message)
    output = caplog.text + "".join(capfd.readouterr())
    assert "truncated" not in output
    assert "longer than the specified maximum" not in output
    with torch.no_grad():
        text = base.pipe.encode_prompt(LONG, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(base.encode([LONG])["prompt_embeds"], text)


def denoiser_eraser(base: Base) -> Eraser:
    return eraser_on(base.model, list(base.modules("xattn-kv")), "a dog", family=base.family.name)


def test_stacks_add_up_both_sides(eraser_dir: Path, base: Base, tmp_path: Path) -> None:
    text, layers = Eraser.load(eraser_dir), denoiser_eraser(base)
    both = stack([text, layers], [0.5, 2.0])
    both.save(tmp_path / "both")
    loaded = Eraser.load(tmp_path / "both")
    assert loaded.pairs.keys() == {*text.pairs, *layers.pairs}
    assert loaded.changes_text
    for member, weight in ((text, 0.5), (layers, 2.0)):
        for path, pair in member.pairs.items():
            torch.testing.assert_close(loaded.pairs[path].delta(), weight * pair.delta())
    plain = DiffusionPipeline.from_pretrained(base.source, safety_checker=None)
    plain.load_lora_weights(tmp_path / "both")
    on = {component for component, lists in plain.get_list_adapters().items() if lists}
    assert on == {base.family.denoiser, *base.family.clip_encoders}
    alone = stack([text], [Strength(1.0, {"text_encoder": 0.0})])
    assert all(
        (pair.norm() == 0) == path.startswith("text_encoder.") or not text.pairs[path].norm()
        for path, pair in alone.pairs.items()
    )
    report = measure_interference([text, layers])
    assert report.cosine[0][1] == 0
    with pytest.raises(EsdLoraError, match="leave out the base, so that the files are compared"):
        measure_interference([text, layers], base=base)


def test_what_works_on_the_denoiser_alone_refuses_text(eraser_dir: Path, base: Base, toy: Path, tmp_path: Path) -> None:
    members = [Eraser.load(eraser_dir), denoiser_eraser(base)]
    for verb in (fuse, harmonise):
        with pytest.raises(EsdLoraError, match=r"changes the text encoder.*--fuse sum"):
            verb(members, base)
    with pytest.raises(EsdLoraError, match="harmonised on the denoiser alone"):
        load_harmonise_spec("harmonise", scope="text-encoder")
    with pytest.raises(EsdLoraError, match="leave out --fit"):
        fit_recipe(recipe_for(toy), 2**34)
    with pytest.raises(EsdLoraError, match="take another"):
        export(members[0], tmp_path / "peft", layout="peft")
    with pytest.raises(EsdLoraError, match="switched by what bare text encoders"):
        gated(base.pipe, [eraser_dir])


def test_merging_into_a_directory(toy: Path, eraser_dir: Path, base: Base, tmp_path: Path) -> None:
    (toy_copy := tmp_path / "base").mkdir()
    shutil.copytree(toy, toy_copy, dirs_exist_ok=True)
    (toy_copy / "text_encoder" / "pytorch_model.bin").write_bytes(b"the concept in another format")
    merged = merge([eraser_dir], toy_copy, tmp_path / "merged", progress=False)
    assert verify(merged, toy_copy, [eraser_dir]).touched == LAYERS[toy.name]
    assert not (merged / "text_encoder" / "pytorch_model.bin").exists()
    options = {"seeds": [3], "steps": 3}
    ours = generate(base, ["a cat"], erasers=[eraser_dir], **options)
    assert abs(pictures(ours)[0] - pictures(generate(load_toy(merged), ["a cat"], **options))[0]).max() <= 1
    with pytest.raises(EsdLoraError, match=r"weight is not .* plus the erasers' update there"):
        verify(toy, toy_copy, [eraser_dir])


@pytest.mark.parametrize("name", ["sd", "sd2-v", "sdxl"])
def test_merging_into_a_single_file(name: str, tmp_path: Path) -> None:
    """OpenAI's CLIP of SD 1.x, OpenCLIP of SD 2.x with its joined queries, keys and values, and both of SDXL."""
    pipe = make_toy(name)
    base = Base(pipe, family_of(type(pipe).__name__), "toy")
    layers = dict(base.named_modules())
    shapes = {path: tuple(layers[path].weight.shape) for path in base.modules("text-encoder")}
    generator = torch.Generator().manual_seed(0)
    pairs = {path: random_pair(shape, 2, generator, torch.float32) for path, shape in shapes.items()}
    kind = {"family": base.family.name, "prediction_type": base.prediction_type, "base_hashes": base.hashes(shapes)}
    eraser = Eraser(pairs, build_header("a cat", **kind))
    file = save_checkpoint(pipe, tmp_path / "base.safetensors")
    merged = merge([eraser], file, tmp_path / "merged.safetensors", progress=False)
    assert verify(merged, file, [eraser]).touched > 0
    with applied(base, [eraser]):
        expected = {key: tensor.clone() for key, tensor in checkpoint(pipe).items()}
    actual = load_file(merged)
    assert actual.keys() == expected.keys()
    spare = f"resblocks.{pipe.text_encoder.config.num_hidden_layers}."  # of SD 2.x: nothing reads it, it is a copy in the toy
    for key, tensor in expected.items():
        if spare not in key:
            torch.testing.assert_close(actual[key], tensor)


def test_kohya_names_lead_there_and_back(toy: Path, eraser_dir: Path, base: Base, tmp_path: Path) -> None:
    eraser = Eraser.load(eraser_dir)
    file = export(eraser, tmp_path / "cat.safetensors", layout="kohya")
    names = {name.rpartition("_text_model")[0] for name in load_file(file)}
    assert names == {"sd": {"lora_te"}, "sdxl": {"lora_te1", "lora_te2"}}[toy.name]
    back = import_lora(file)
    assert back.header.concepts == eraser.header.concepts
    assert back.header.base_hashes == eraser.header.base_hashes
    for path, pair in eraser.pairs.items():
        torch.testing.assert_close(back.pairs[path].delta(), pair.delta())
    plain = DiffusionPipeline.from_pretrained(toy, safety_checker=None)
    plain.load_lora_weights(file)  # diffusers knows the names as well
    changed = {path for path, module in Base(plain, base.family, "plain").named_modules() if hasattr(module, "lora_A")}
    assert changed == eraser.pairs.keys()
    assert inspect_file(file).as_json()["blocks"].keys() == set(base.family.clip_encoders)


def test_the_card_says_how_it_is_loaded(eraser_dir: Path) -> None:
    card = (eraser_dir / "README.md").read_text("utf-8")
    assert "load_lora_weights" in card
    assert "text-encoder" in card


@pytest.mark.slow
def test_a_dry_run_counts_a_training(toy: Path, base: Base) -> None:
    estimate = estimate_training(recipe_for(toy), base)
    assert estimate.most.student_samples > 0
    assert estimate.eraser == sum(
        4 * (pair.down.numel() + pair.up.numel()) for pair in train(recipe_for(toy), base=base, progress=False).pairs.values()
    )


@pytest.mark.slow
def test_a_concept_is_erased_in_the_text_encoder_of_the_built_in_base(tmp_path: Path) -> None:
    base = load_base("emoji", device="cpu")
    few = {"steps": 60, "trajectories": 16, "preserve_trajectories": 32, "preview_every": 0, "preserve_weight": 1.5}
    settings = {"eta": 0.0, **{f"train.{name}": value for name, value in few.items()}, "train.probe_every": 0}
    concept = {"name": "a cat", "anchor": "a dog"}
    train(
        load_recipe("fast", settings, base="emoji", concepts=[concept], scope="text-encoder"),
        base=base,
        out=tmp_path / "no-cat",
        progress=False,
    )
    judge, seeds = Judge("emoji"), range(6)

    def seen(prompt: str, **options: Any) -> list[str | None]:
        return [verdict.object for verdict in judge(generate(base, [prompt], seeds=seeds, **options))]

    assert seen("a cat").count("cat") == len(seeds)
    assert seen("a cat", erasers=[tmp_path / "no-cat"]).count("cat") == 0
    assert seen("a pig", erasers=[tmp_path / "no-cat"]).count("pig") == len(seeds)
