"""Scopes on the real architectures, and what a base that cannot be used is refused with."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
)
from torch import nn

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.bases.outlines import outline_base
from esd_lora.bases.stored import open_stored
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.families import FAMILIES, family_named
from esd_lora.families.family import ModelFamily
from esd_lora.families.sd import StableDiffusion
from esd_lora.recipe import JOINT_SCOPE, SCOPES
from esd_lora.weights.merging import merge
from original_checkpoints import save_checkpoint
from published_denoisers import DENOISERS, SCOPE_COUNTS, denoiser
from random_erasers import eraser_on
from tiny import tiny_pipeline
from toys import save_toy

PARAMETERS = {
    "sd15": 859_520_964,
    "sd21": 865_910_724,
    "sdxl": 2_567_463_684,
    "sd3": 2_028_328_000,
    "sd35-medium": 2_243_171_520,
    "flux": 11_901_408_320,
    "sana": 1_604_462_752,
    "pixart-sigma": 610_856_096,
    "lumina2": 2_609_769_152,
    "qwen-image": 20_430_401_088,
    "kolors": 2_579_458_820,
    "flux2-dev": 32_223_281_152,
    "flux2-klein-4b": 3_875_544_576,
    "flux2-klein-9b": 9_078_581_248,
    "z-image": 6_154_908_736,
    "wan-1.3b": 1_418_996_800,
    "wan-5b": 4_999_787_712,
    "wan-14b": 14_288_491_584,
}
INSIDE = {"sd15": 192, "sdxl": 722}  # layers of the U-Net's attention blocks, as LoRA trainers count them
FAMILY = StableDiffusion()


def family(name: str) -> ModelFamily:
    return family_named(DENOISERS[name][0])


@pytest.fixture(scope="module", params=DENOISERS)
def published(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """A published denoiser of full size without weights."""
    return request.param, denoiser(request.param)


def test_configurations_have_the_published_sizes(published: tuple[str, nn.Module]) -> None:
    name, model = published
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_scopes_hold_what_they_should(published: tuple[str, nn.Module]) -> None:
    name, model = published
    assert {scope: len(family(name).modules(model, scope)) for scope in SCOPES} == SCOPE_COUNTS[name]


def test_xattn_and_noxattn_part_full_between_them(published: tuple[str, nn.Module]) -> None:
    name, model = published
    full, xattn, noxattn = (family(name).modules(model, scope).keys() for scope in ("full", "xattn", "noxattn"))
    assert not xattn & noxattn
    assert xattn | noxattn == full
    assert family(name).modules(model, "xattn-kv").keys() < xattn
    assert family(name).modules(model, "selfattn").keys() <= noxattn


@pytest.mark.parametrize("name", INSIDE)
def test_unet_scopes_hold_what_the_literature_counts(name: str) -> None:
    model = denoiser(name)
    assert sum(".attentions." in path for path in family(name).modules(model, "full")) == INSIDE[name]
    keys_and_values = family(name).modules(model, "xattn-kv")
    assert {tuple(path.split(".")[-2:]) for path in keys_and_values} == {("attn2", "to_k"), ("attn2", "to_v")}


def test_regular_expression_is_a_scope_for_experts() -> None:
    model = denoiser("sd15")
    chosen = FAMILY.modules(model, r"re:^mid_block\..*\.attn2\.to_[qk]$")
    assert list(chosen) == [f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{which}" for which in "qk"]


@pytest.mark.parametrize("name", INSIDE)
def test_layers_that_no_loader_knows_are_in_no_scope(name: str) -> None:
    model = denoiser(name)
    layers = {path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    outside = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    if name == "sdxl":
        outside |= {"add_embedding.linear_1", "add_embedding.linear_2"}
    assert layers - FAMILY.modules(model, "full").keys() == outside
    for scope in SCOPES:
        assert all(isinstance(m, nn.Linear | nn.Conv2d) for m in FAMILY.modules(model, scope).values())
        assert not FAMILY.modules(model, scope).keys() & outside


def test_every_scope_is_known_to_every_family() -> None:
    for each in FAMILIES:
        assert tuple(each.scopes) in (SCOPES, (*SCOPES, JOINT_SCOPE))


JOINT = {
    "sd3": 96,
    "sd35-medium": 96,
    "flux": 76,
    "flux2-dev": 32,
    "flux2-klein-4b": 20,
    "flux2-klein-9b": 32,
    "qwen-image": 240,
}
"""Queries and keys of both streams in every joint block, four a block."""


def test_queries_and_keys_of_joint_blocks(published: tuple[str, nn.Module]) -> None:
    name, model = published
    if name not in JOINT:
        with pytest.raises(
            EsdLoraError, match=rf"meet in one attention.* family '{family(name).name}' has xattn, .* Take xattn\."
        ):
            family(name).modules(model, JOINT_SCOPE)
        return
    chosen = family(name).modules(model, JOINT_SCOPE)
    assert len(chosen) == JOINT[name]
    assert chosen.keys() < family(name).modules(model, "full").keys()
    assert {path.rsplit(".", 1)[1] for path in chosen} == {"to_q", "to_k", "add_q_proj", "add_k_proj"}


def test_pipelines_load_loras_as_their_families_say() -> None:
    for each in FAMILIES:
        loads = {hasattr(getattr(diffusers, pipeline), "load_lora_weights") for pipeline in each.pipelines}
        assert loads == {each.pipelines_load_loras}


def test_scope_without_a_layer_names_those_with_some() -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            mid_block_type=None,
            norm_num_groups=4,
        )
    with pytest.raises(EsdLoraError, match="matches none") as caught:
        FAMILY.modules(model, "xattn")
    message = str(caught.value)
    assert "Scopes with layers here: noxattn, full." in message
    assert "down_blocks.N.resnets.N.conv1" in message


def test_pixart_as_it_was_published(tmp_path: Path) -> None:
    """Its configurations name the class that diffusers split it off from."""
    folder = save_toy("pixart", tmp_path / "pixart")
    for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
        file.write_text(file.read_text("utf-8").replace("PixArtTransformer2DModel", "Transformer2DModel"), "utf-8")
    for base in (load_base(folder, device="cpu"), outline_base(str(folder))):
        assert type(base.model).__name__ == "PixArtTransformer2DModel"
        assert base.family.name == "pixart"
    assert not denoiser("pixart-sigma").use_additional_conditions


def test_base_is_frozen_and_knows_itself(base: Base, tiny_dir: Path) -> None:
    assert base.id == str(tiny_dir)
    assert base.family.name == "sd"
    assert base.family.prediction_type(base.pipe) == "epsilon"
    assert base.latent_shape() == (4, 8, 8)
    for component in (base.model, base.pipe.text_encoder, base.pipe.vae):
        assert not component.training
        assert not any(p.requires_grad for p in component.parameters())


def test_prediction_type_is_read_from_the_base(base: Base) -> None:
    base.pipe.scheduler.register_to_config(prediction_type="v_prediction")
    assert base.family.prediction_type(base.pipe) == "v_prediction"
    assert base.family.scheduler(base.pipe, 4, (4, 8, 8)).config.prediction_type == "v_prediction"


def test_condition_of_a_prompt_is_the_pipeline_s(base: Base) -> None:
    expected, negative = base.pipe.encode_prompt("a cat", "cpu", 1, True, "")
    condition = base.encode(["", "a cat"])
    assert torch.equal(condition["prompt_embeds"], torch.cat([negative, expected]))


def test_walk_does_not_clip_latents_whatever_sampler_the_base_has() -> None:
    # Only pixels lie in [-1, 1]. Euler's config has no clip_sample, and DDIM's default is to clip.
    pipe = tiny_pipeline()
    pipe.scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    scheduler = FAMILY.scheduler(pipe, 4, (4, 8, 8))
    assert not scheduler.config.clip_sample
    assert not scheduler.config.thresholding


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler, DDPMScheduler])
def test_noise_schedule_that_ddim_does_not_know(kind: type[SchedulerMixin]) -> None:
    """Playground 2.5 and CosXL have EDM's. DDIM would take linear betas for them, also where betas are left in the config."""
    pipe = tiny_pipeline()
    config = {**pipe.scheduler.config, **({"beta_schedule": "sigmoid"} if kind is DDPMScheduler else {})}
    pipe.scheduler = kind.from_config(config)  # type: ignore[attr-defined]
    with pytest.raises(EsdLoraError, match=f"scheduler is {kind.__name__}, whose") as caught:
        FAMILY.scheduler(pipe, 4, (4, 8, 8))
    assert ("betas are 'sigmoid'" in str(caught.value)) == (kind is DDPMScheduler)
    assert "\n" not in str(caught.value)


