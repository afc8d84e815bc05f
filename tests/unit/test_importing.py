"""LoRA files of other programs become erasers of the same update, or are refused with what they are."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.formats.cards import save_with_card
from esd_lora.formats.exporting import kohya_tensors
from esd_lora.formats.importing import import_lora
from esd_lora.formats.inspecting import inspect_file
from random_erasers import eraser_on
from tiny import tiny_pipeline
from toy_denoisers import MODELS, eraser_on_all_layers, layers_of, original_deltas

KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_" + KEY.replace(".", "_")


@pytest.fixture(scope="module")
def sd() -> torch.nn.Module:
    return MODELS["sd"][0]()


def save_lora(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, str] | None = None) -> Path:
    file = folder / "van-gogh.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return file


def one_layer(width: int = 768, rank: int = 2, **changes: Tensor) -> dict[str, Tensor]:
    """A layer under kohya's name."""
    parts = {"lora_down.weight": torch.ones(rank, width), "lora_up.weight": torch.ones(8, rank), **changes}
    return {f"{KOHYA}.{part}": tensor for part, tensor in parts.items()}


def assert_same(imported: Eraser, expected: Eraser) -> None:
    assert imported.pairs.keys() == expected.pairs.keys()
    for module, pair in expected.pairs.items():
        torch.testing.assert_close(imported.pairs[module].delta(), pair.delta(), rtol=1e-5, atol=1e-5)


def test_kohya_with_its_own_alphas(sd: torch.nn.Module, tmp_path: Path) -> None:
    """LECO, SPM and sd-scripts write alpha 1 for any rank, or another for every layer."""
    eraser = eraser_on_all_layers("sd", sd)
    tensors: dict[str, Tensor] = {}
    for i, (module, pair) in enumerate(eraser.pairs.items()):
        name, alpha = "lora_unet_" + module.replace(".", "_"), 1.0 + i % 3
        tensors |= {f"{name}.lora_down.weight": pair.down, f"{name}.lora_up.weight": pair.up * pair.rank / alpha}
        if pair.rank != alpha:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    imported = import_lora(save_lora(tensors, tmp_path), family="sd")
    assert_same(imported, eraser)


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    tensors = one_layer()
    file = save_lora(tensors, tmp_path, {"ss_sd_model_name": "v1-5.ckpt", "prompts": "van gogh", "ss_tag_frequency": "{}"})
    header = import_lora(file).header
    assert (header.family, header.prediction_type, header.base) == ("sd", None, "v1-5.ckpt")
    assert [(c.name, c.eta, c.pairs) for c in header.concepts] == [("van-gogh", None, ())]
    assert (header.objective, header.scope, header.recipes, header.base_hashes) == ("unknown", "unknown", (), {})
    (origin,) = header.origins
    assert (origin.how, origin.layout, list(origin.files)) == ("imported", "kohya", [file.name])
    assert origin.notes == {"ss_sd_model_name": "v1-5.ckpt", "prompts": "van gogh"}
    assert "provenance unknown" in "\n".join(inspect_file(file).lines())
    metadata = import_lora(file, concepts=["Van Gogh", "Monet"], base="owner/model")
    assert (metadata.names, metadata.header.base) == (["Van Gogh", "Monet"], "owner/model")


def test_imported_eraser_is_saved_and_loaded(tmp_path: Path) -> None:
    eraser = import_lora(save_lora(one_layer(), tmp_path))
    folder = save_with_card(eraser, tmp_path / "eraser")
    assert {path.name for path in folder.iterdir()} == {"pytorch_lora_weights.safetensors", "README.md"}
    assert Eraser.load(folder).header == eraser.header
    assert "provenance unknown" in (folder / "README.md").read_text("utf-8")


def test_slider_is_a_pickle_of_tensors(tmp_path: Path) -> None:
    """Concept Sliders publish .pt files of kohya's keys."""
    torch.save(one_layer(alpha=torch.tensor(1.0)), tmp_path / "age.pt")
    pair = import_lora(tmp_path / "age.pt").pairs[KEY]
    assert torch.equal(pair.delta(), torch.ones(8, 768))


