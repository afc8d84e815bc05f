"""Single-file checkpoints: what is read equals what was written, is told apart by its tensors, and comes without a download."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import original_checkpoints
from esd_lora.bases import single_file
from esd_lora.bases.loading import load_base
from esd_lora.bases.single_file import identify, measure_prediction_type, write_clip_tokenizer
from esd_lora.bases.stored import open_stored
from esd_lora.errors import EsdLoraError
from esd_lora.families import family_named
from esd_lora.files import PICKLES
from published_denoisers import build_component, shipped_config
from toys import make_toy, save_toy

SIZES = {
    # parameters, as counted on the published weights
    "sd1": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sd2": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863},
}
SMALL = {
    "unet": {"sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 16},
    "vae": {"sample_size": 16, "block_out_channels": [32, 32]},
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
TEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def small_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configurations that ship, with every width cut down, in the place of the real ones."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for name in ("sd1", "sd2"):
        parts = shipped_config(name)
        for part, changes in SMALL.items():
            parts[part] |= changes
        for part, kinds in (("unet", ("down_block_types", "up_block_types")), ("vae", ("down_block_types", "up_block_types"))):
            parts[part] |= {kind: [parts[part][kind][0], parts[part][kind][-1]] for kind in kinds}
        parts["unet"]["attention_head_dim"] = 2 if name == "sd1" else [2, 4]
        parts["unet"]["norm_num_groups"] = parts["vae"]["norm_num_groups"] = 8
        (folder / f"{name}.json").write_text(json.dumps(parts))
    (folder / "clip_merges.txt.gz").write_bytes((single_file.CONFIGS / "clip_merges.txt.gz").read_bytes())
    monkeypatch.setattr(single_file, "CONFIGS", folder)
    return folder


def small_checkpoint(configs: Path, name: str, file: Path, metadata: dict[str, str] | None = None, **extra: Any) -> Path:
    """A checkpoint with random weights that fits `small_configs`."""
    parts = json.loads((configs / f"{name}.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {part: build_component(parts, part) for part in SMALL}
    pipe = diffusers.StableDiffusionPipeline(
        **models, tokenizer=None, scheduler=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    return original_checkpoints.save_checkpoint(pipe, file, metadata, **extra)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Counts attempts to reach anything, with the Hub's own offline switch off."""
    addresses: list[Any] = []

    def refuse(_socket: Any, address: Any) -> None:
        addresses.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield addresses
    assert not addresses


@pytest.mark.parametrize("name", ["sd", "sd2-v", "sdxl"])
def test_weights_are_those_that_were_written(name: str, tmp_path: Path) -> None:
    folder = save_toy(name, tmp_path / "base")
    file = original_checkpoints.save_checkpoint(make_toy(name), tmp_path / "model.safetensors")
    expected, actual = load_base(folder, device="cpu"), load_base(file, config=folder, device="cpu")
    assert actual.family is expected.family
    assert actual.prediction_type == expected.prediction_type
    for part, component in expected.pipe.components.items():
        if isinstance(component, torch.nn.Module):
            states = component.state_dict(), getattr(actual.pipe, part).state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(tensor, states[1][path]) for path, tensor in states[0].items()), part
    conditions = expected.encode(["", "a cat"]), actual.encode(["", "a cat"])
    assert all(torch.equal(value, conditions[1][key]) for key, value in conditions[0].items())