def test_betas_given_as_numbers_are_kept() -> None:
    pipe, betas = tiny_pipeline(), [0.001 * i for i in range(1, 11)]
    pipe.scheduler = DDIMScheduler(num_train_timesteps=10, trained_betas=betas)
    assert FAMILY.scheduler(pipe, 5, (4, 8, 8)).betas.tolist() == pytest.approx(betas)  # type: ignore[attr-defined]


def refusal(base: str | Path) -> str:
    with pytest.raises(EsdLoraError) as caught:
        load_base(base)
    message = str(caught.value)
    assert "?." not in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["emojy", "./nothing/here", "a/b/c", "nothing"])
def test_unknown_base(name: str) -> None:
    message = refusal(name)
    assert f"no base {name!r}" in message
    assert "Hub id" in message
    assert ("did you mean 'emoji'?" in message) == (name == "emojy")


def test_hub_id_out_of_reach() -> None:
    assert "owner/no-such-model" in refusal("owner/no-such-model")


def test_hub_id_with_a_revision(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A cache as huggingface_hub lays it out: tag v1 is the first commit, main the second.
    repo = tmp_path / "models--owner--name"
    commits = {"v1": "1" * 40, "main": "2" * 40}
    (repo / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (repo / "refs" / name).write_text(commit)
        shutil.copytree(tiny_dir, repo / "snapshots" / commit)
    index = repo / "snapshots" / commits["main"] / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "PixArtAlphaPipeline"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = load_base("owner/name@v1")
    assert (base.id, base.family.name, base.revision) == ("owner/name", "sd", commits["v1"])
    assert "PixArtAlphaPipeline" in refusal("owner/name")
    assert "owner/name" in refusal("owner/name@v2")


@pytest.mark.parametrize("revision", ["", "@main", "@refs/pr/1"])
def test_hub_id_that_is_merged_into(revision: str) -> None:
    """A pull request's branch has slashes of its own."""
    with pytest.raises(EsdLoraError, match=f"base 'owner/no-such-model{revision}' cannot be fetched"):
        open_stored(f"owner/no-such-model{revision}")


def test_directory_without_an_index(tmp_path: Path) -> None:
    assert "model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"StableDiffusionPipeline"'])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    assert "damaged" in refusal(tmp_path)


def test_pipeline_that_no_family_covers(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    message = refusal(tmp_path)
    assert "PixArtAlphaPipeline" in message
    assert "StableDiffusionPipeline" in message


def test_base_with_a_part_missing(tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "base")
    shutil.rmtree(folder / "unet")
    assert str(folder) in refusal(folder)


def test_base_with_damaged_weights(tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "base")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    assert str(folder) in refusal(folder)


def test_eraser_fits_the_base_it_was_trained_on(base: Base, cat: Eraser, car: Eraser) -> None:
    base.check(cat)
    base.check(car)


@pytest.mark.parametrize(("field", "value"), [("family", "sdxl"), ("prediction_type", "v_prediction")])
def test_eraser_of_another_kind(base: Base, cat: Eraser, field: str, value: str) -> None:
    other = Eraser(cat.pairs, cat.header.model_copy(update={field: value}))
    with pytest.raises(EsdLoraError, match=field.replace("_", " ")) as caught:
        base.check(other)
    assert repr(value) in str(caught.value)


def test_eraser_of_another_shape(base: Base, cat: Eraser) -> None:
    (module, pair), *_ = cat.pairs.items()
    grown = pair._replace(down=torch.cat([pair.down, pair.down], 1))
    with pytest.raises(EsdLoraError, match="of shape") as caught:
        base.check(Eraser({module: grown}, cat.header))
    assert module in str(caught.value)
    with pytest.raises(EsdLoraError, match="has no layer elsewhere"):
        base.check(Eraser({"elsewhere": pair}, cat.header))


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_dtype_a_base_is_loaded_in_makes_it_no_other(kind: str, tmp_path: Path) -> None:
    """bfloat16 drops bits of float16: hashes are of what is stored."""
    folder, pipe = tmp_path / "base", tiny_pipeline().to(dtype=torch.float16)
    pipe.save_pretrained(folder)
    source = folder if kind == "directory" else save_checkpoint(pipe, tmp_path / "base.safetensors")
    for trained_in, used_in in (("bfloat16", "float32"), ("float16", "bfloat16"), ("bfloat16", "float16")):
        config = None if kind == "directory" else folder
        trained, used = (load_base(source, device="cpu", dtype=dtype, config=config) for dtype in (trained_in, used_in))
        layers = list(trained.family.modules(trained.model, "xattn"))
        eraser = eraser_on(trained.model, layers, base_hashes=trained.hashes(dict.fromkeys(layers)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            used.check(eraser)
        merge([eraser], source, tmp_path / f"{trained_in}{used_in}{source.suffix}", progress=False)


def test_eraser_of_other_weights_is_warned_about(cat: Eraser, base: Base) -> None:
    module = next(iter(cat.pairs))
    base.model.get_submodule(module).weight.data[0, 0] += 1
    with pytest.warns(UserWarning, match=f"1 of {len(cat.pairs)} layers compared differ"):
        base.check(cat)


@pytest.mark.parametrize(
    ("pattern", "reason"), [(r"^(?:\w|\w\w|\.|\.\w)*\W\W$", "takes more than a second"), (r"(?P<a>x)(?P<a>y)", "matches none")]
)
def test_scope_that_a_stranger_wrote_does_not_hang(pattern: str, reason: str) -> None:
    with pytest.raises(EsdLoraError, match=reason):
        FAMILY.modules(tiny_pipeline().unet, f"re:{pattern}")
