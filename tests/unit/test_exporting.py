"""Files for other programs: each client's own rules give the same update for every layer, and the way back loses nothing."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open

from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.stacking import stack
from esd_lora.errors import EsdLoraError
from esd_lora.families import family_named
from esd_lora.formats.exporting import LAYOUTS, export, kohya_tensors
from esd_lora.formats.importing import import_lora
from published_denoisers import DENOISERS, denoiser
from random_erasers import eraser_on, random_pair
from tiny import tiny_pipeline
from toy_denoisers import MODELS, client_deltas, client_names, eraser_on_all_layers, layers_of, original_deltas
from toys import make_toy

FAMILIES = tuple(MODELS)


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {family: make() for family, (make, _, _) in MODELS.items()}


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def output_path(layout: str, folder: Path) -> Path:
    return folder / ("peft" if layout == "peft" else f"{layout}.safetensors")


def assert_same_deltas(actual: Eraser, expected: Eraser, tolerance: float = 1e-6) -> None:
    assert actual.pairs.keys() == expected.pairs.keys()
    for module, pair in expected.pairs.items():
        distance = (actual.pairs[module].delta() - pair.delta()).norm() / pair.delta().norm()
        assert distance < tolerance, module


@pytest.mark.parametrize("family", FAMILIES)
def test_clients_add_the_same_update(family: str, models: dict[str, torch.nn.Module]) -> None:
    """Every weight of the original model, those that no eraser touches included; mixed ranks, convolutions, fused layers."""
    model = models[family]
    eraser = eraser_on_all_layers(family, model)
    expected, table = original_deltas(family, model, eraser), client_names(family, model)
    actual = client_deltas(kohya_tensors(eraser), table)
    assert len(eraser.pairs) > 20 or family in ("pixart", "wan") or family.startswith("flux")
    for name, delta in expected.items():
        added = actual.pop(name).reshape(delta.shape) if name in actual else torch.zeros_like(delta)
        torch.testing.assert_close(added, delta, rtol=1e-5, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert not actual


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["xattn", "xattn-kv", "selfattn"])
def test_scopes_that_are_part_of_a_fused_layer(family: str, scope: str, models: dict[str, torch.nn.Module]) -> None:
    model = models[family]
    eraser = eraser_on(model, layers_of(family, model, scope), **MODELS[family][2])
    expected, actual = original_deltas(family, model, eraser), client_deltas(kohya_tensors(eraser), client_names(family, model))
    for name, delta in expected.items():
        if name in actual:
            torch.testing.assert_close(actual[name].reshape(delta.shape), delta, rtol=1e-5, atol=2e-5)
        else:
            assert not delta.any()


SHARED = {
    **{"sd15": 278, "sd21": 278, "sdxl": 788, "sd3": 239, "sd35-medium": 265, "flux": 306},
    **{"flux2-dev": 161, "flux2-klein-4b": 81, "flux2-klein-9b": 113, "z-image": 203},
    **{"pixart-sigma": 198, "lumina2": 179, "qwen-image": 841},
    **{"wan-1.3b": 302, "wan-5b": 302, "wan-14b": 402},
}
"""Published model to the number of names that its layers have together."""


@pytest.mark.parametrize("name", [name for name, (family, _, _) in DENOISERS.items() if family in FAMILIES])
def test_every_layer_of_a_published_model_has_a_name(name: str) -> None:
    """As many kohya names as there are layers; Flux and SD 3 have fewer, because queries, keys and values share one."""
    family, model = DENOISERS[name][0], denoiser(name)
    layers = layers_of(family, model)
    names, places = family_named(family).kohya_names(), family_named(family).original_layers()
    assert set(layers) <= names.keys()
    shared: dict[str, list[int]] = {}
    for layer in layers:
        shared.setdefault(names[layer], []).append(places[layer].first)
    assert all(len(set(firsts)) == len(firsts) for firsts in shared.values())
    assert len(shared) == SHARED[name]


def test_names_are_those_seen_in_files() -> None:
    """Keys of files by sd-scripts for SD 1.5, SDXL and Flux, and of those by musubi-tuner for Wan that diffusers reads."""
    names = ("sd", "sdxl", "flux", "qwen-image", "wan")
    sd, sdxl, flux, qwen, wan = (family_named(name).kohya_names() for name in names)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k" in sd.values()
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj" in sd.values()
    assert (
        sdxl["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]
        == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    )
    assert sdxl["up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_2_2_conv"
    assert sdxl["mid_block.attentions.0.transformer_blocks.9.attn1.to_out.0"] == (
        "lora_unet_middle_block_1_transformer_blocks_9_attn1_to_out_0"
    )
    assert flux["transformer_blocks.18.attn.add_v_proj"] == "lora_unet_double_blocks_18_txt_attn_qkv"
    assert flux["single_transformer_blocks.37.proj_mlp"] == "lora_unet_single_blocks_37_linear1"
    # kohya-ss/musubi-tuner, networks/lora.py: the path in the model with underscores
    assert qwen["transformer_blocks.59.attn.add_k_proj"] == "lora_unet_transformer_blocks_59_attn_add_k_proj"
    # kohya-ss/musubi-tuner, networks/lora_flux_2.py; Z-Image as networks/convert_z_image_lora_to_comfy.py leaves it
    flux2, z_image = (family_named(name).kohya_names() for name in ("flux2", "z-image"))
    assert flux2["single_transformer_blocks.47.attn.to_qkv_mlp_proj"] == "lora_unet_single_blocks_47_linear1"
    assert flux2["transformer_blocks.7.ff_context.linear_in"] == "lora_unet_double_blocks_7_txt_mlp_0"
    assert z_image["layers.29.attention.to_k"] == "lora_unet_layers_29_attention_qkv"
    assert z_image["context_refiner.1.attention.to_out.0"] == "lora_unet_context_refiner_1_attention_out"
    assert wan["blocks.29.attn2.to_out.0"] == "lora_unet_blocks_29_cross_attn_o"
    assert wan["blocks.0.ffn.net.0.proj"] == "lora_unet_blocks_0_ffn_0"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_alpha_for_all_layers(family: str, models: dict[str, torch.nn.Module]) -> None:
    tensors = kohya_tensors(eraser_on_all_layers(family, models[family]))
    assert len({float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}) == 1
    layers = {name.split(".")[0] for name in tensors}
    assert {f"{layer}{part}" for layer in layers for part in (".lora_down.weight", ".lora_up.weight", ".alpha")} == set(tensors)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_kohya_file_in_diffusers(family: str, models: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    """Mixed scopes and ranks in one stack, where a second alpha would be taken for its neighbour's."""
    model = models[family]
    parts = [
        eraser_on(model, layers_of(family, model, "xattn"), rank=4, **MODELS[family][2]),
        eraser_on(model, layers_of(family, model, "noxattn"), seed=1, **MODELS[family][2]),
    ]
    eraser = stack(parts, [1, -0.5])
    file = export(eraser, tmp_path / "k.safetensors", layout="kohya")
    pipe = tiny_pipeline() if family == "sd" else make_toy("sdxl")
    loader = StableDiffusionPipeline if family == "sd" else StableDiffusionXLPipeline
    pipe.register_modules(unet=model)
    loader.load_lora_weights(pipe, file, adapter_name="esd_x")
    actual = {
        path: layer.scaling["esd_x"] * LoraPair(layer.lora_A["esd_x"].weight, layer.lora_B["esd_x"].weight).delta()
        for path, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    model.unload_lora()
    assert actual.keys() == eraser.pairs.keys()
    for module, pair in eraser.pairs.items():
        torch.testing.assert_close(actual[module], pair.delta(), rtol=1e-5, atol=2e-5)


def test_kohya_file_of_flux_in_diffusers(tmp_path: Path) -> None:
    """At Flux's own width, which diffusers' converter takes for granted; without a model."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "transformer_blocks.0.attn.add_k_proj": (3072, 3072),
        "transformer_blocks.0.attn.add_v_proj": (3072, 3072),
        "transformer_blocks.0.attn.to_q": (3072, 3072),
        "transformer_blocks.1.attn.to_out.0": (3072, 3072),
        "transformer_blocks.1.norm1_context.linear": (18432, 3072),
        "single_transformer_blocks.3.attn.to_v": (3072, 3072),
        "single_transformer_blocks.3.proj_mlp": (12288, 3072),
        "single_transformer_blocks.3.proj_out": (3072, 15360),
    }
    pairs = {
        module: random_pair(shape, 1 + i % 2, generator, torch.float32) for i, (module, shape) in enumerate(shapes.items())
    }
    eraser = Eraser(pairs, eraser_on_all_layers("flux", make_toy("flux-dev").transformer).header)
    file = export(eraser, tmp_path / "k.safetensors", layout="kohya")
    converted = FluxPipeline.lora_state_dict(str(file))
    for module, pair in pairs.items():
        down, up = (converted[f"transformer.{module}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(up @ down, pair.delta(), rtol=1e-5, atol=1e-4)


def test_kohya_file_of_qwen_image_in_diffusers(models: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    """Underscores in names become dots again, for every layer."""
    eraser = eraser_on_all_layers("qwen-image", models["qwen-image"])
    converted = QwenImagePipeline.lora_state_dict(str(export(eraser, tmp_path / "k.safetensors", layout="kohya")))
    assert len(converted) == 2 * len(eraser.pairs)
    for module, pair in eraser.pairs.items():
        down, up = (converted[f"transformer.{module}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(up @ down, pair.delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(family: str, layout: str, models: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    eraser = eraser_on_all_layers(family, models[family])
    back = import_lora(export(eraser, output_path(layout, tmp_path), layout=layout))
    assert_same_deltas(back, eraser)
    assert back.header == eraser.header
    assert [pair.rank for pair in back.pairs.values()] == [back.pairs[m].rank for m in back.pairs]
    assert {m: pair.rank for m, pair in back.pairs.items()} == {m: pair.rank for m, pair in eraser.pairs.items()}


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(LAYOUTS),
    st.integers(0, 2**16),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.data(),
)
def test_any_eraser_goes_there_and_back(
    tmp_path_factory: pytest.TempPathFactory, family: str, layout: str, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Half precision too, to the 1e-6 of float32: rounding happens nowhere on the way."""
    model = _MODELS.setdefault(family, MODELS[family][0]())
    layers = data.draw(st.lists(st.sampled_from(layers_of(family, model)), min_size=1, max_size=6, unique=True))
    precise = eraser_on(model, layers, "a cat", seed=seed, **MODELS[family][2])
    eraser = Eraser({m: LoraPair(p.down.to(dtype), p.up.to(dtype)) for m, p in precise.pairs.items()}, precise.header)
    back = import_lora(export(eraser, output_path(layout, tmp_path_factory.mktemp("there")), layout=layout))
    assert_same_deltas(back, eraser)


_MODELS: dict[str, torch.nn.Module] = {}


def test_peft_layout_in_peft(models: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    model = models["sd"]
    eraser = eraser_on_all_layers("sd", model)
    folder = export(eraser, tmp_path / "peft", layout="peft")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["inference_mode"] is True  # peft loads it frozen
    loaded = PeftModel.from_pretrained(MODELS["sd"][0](), folder)
    actual = {
        path.removeprefix("base_model.model."): layer.get_delta_weight("default")
        for path, layer in loaded.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert actual.keys() == eraser.pairs.keys()
    for module, pair in eraser.pairs.items():
        torch.testing.assert_close(actual[module], pair.delta(), rtol=1e-5, atol=2e-5)


def test_diffusers_layout_is_an_eraser(models: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    eraser = eraser_on_all_layers("sd", models["sd"])
    file = export(eraser, tmp_path / "d.safetensors", layout="diffusers")
    assert Eraser.load(file).header == eraser.header


def with_width(width: int, **header: object) -> Eraser:
    """An eraser of one key layer whose inputs are as wide as a text encoder's."""
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    layer = SimpleNamespace(weight=torch.zeros(8, width))
    model = SimpleNamespace(named_modules=lambda: [(module, layer)])
    return eraser_on(model, [module], rank=4, **{**MODELS["sd"][2], **header})  # type: ignore[arg-type]


def test_metadata_says_what_is_known(tmp_path: Path) -> None:
    eraser = with_width(768, base="owner/model", cost={"seconds": 60.0, "steps": 200.0})
    file = export(eraser, tmp_path / "k.safetensors", layout="kohya")
    metadata = metadata_of(file)
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_sd_model_name"] == "owner/model"
    assert metadata["ss_output_name"] == "no-cat"
    assert (metadata["ss_network_module"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "4",
    )
    assert metadata["ss_steps"] == "200"
    assert float(metadata["ss_training_finished_at"]) - float(metadata["ss_training_started_at"]) == 60
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.description"] == "A LoRA that removes a cat. Negative strength does the opposite."
    assert "a cat" in metadata["modelspec.tags"].split(", ")
    assert "modelspec.trigger_phrase" not in metadata
    raw = file.read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert (metadata["sshs_model_hash"], metadata["modelspec.hash_sha256"]) == (digest, f"0x{digest}")


@pytest.mark.parametrize(
    ("width", "header", "version", "architecture", "resolution"),
    [
        (1024, {}, "sd_v2", "stable-diffusion-v2-512/lora", "512x512"),
        (1024, {"prediction_type": "v_prediction"}, "sd_v2", "stable-diffusion-v2-768-v/lora", "768x768"),
        (16, {}, None, None, None),
    ],
)
def test_metadata_tells_architectures_apart(
    tmp_path: Path, width: int, header: dict[str, str], version: str | None, architecture: str | None, resolution: str | None
) -> None:
    metadata = metadata_of(export(with_width(width, **header), tmp_path / "k.safetensors", layout="kohya"))
    keys = ("ss_base_model_version", "modelspec.architecture", "modelspec.resolution")
    assert [metadata.get(key) for key in keys] == [version, architecture, resolution]


@pytest.mark.parametrize(
    ("family", "version"),
    [
        *[("sdxl", "sdxl_base_v1-0"), ("flux", "flux1"), ("sd3", "sd3"), ("lumina2", "lumina2")],
        *[("qwen-image", "qwen_image"), ("wan", "wan")],
    ],
)
def test_metadata_of_other_families(tmp_path: Path, models: dict[str, torch.nn.Module], family: str, version: str) -> None:
    metadata = metadata_of(export(eraser_on_all_layers(family, models[family]), tmp_path / "k.safetensors", layout="kohya"))
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_network_dim"] == "Dynamic"


def test_metadata_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    metadata = metadata_of(
        export(with_width(768, base="/home/me/secret/model.safetensors"), tmp_path / "k.safetensors", layout="kohya")
    )
    assert metadata["ss_sd_model_name"] == "model.safetensors"
    assert not re.search("/home", json.dumps({key: value for key, value in metadata.items() if key != "esd_lora"}))


def test_family_without_kohya_names(tmp_path: Path) -> None:
    model = make_toy("sana").transformer
    eraser = eraser_on(model, layers_of("sana", model, "xattn"), family="sana", prefix="transformer", prediction_type="flow")
    with pytest.raises(EsdLoraError, match=r"cannot be written for kohya.*Use layout diffusers"):
        export(eraser, tmp_path / "k.safetensors", layout="kohya")
    assert not list(tmp_path.iterdir())
    for layout in ("diffusers", "peft"):
        assert_same_deltas(import_lora(export(eraser, output_path(layout, tmp_path), layout=layout)), eraser)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_existing_output_needs_force(layout: str, tmp_path: Path) -> None:
    eraser, out = with_width(768), output_path(layout, tmp_path)
    export(eraser, out, layout=layout)
    with pytest.raises(EsdLoraError, match="--force"):
        export(eraser, out, layout=layout)
    export(eraser, out, layout=layout, force=True)


def test_unknown_layout_and_unsuitable_name(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match="did you mean 'kohya'"):
        export(with_width(768), tmp_path / "x.safetensors", layout="kohia")
    with pytest.raises(EsdLoraError, match=r"\.safetensors"):
        export(with_width(768), tmp_path / "x.pt", layout="kohya")