@pytest.mark.parametrize(
    ("name", "part"),
    [("sd", "unet"), ("sdxl", "unet"), *((name, "transformer") for name in ("sd3", "sd35", "qwen-image", "wan"))],
)
def test_denoiser_alone_takes_the_rest_from_the_directory(name: str, part: str, tmp_path: Path) -> None:
    folder, other = save_toy(name, tmp_path / "base"), make_toy(name, seed=1)
    with torch.no_grad():
        for parameter in getattr(other, part).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.01)
    file = tmp_path / "model.safetensors"
    originals = {"sd3": "sd3", "sd35": "sd3", "qwen-image": "qwen_image", "wan": "wan"}
    state = getattr(original_checkpoints, originals.get(name, part))(getattr(other, part))
    save_file({key: tensor.detach().clone() for key, tensor in state.items()}, file)
    with pytest.raises(EsdLoraError, match="give --base-config a diffusers directory"):
        load_base(file)
    expected, actual = load_base(folder, device="cpu"), load_base(file, config=folder, device="cpu")
    assert actual.family is expected.family
    for key, component in expected.pipe.components.items():
        if isinstance(component, torch.nn.Module):
            wanted = getattr(other, part) if key == part else component
            states = wanted.state_dict(), getattr(actual.pipe, key).state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(tensor, states[1][path]) for path, tensor in states[0].items()), key


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["flux2-klein", "flux2-dev", "z-image"])
def test_transformers_as_comfyui_has_them_take_the_rest_from_the_directory(name: str, prefix: str, tmp_path: Path) -> None:
    """With and without the prefix of whole checkpoints, which diffusers' converter of Flux.2 does not know."""
    folder, other = save_toy(name, tmp_path / "base"), make_toy(name).transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.01)
    original = original_checkpoints.z_image if name == "z-image" else original_checkpoints.flux2
    file = tmp_path / "model.safetensors"
    save_file({f"{prefix}{key}": tensor.detach().clone() for key, tensor in original(other).items()}, file)
    with pytest.raises(EsdLoraError, match="give --base-config a diffusers directory"):
        load_base(file)
    expected, actual = load_base(folder, device="cpu"), load_base(file, config=folder, device="cpu")
    assert actual.family is expected.family
    for key, component in expected.pipe.components.items():
        if isinstance(component, torch.nn.Module):
            wanted = other if key == "transformer" else component
            states = wanted.state_dict(), getattr(actual.pipe, key).state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(tensor, states[1][path]) for path, tensor in states[0].items()), key


def test_flux_transformer_takes_the_rest_from_the_directory(tmp_path: Path) -> None:
    """Two blocks at Flux's real width, which the converter takes for granted."""
    config = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    with torch.device("meta"):
        wide = diffusers.FluxTransformer2DModel(**config, guidance_embeds=True)
    wide = torch.nn.Module.to(wide, torch.bfloat16).to_empty(device="cpu")
    for number, parameter in enumerate(wide.parameters()):
        # Cheap, and different wherever two rows or two tensors could be mixed up.
        parameter.data.copy_((torch.arange(len(parameter)) % 251 + number).view(-1, *[1] * (parameter.dim() - 1)))
    pipe = make_toy("flux-dev")
    save_file(
        {name: tensor.contiguous() for name, tensor in original_checkpoints.flux(wide).items()}, tmp_path / "flux.safetensors"
    )
    folder = save_toy("flux-dev", tmp_path / "base")
    settings = {key: value for key, value in wide.config.items() if not key.startswith("_")}
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **settings}))
    actual = load_base(tmp_path / "flux.safetensors", config=folder, device="cpu", dtype=torch.bfloat16)
    assert actual.family.name == "flux"
    read = actual.model.state_dict()
    assert read.keys() == wide.state_dict().keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in wide.state_dict().items())
    encoder = pipe.text_encoder_2.state_dict()
    assert all(torch.equal(tensor.bfloat16(), actual.pipe.text_encoder_2.state_dict()[n]) for n, tensor in encoder.items())


def test_lumina_2_transformer_takes_the_rest_from_the_directory(tmp_path: Path) -> None:
    """At Lumina's real width, which the converter takes for granted, with ComfyUI's prefix."""
    narrow = {"ffn_dim_multiplier": 0.01, "multiple_of": 8, "cap_feat_dim": 16, "in_channels": 4}
    config = {"num_layers": 1, "num_refiner_layers": 1, **narrow}
    with torch.device("meta"):
        wide = diffusers.Lumina2Transformer2DModel(**config)
    wide = torch.nn.Module.to(wide, torch.bfloat16).to_empty(device="cpu")
    for number, parameter in enumerate(wide.parameters()):
        parameter.data.copy_((torch.arange(len(parameter)) % 251 + number).view(-1, *[1] * (parameter.dim() - 1)))
    file, folder = tmp_path / "lumina2.safetensors", save_toy("lumina2", tmp_path / "base")
    save_file({name: tensor.contiguous() for name, tensor in original_checkpoints.lumina2(wide).items()}, file)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "Lumina2Transformer2DModel", **config}))
    actual = load_base(file, config=folder, device="cpu", dtype=torch.bfloat16)
    assert actual.family.name == "lumina2"
    read = actual.model.state_dict()
    assert read.keys() == wide.state_dict().keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in wide.state_dict().items())
    encoder = make_toy("lumina2").text_encoder.state_dict()
    assert all(torch.equal(tensor.bfloat16(), actual.pipe.text_encoder.state_dict()[n]) for n, tensor in encoder.items())