def test_pickle_of_anything_else_is_not_opened(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    with (tmp_path / "bad.pt").open("wb") as file:
        pickle.dump({"x": Attack()}, file)
    torch.save({"x": Attack()}, tmp_path / "bad2.pt")
    for name in ("bad.pt", "bad2.pt"):
        with pytest.raises(EsdLoraError, match="cannot be read as tensors alone") as caught:
            import_lora(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_pickle_without_tensors(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(EsdLoraError, match="state dict"):
        import_lora(tmp_path / "list.pt")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_sdxl_files_with_either_kind_of_name(family: str, tmp_path: Path) -> None:
    """Sliders and LECO name SDXL's layers as diffusers does, sd-scripts as the original does."""
    model = MODELS["sdxl"][0]()
    eraser = eraser_on_all_layers("sdxl", model)
    names = {m: "lora_unet_" + m.replace(".", "_") for m in eraser.pairs} if family == "sd" else None
    if names:
        tensors = {
            f"{names[m]}.{part}.weight": factor
            for m, pair in eraser.pairs.items()
            for part, factor in zip(("lora_down", "lora_up"), pair, strict=True)
        }
    else:
        tensors = kohya_tensors(eraser)
    assert_same(import_lora(save_lora(tensors, tmp_path), family="sdxl"), eraser)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", ""])
def test_flux_files_with_diffusers_names(prefix: str, tmp_path: Path) -> None:
    """ai-toolkit's files."""
    eraser = eraser_on_all_layers("flux", MODELS["flux"][0]())
    tensors = {f"{prefix}{key.removeprefix('transformer.')}": tensor for key, tensor in eraser.state_dict().items()}
    imported = import_lora(save_lora(tensors, tmp_path))
    assert_same(imported, eraser)
    assert (imported.header.family, imported.header.prefix, imported.header.prediction_type) == ("flux", "transformer", "flow")


def test_flux_files_with_original_dotted_names(tmp_path: Path) -> None:
    """A fused layer that another program trained as one: all of its rows share one `down`."""
    model = MODELS["flux"][0]()
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(7 * 32, 2, generator=generator)
    name = "diffusion_model.single_blocks.0.linear1"
    imported = import_lora(save_lora({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path))
    assert sorted(module.rpartition("blocks.0.")[2] for module in imported.pairs) == [
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "proj_mlp",
    ]
    delta = original_deltas("flux", model, imported)["single_blocks.0.linear1.weight"]
    torch.testing.assert_close(delta, up @ down, rtol=1e-5, atol=1e-5)


def test_flux_and_flux_2_share_names_and_not_sizes(tmp_path: Path) -> None:
    """Single blocks' joined layers, what reads text, and what trainers write of the model tell them apart; nothing else."""

    def family_of(name: str, inputs: int, outputs: int, metadata: dict[str, str] | None = None) -> str:
        pair = {"lora_down": torch.ones(2, inputs), "lora_up": torch.ones(outputs, 2)}
        tensors = {f"lora_unet_{name}.{part}.weight": factor for part, factor in pair.items()}
        return import_lora(save_lora(tensors, tmp_path, metadata)).header.family

    assert family_of("single_blocks_0_linear1", 32, 7 * 32) == "flux"
    assert family_of("single_blocks_0_linear1", 32, 9 * 32) == "flux2"
    assert family_of("txt_in", 4096, 32) == "flux"
    assert family_of("txt_in", 7680, 32) == "flux2"
    assert family_of("double_blocks_0_txt_attn_qkv", 32, 96, {"ss_base_model_version": "flux1"}) == "flux"
    assert family_of("double_blocks_0_txt_attn_qkv", 32, 96, {"ss_base_model_version": "flux_2_klein_4b"}) == "flux2"
    assert family_of("double_blocks_0_txt_attn_qkv", 32, 96, {"modelspec.architecture": "Flux.2-dev/lora"}) == "flux2"
    with pytest.raises(EsdLoraError, match="fit flux and flux2 alike"):
        family_of("double_blocks_0_txt_attn_qkv", 32, 96)


def test_z_image_files_with_split_or_joined_layers(tmp_path: Path) -> None:
    """musubi-tuner trains queries, keys and values apart, under diffusers' names with underscores; ComfyUI has them joined."""
    eraser = eraser_on_all_layers("z-image", MODELS["z-image"][0]())
    apart = {
        f"lora_unet_{module.replace('.', '_')}.{part}.weight": factor
        for module, pair in eraser.pairs.items()
        for part, factor in zip(("lora_down", "lora_up"), pair, strict=True)
    }
    for tensors in (apart, kohya_tensors(eraser)):
        imported = import_lora(save_lora(tensors, tmp_path))
        assert imported.header.family == "z-image"
        assert_same(imported, eraser)


def test_diffusers_file_with_its_own_metadata(tmp_path: Path) -> None:
    """`save_lora_weights` leaves alpha / rank to a JSON document in the header."""
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=8, target_modules=["to_k", "to_v"], rank_pattern={"to_v": 4}, init_lora_weights=False), "x"
    )
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="x"))
    config = pipe.unet.peft_config["x"]
    config.base_model_name_or_path = None
    metadata = {
        key: value for key, value in config.to_dict().items() if key in ("r", "lora_alpha", "rank_pattern", "use_rslora")
    }
    type(pipe).save_lora_weights(tmp_path / "lora", unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    imported = import_lora(tmp_path / "lora", family="sd")
    modules = dict(pipe.unet.named_modules())
    assert {pair.rank for pair in imported.pairs.values()} == {2, 4}
    for module, pair in imported.pairs.items():
        torch.testing.assert_close(pair.delta(), modules[module].get_delta_weight("x"), rtol=1e-5, atol=1e-6)


def test_peft_directory_with_alpha_and_rslora(tmp_path: Path) -> None:
    down, up = torch.randn(9, 16), torch.randn(8, 9)
    tensors = {f"base_model.model.{KEY}.lora_A.weight": down, f"base_model.model.{KEY}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for rslora, scale in ((False, 2.0), (True, 6.0)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 9, "lora_alpha": 18, "use_rslora": rslora}))
        imported = import_lora(tmp_path, family="sd")
        torch.testing.assert_close(imported.pairs[KEY].delta(), scale * up @ down)
        assert imported.header.origins[0].layout == "peft"


def test_text_encoder_is_not_dropped_in_silence(tmp_path: Path) -> None:
    clip = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    extra = {f"{clip}.{k.split('.', 1)[1]}": t.clone() for k, t in one_layer().items()}
    file = save_lora({**one_layer(), **extra}, tmp_path)
    assert list(import_lora(file).pairs) == [KEY, "text_encoder.text_model.encoder.layers.0.mlp.fc1"]
    assert list(import_lora(file, without_text_encoder=True).pairs) == [KEY]
    unknown = {name.replace(clip, "lora_te3_encoder_block_0_layer_0_SelfAttention_q"): t for name, t in extra.items()}
    file = save_lora({**one_layer(), **unknown}, tmp_path)
    with pytest.raises(
        EsdLoraError, match=r"a text encoder that an eraser of family 'sd' does not hold.*--without-text-encoder"
    ):
        import_lora(file)
    assert list(import_lora(file, without_text_encoder=True).pairs) == [KEY]


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_layers_in_diffusers_names(prefix: str, tmp_path: Path) -> None:
    """With the module around CLIP's text model, or without it as in transformers 5; scales are the component's own."""
    layer = f"{prefix}encoder.layers.1.self_attn.q_proj"
    one = {f"text_encoder_2.{layer}.lora_A.weight": torch.ones(2, 4), f"text_encoder_2.{layer}.lora_B.weight": torch.ones(4, 2)}
    scales = {"text_encoder_2.r": 2, "text_encoder_2.lora_alpha": 6, "unet.r": 2, "unet.lora_alpha": 2}
    save_file(one, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(scales)})
    imported = import_lora(tmp_path / "x.safetensors")
    assert imported.header.family == "sdxl"
    (pair,) = imported.pairs.values()
    assert list(imported.pairs) == ["text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(pair.delta(), torch.full((4, 4), 6.0))
    with pytest.raises(EsdLoraError, match="fit sd and sdxl alike"):
        import_lora(save_lora({name.replace("_2", ""): tensor for name, tensor in one.items()}, tmp_path))


def test_family_is_told_by_what_the_file_says_and_is(tmp_path: Path) -> None:
    assert import_lora(save_lora(one_layer(1024), tmp_path)).header.family == "sd"
    assert import_lora(save_lora(one_layer(16), tmp_path), family="sdxl").header.family == "sdxl"
    assert import_lora(save_lora(one_layer(16), tmp_path, {"ss_base_model_version": "sdxl_base_v1-0"})).header.family == "sdxl"
    assert (
        import_lora(save_lora(one_layer(16), tmp_path, {"modelspec.architecture": "stable-diffusion-xl-v1-base"})).header.family
        == "sdxl"
    )
    assert import_lora(save_lora(one_layer(2048), tmp_path)).header.family == "sdxl"
    with pytest.raises(EsdLoraError, match="fit sd and sdxl alike: say which with esd-lora import --family"):
        import_lora(save_lora(one_layer(16), tmp_path))
    with pytest.raises(EsdLoraError, match="did you mean 'sdxl'"):
        import_lora(save_lora(one_layer(16), tmp_path), family="sdx")
    with pytest.raises(EsdLoraError, match="no model of family 'flux' has"):
        import_lora(save_lora(one_layer(16), tmp_path), family="flux")
    for count, shown in ((3, "layer_0, layer_1, layer_2"), (4, "layer_0, layer_1, layer_2, ...")):
        strange = {
            f"lora_unet_layer_{i}{k.removeprefix(KOHYA)}": t.clone() for i in range(count) for k, t in one_layer().items()
        }
        with pytest.raises(EsdLoraError, match=rf"the layers of .* \({re.escape(shown)}\) are of no model known here"):
            import_lora(save_lora(strange, tmp_path))


def test_vector_is_refused_before_its_width_is_asked_for(tmp_path: Path) -> None:
    file = save_lora(one_layer() | {f"{KOHYA}.lora_down.weight": torch.ones(768)}, tmp_path)
    with pytest.raises(EsdLoraError, match="fit sd and sdxl alike"):
        import_lora(file)
    with pytest.raises(EsdLoraError, match="no lora_B that fits"):
        import_lora(file, family="sd")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"ss_v_parameterization": "True"}, "v_prediction"),
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "v_prediction"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_prediction_type(tmp_path: Path, metadata: dict[str, str], expected: str | None) -> None:
    assert import_lora(save_lora(one_layer(), tmp_path, metadata)).header.prediction_type == expected