def test_single_file_that_diffusers_cannot_read(tmp_path: Path) -> None:
    file, folder = tmp_path / "pixart.safetensors", save_toy("pixart", tmp_path / "base")
    save_file(original_checkpoints.pixart(make_toy("pixart").transformer), file)
    with pytest.raises(
        EsdLoraError, match="holds PixArt-Sigma, which diffusers reads from no single file: erasers can be merged"
    ):
        load_base(file, config=folder)


def test_relatives_with_the_same_blocks_are_told_apart() -> None:
    """By the facts that ComfyUI's model_detection.py tells them by."""
    pixart, lumina = family_named("pixart"), family_named("lumina2")
    sigma = dict.fromkeys(original_checkpoints.pixart(make_toy("pixart").transformer), (1,))
    lumina_2 = dict.fromkeys(original_checkpoints.lumina2(make_toy("lumina2").transformer), (1,))
    assert pixart.recognise(sigma)
    assert lumina.recognise(lumina_2)
    assert not pixart.recognise({**sigma, "ar_embedder.mlp.0.weight": (1,)}), "PixArt-Alpha"
    assert not lumina.recognise({**lumina_2, "model.diffusion_model.clip_text_pooled_proj.0.weight": (1,)}), "NewBie"
    z_image = {name.replace("adaLN_modulation.1", "adaLN_modulation.0"): shape for name, shape in lumina_2.items()}
    assert not lumina.recognise(z_image)
    assert not any(family.recognise(shapes) for family, shapes in ((pixart, lumina_2), (lumina, sigma)))


def test_vae_is_left_out_when_nothing_is_drawn(tmp_path: Path) -> None:
    folder = save_toy("sd", tmp_path / "base")
    file = original_checkpoints.save_checkpoint(make_toy("sd"), tmp_path / "model.safetensors")
    assert load_base(file, config=folder, vae=False, device="cpu").pipe.vae is None


@pytest.mark.parametrize("name", SIZES)
def test_configurations_that_ship_have_the_published_sizes(name: str) -> None:
    parts = shipped_config(name)
    with torch.device("meta"):
        actual = {part: sum(p.numel() for p in build_component(parts, part).parameters()) for part in SIZES[name]}
    assert actual == SIZES[name]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_tokenizer_is_clip_s(pad: str, tmp_path: Path) -> None:
    write_clip_tokenizer(tmp_path, pad)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    # openai/CLIP, clip.tokenize("a photo of a cat"): 49406 starts, 49407 ends
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A Photo of  a CAT").input_ids == tokenizer("a photo of a cat").input_ids
    assert len(tokenizer) == 49408
    padded = tokenizer("a cat", padding="max_length").input_ids
    assert len(padded) == 77
    assert set(padded[4:]) == {49407 if pad == "<|endoftext|>" else 0}


def test_nothing_is_downloaded(small_configs: Path, tmp_path: Path, offline: list[Any]) -> None:  # noqa: ARG001
    base = load_base(small_checkpoint(small_configs, "sd1", tmp_path / "model.safetensors"), device="cpu")
    assert (base.family.name, base.prediction_type) == ("sd", "epsilon")
    assert base.latent_shape() == (4, 8, 8)
    assert base.encode(["a cat"])["prompt_embeds"].shape == (1, 77, 16)


@pytest.mark.parametrize(
    ("name", "metadata", "extra", "expected"),
    [
        ("sd1", None, {}, "epsilon"),
        ("sd1", {"modelspec.prediction_type": "v"}, {}, "v_prediction"),
        ("sd1", {"modelspec.prediction_type": "v_prediction"}, {}, "v_prediction"),
        ("sd1", {"modelspec.prediction_type": "epsilon"}, {"v_pred": torch.zeros(0)}, "v_prediction"),
        ("sd1", {"ss_v_parameterization": "True"}, {}, "v_prediction"),
        ("sd1", None, {"v_pred": torch.zeros(0)}, "v_prediction"),
        ("sd2", {"modelspec.prediction_type": "epsilon"}, {}, "epsilon"),
        ("sd2", {"modelspec.prediction_type": "v_prediction"}, {}, "v_prediction"),
    ],
)
def test_prediction_type_is_what_the_file_says(
    small_configs: Path, tmp_path: Path, name: str, metadata: dict[str, str] | None, extra: dict[str, Any], expected: str
) -> None:
    file = small_checkpoint(small_configs, name, tmp_path / "model.safetensors", metadata, **extra)
    base = load_base(file, device="cpu")
    assert base.prediction_type == open_stored(file).prediction_type == expected
    assert base.family.scheduler(base.pipe, 4, (4, 8, 8)).config.prediction_type == expected
    assert base.latent_shape()[1] == (96 if name == "sd2" and expected == "v_prediction" else 8)