REFUSED = {
    "LoHa": ({f"{KOHYA}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
    "LoKr": ({f"{KOHYA}.lokr_w1": torch.ones(2, 2)}, "LoKr"),
    "DoRA": ({**one_layer(), f"{KOHYA}.dora_scale": torch.ones(8, 1)}, "DoRA"),
    "checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(2, 2)}, "no LoRA's tensors"),
    "empty": ({}, "no layer"),
    "down without up": ({f"{KOHYA}.lora_down.weight": torch.ones(2, 768)}, "no lora_B"),
    "up without down": ({f"{KOHYA}.lora_up.weight": torch.ones(8, 2)}, "no down factor"),
    "rank 0": ({f"{KOHYA}.lora_down.weight": torch.ones(0, 768), f"{KOHYA}.lora_up.weight": torch.ones(8, 0)}, "rank 1"),
    "ranks that differ": (one_layer() | {f"{KOHYA}.lora_up.weight": torch.ones(8, 3)}, "no lora_B that fits"),
    "alpha that is no number": (one_layer(alpha=torch.tensor(float("nan"))), "a finite number"),
    "two alphas": (one_layer(alpha=torch.ones(2)), "2 values"),
    "integers": (one_layer() | {f"{KOHYA}.lora_up.weight": torch.ones(8, 2, dtype=torch.int8)}, "int8"),
    "float8": (one_layer() | {f"{KOHYA}.lora_up.weight": torch.ones(8, 2).to(torch.float8_e4m3fn)}, "float8"),
    "NaN": (one_layer() | {f"{KOHYA}.lora_up.weight": torch.full((8, 2), float("nan"))}, "NaN"),
    "infinity": (one_layer() | {f"{KOHYA}.lora_down.weight": torch.full((2, 768), float("inf"))}, "infinity"),
    "one layer under two names": (
        one_layer() | {key.replace(KOHYA, f"unet.{KEY}"): tensor for key, tensor in one_layer().items()},
        "twice",
    ),
}


@pytest.mark.parametrize(("tensors", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tmp_path: Path, tensors: dict[str, Tensor], reason: str) -> None:
    file = save_lora({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path)
    with pytest.raises(EsdLoraError, match=reason) as caught:
        import_lora(file, family="sd")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


CONFIGS = {
    "no JSON": "{",
    "a list": "[]",
    "alpha that is no number": '{"unet.lora_alpha": "much"}',
    "infinite alpha": '{"unet.lora_alpha": Infinity}',
    "patterns that are none": '{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}',
    "deep nesting": '{"unet.lora_alpha": ' + "[" * 100_000,
    "long": '{"unet.lora_alpha": 1}' + " " * 2**20,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_damaged_configuration_of_scales(tmp_path: Path, config: str) -> None:
    tensors = {f"unet.{KEY}.lora_A.weight": torch.ones(2, 768), f"unet.{KEY}.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(EsdLoraError, match="damaged configuration"):
        import_lora(save_lora(tensors, tmp_path, {"lora_adapter_metadata": config}))
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config.replace("unet.", ""))
    with pytest.raises(EsdLoraError, match="damaged configuration"):
        import_lora(folder)


def adapter_with(patterns: dict[str, int], folder: Path) -> Path:
    """A peft adapter of two layers, whose alpha is 2 but for these patterns."""
    for part, shape in (("A", (2, 768)), ("B", (8, 2))):
        tensors = {f"base_model.model.{key}.lora_{part}.weight": torch.ones(shape) for key in (KEY, OTHER)}
        tensors |= load_file(folder / "adapter_model.safetensors") if part == "B" else {}
        save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "alpha_pattern": patterns}))
    return folder


OTHER = KEY.replace("to_k", "to_v")
NAMES = {
    "path": KEY,
    "path with dots escaped": re.escape(KEY),
    "whole path, as our export writes it": f"^{re.escape(KEY)}$",
    "end": "attn2.to_k",
    "end with dots escaped": r"attn2\.to_k$",
    "escapes of older Pythons": r"attn2\.to\_k",
}


@pytest.mark.parametrize("pattern", NAMES.values(), ids=NAMES)
def test_pattern_that_is_a_name_means_what_it_means_to_peft(tmp_path: Path, pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    pairs = import_lora(adapter_with({pattern: 8}, tmp_path), family="sd").pairs
    for module in (KEY, OTHER):
        alpha = 8 if get_pattern_key([pattern], module) == pattern else 2
        torch.testing.assert_close(pairs[module].delta(), torch.full((8, 768), float(alpha)))
    assert bool((pairs[KEY].delta() == 8).all())


@pytest.mark.parametrize("pattern", ["o_k", "^attn2.to_k$", "to_k.more", "2.to_k", "to_."])
def test_pattern_of_another_layer(tmp_path: Path, pattern: str) -> None:
    assert bool((import_lora(adapter_with({pattern: 8}, tmp_path), family="sd").pairs[KEY].delta() == 2).all())


def test_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    patterns = {"to_v": 4, "to_k": 8, KEY: 16, r"to\_k": 32}
    assert bool((import_lora(adapter_with(patterns, tmp_path), family="sd").pairs[KEY].delta() == 8).all())


EXPRESSIONS = [
    "(",
    "(a*)*b",
    r"attn\d.to_k",
    ".*to_k",
    "to_k|to_v",
    "to_[kv]",
    "to_k?",
    "",
    "^$",
    "a$b",
    "a^b",
    "x{9}",
    "to_k\\",
]


@pytest.mark.parametrize("pattern", EXPRESSIONS)
@pytest.mark.parametrize("read", [import_lora, inspect_file])
def test_foreign_expression_is_refused_and_never_run(tmp_path: Path, pattern: str, read: object) -> None:
    with pytest.raises(EsdLoraError, match="and a stranger's is never run") as caught:
        read(adapter_with({pattern: 8}, tmp_path))  # type: ignore[operator]
    assert "\n" not in str(caught.value)


ALPHAS = {"complex": torch.tensor(1j), "float8": torch.tensor(1.0).to(torch.float8_e4m3fn), "truth": torch.tensor(True)}


@pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
def test_alpha_that_is_no_number(tmp_path: Path, alpha: Tensor) -> None:
    torch.save(one_layer(alpha=alpha), tmp_path / "age.pt")
    with pytest.raises(EsdLoraError, match=r"(alpha of layer .* is nan, expected a finite number|complex)") as caught:
        import_lora(tmp_path / "age.pt")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match="no LoRA at"):
        import_lora(tmp_path / "nothing.safetensors")
    with pytest.raises(EsdLoraError, match="no LoRA at"):
        import_lora(tmp_path)


def test_scope_of_one_layer_type(sd: torch.nn.Module, tmp_path: Path) -> None:
    eraser = eraser_on(sd, layers_of("sd", sd, "xattn-kv"), **MODELS["sd"][2])
    assert_same(import_lora(save_lora(kohya_tensors(eraser), tmp_path), family="sd"), eraser)