def test_zero_terminal_snr_is_read_from_its_marker(small_configs: Path, tmp_path: Path) -> None:
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    base = load_base(small_checkpoint(small_configs, "sd1", tmp_path / "model.safetensors", **markers), device="cpu")
    scheduler: Any = base.family.scheduler(base.pipe, 4, (4, 8, 8))
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("answers", ["epsilon", "v_prediction"])
def test_prediction_type_is_measured_where_both_are_common(
    small_configs: Path, tmp_path: Path, answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small_checkpoint(small_configs, "sd2", tmp_path / "model.safetensors")
    timesteps: list[torch.Tensor] = []

    def perfect(_: Any, x_t: torch.Tensor, t: torch.Tensor, **_told: Any) -> tuple[torch.Tensor]:
        """A model that knows the one picture it was trained on."""
        timesteps.append(t)
        alpha = diffusers.DDIMScheduler.from_config(scheduler).alphas_cumprod[t]
        picture = torch.linspace(-1, 1, x_t.numel()).view_as(x_t)
        noise = (x_t - alpha.sqrt() * picture) / (1 - alpha).sqrt()
        return (noise if answers == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * picture,)

    scheduler = json.loads((small_configs / "sd2.json").read_text())["scheduler"]
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", perfect)
    base = load_base(file, device="cpu")
    assert base.prediction_type == answers
    assert [int(t) for t in timesteps] == [999]
    assert measure_prediction_type(base.pipe) == answers


SD1 = {FIRST: (320, 4, 3, 3), TEXT: (320, 768), "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,)}
LABEL = "model.diffusion_model.label_emb.0.0.weight"
QWEN = {"txt_norm.weight": (3584,), "transformer_blocks.0.txt_mod.1.weight": (18432, 3072)}
WAN = {
    "head.modulation": (1, 2, 1536),
    "head.head.weight": (64, 1536),
    "patch_embedding.weight": (1536, 16, 1, 2, 2),
    "blocks.0.cross_attn.k.weight": (1536, 1536),
}
CONDITIONER = "conditioner.embedders.{}.model.transformer.resblocks.9.mlp.c_proj.bias"


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        (SD1, "sd"),
        ({FIRST: (320, 4, 3, 3), TEXT: (320, 1024), "cond_stage_model.model.ln_final.bias": (1024,)}, "sd"),
        ({FIRST: (320, 4, 3, 3), LABEL: (1280, 2816), CONDITIONER.format(1): (1280,)}, "sdxl"),
        ({FIRST: (320, 4, 3, 3), TEXT: (320, 768)}, "sd"),
        ({FIRST: (320, 4, 3, 3), LABEL: (1280, 2816)}, "sdxl"),
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1, 1)}, "sd3"),
        ({"joint_blocks.0.x_block.attn.qkv.weight": (1, 1)}, "sd3"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}, "flux"),
        ({"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (128,)}, "flux"),
        (QWEN, "qwen-image"),
        ({f"model.diffusion_model.{name}": shape for name, shape in QWEN.items()}, "qwen-image"),
        (WAN, "wan"),
        ({f"model.diffusion_model.{name}": shape for name, shape in WAN.items()}, "wan"),
    ],
)
def test_family_is_told_from_the_tensors(shapes: dict[str, tuple[int, ...]], family: str) -> None:
    assert identify(Path("model.safetensors"), shapes)[0] is family_named(family)


@pytest.mark.parametrize(
    ("shapes", "content"),
    [
        ({**SD1, FIRST: (320, 9, 3, 3)}, "9 channels"),
        ({**SD1, "control_model.time_embed.0.weight": (1, 1)}, "ControlNet"),
        ({**QWEN, "time_text_embed.addition_t_embedding.weight": (2, 3072)}, "Qwen-Image-Layered"),
        ({**QWEN, "__index_timestep_zero__": ()}, "Qwen-Image-Edit"),
        ({FIRST: (384, 4, 3, 3), LABEL: (1280, 2560), CONDITIONER.format(0): (1280,)}, "refiner"),
        ({FIRST: (320, 4, 3, 3), LABEL: (1280, 2816), CONDITIONER.format(1): (1280,), "edm_mean": (1,)}, "Playground"),
        ({FIRST: (320, 4, 3, 3), LABEL: (1280, 2816), CONDITIONER.format(1): (1280,), "edm_vpred.sigma_max": ()}, "CosXL"),
        ({FIRST: (320, 4, 3, 3), LABEL: (1280, 2048), "cond_stage_model.model.ln_final.bias": (1024,)}, "unCLIP"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 320)}, "a LoRA"),
        ({"unet.down_blocks.0.attn2.to_k.lora_A.weight": (4, 320)}, "a LoRA"),
        ({"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)}, "a VAE alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, "one component of a diffusers pipeline"),
        ({"txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": (1,)}, "'hunyuan-video'"),
        ({**WAN, "patch_embedding.weight": (5120, 36, 1, 2, 2)}, "a relative of Wan that reads more than text"),
        ({**WAN, "vace_blocks.0.after_proj.bias": (1536,)}, "a relative of Wan that reads more than text"),
        ({"a": (1,), "b": (1,), "c": (1,), "d": (1,)}, "4 tensors that are no model known here (a, b, c, ...)"),
        ({}, "0 tensors"),
    ],
)
def test_what_no_family_reads_is_named(shapes: dict[str, tuple[int, ...]], content: str) -> None:
    with pytest.raises(EsdLoraError) as caught:
        identify(Path("model.safetensors"), shapes)
    message = str(caught.value)
    assert content in message
    assert "Supported single files: SD 1.x" in message
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [*PICKLES, ".CKPT"])
@pytest.mark.parametrize("there", [True, False])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str, there: bool) -> None:
    file = tmp_path / f"model{suffix}"
    if there:
        file.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refusal = r"is a pickle, and opening one runs whatever code.*\.safetensors" if there else "there is no such file"
    with pytest.raises(EsdLoraError, match=refusal):
        load_base(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "or damaged"), (b"x", "or damaged"), (b"PK\x03\x04 a zip", "is a pickle"), (b"\xff" * 64, "or damaged")],
)
def test_file_that_is_no_safetensors(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(EsdLoraError, match=reason):
        load_base(file)


def test_truncated_checkpoint(tmp_path: Path) -> None:
    file = original_checkpoints.save_checkpoint(make_toy("sd"), tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(EsdLoraError, match="or damaged"):
        load_base(file)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match=r"no base .*there is no such file"):
        load_base(tmp_path / "model.safetensors")


def test_family_without_configurations_asks_for_them(tmp_path: Path) -> None:
    file = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(128)}, file)
    with pytest.raises(EsdLoraError, match=r"holds Flux\.1, .*--base-config"):
        load_base(file)


def test_configuration_of_another_family(tmp_path: Path) -> None:
    folder = save_toy("sdxl", tmp_path / "sdxl")
    file = original_checkpoints.save_checkpoint(make_toy("sd"), tmp_path / "model.safetensors")
    with pytest.raises(EsdLoraError, match=r"holds SD 1\.x .*'sdxl'"):
        load_base(file, config=folder)
    with pytest.raises(EsdLoraError, match=r"has no model_index\.json"):
        load_base(file, config=tmp_path)


@pytest.mark.parametrize("base", ["emoji", "owner/name"])
def test_configuration_for_a_base_that_is_no_file(base: str, tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match="goes with a single-file checkpoint"):
        load_base(base, config=tmp_path)


def test_configuration_of_another_size(tmp_path: Path) -> None:
    folder = save_toy("sd2-v", tmp_path / "other")
    file = original_checkpoints.save_checkpoint(make_toy("sd"), tmp_path / "model.safetensors")
    with pytest.raises(EsdLoraError, match="does not fit the configuration of a StableDiffusionPipeline") as caught:
        load_base(file, config=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lost", ["model.diffusion_model.out.2.bias", "cond_stage_model.transformer.text_model.final_layer_norm.bias"]
)
def test_checkpoint_without_all_its_tensors(tmp_path: Path, lost: str) -> None:
    folder = save_toy("sd", tmp_path / "base")
    file = original_checkpoints.save_checkpoint(make_toy("sd"), tmp_path / "model.safetensors")
    state = load_file(file)
    del state[lost]
    save_file(state, file)
    with pytest.raises(EsdLoraError, match=str(file)) as caught:
        load_base(file, config=folder)
    assert "\n" not in str(caught.value)
