"""A new family is one file: with `toy_family.py` in the registry, and nothing else changed, everything works on its models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.families import FAMILIES, family_named, family_of
from esd_lora.formats.exporting import LAYOUTS, export, kohya_tensors
from esd_lora.formats.importing import import_lora
from esd_lora.formats.inspecting import inspect_file
from esd_lora.training import train
from esd_lora.weights.extracting import extract
from esd_lora.weights.merging import merge
from esd_lora.weights.verifying import verify
from tiny import tiny_recipe
from toy_family import ToyFamily, ToyPipeline, toy_pipeline


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Have the toy family in the registry for the tests of this module."""
    family = ToyFamily()
    FAMILIES.append(family)
    yield
    FAMILIES.remove(family)


@pytest.fixture(scope="module")
def eraser_dir(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """The directory of an eraser trained on every layer of a toy pipeline."""
    out = tmp_path_factory.mktemp("toy") / "cat"
    base = Base(toy_pipeline(), family_of("ToyPipeline"), "owner/toy")
    train(tiny_recipe("owner/toy", scope="full", lr=0.05), base=base, out=out, progress=False)
    return out


@pytest.fixture(scope="module")
def eraser(eraser_dir: Path) -> Eraser:
    return Eraser.load(eraser_dir)


def original_state(pipe: ToyPipeline) -> dict[str, torch.Tensor]:
    """Return a pipeline's weights under the names that the family gives its original, written out by hand."""
    block = pipe.transformer.toy_blocks[0]
    joined = torch.cat([getattr(block["attn1"], f"to_{which}").weight for which in "qkv"])
    state = {f"layers.0.text.{which}.weight": getattr(block["attn2"], f"to_{which}").weight for which in "qkv"}
    return {name: tensor.detach().clone() for name, tensor in {"layers.0.qkv.weight": joined, **state}.items()}


def assert_same_update(found: Eraser, expected: Eraser) -> None:
    assert found.pairs.keys() == expected.pairs.keys()
    for module, pair in expected.pairs.items():
        torch.testing.assert_close(found.pairs[module].delta(), pair.delta(), rtol=1e-4, atol=1e-6)


def test_training_moves_every_layer(eraser: Eraser) -> None:
    header = eraser.header
    assert (header.family, header.prefix, header.prediction_type) == ("toy", "transformer", "v_prediction")
    assert eraser.pairs.keys() == {f"toy_blocks.0.attn{i}.to_{which}" for i in (1, 2) for which in "qkv"}
    assert all(pair.norm() > 0 for pair in eraser.pairs.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout: str, eraser: Eraser, tmp_path: Path) -> None:
    file = export(eraser, tmp_path / ("peft" if layout == "peft" else "x.safetensors"), layout=layout)
    back = import_lora(file)
    assert_same_update(back, eraser)
    assert back.header == eraser.header


def test_kohya_names_and_metadata(eraser: Eraser, tmp_path: Path) -> None:
    file = export(eraser, tmp_path / "x.safetensors", layout="kohya")
    metadata = read_header(file).metadata
    assert {name.split(".")[0] for name in load_file(file)} == {
        "lora_unet_layers_0_qkv",
        *(f"lora_unet_layers_0_text_{which}" for which in "qkv"),
    }
    keys = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.resolution")
    assert [metadata[key] for key in keys] == ["toy_v1", "False", "toy-diffusion-v1/lora", "32x32"]


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_foreign_file_is_known_by_its_layers(names: str, eraser: Eraser, tmp_path: Path) -> None:
    save_file(kohya_tensors(eraser) if names == "kohya" else eraser.state_dict(), tmp_path / "x.safetensors")
    imported = import_lora(tmp_path / "x.safetensors")
    assert (imported.header.family, imported.header.prefix) == ("toy", "transformer")
    assert_same_update(imported, eraser)
    assert "family toy" in "\n".join(inspect_file(tmp_path / "x.safetensors").lines())


def test_card_names_the_family(eraser_dir: Path) -> None:
    card = (eraser_dir / "README.md").read_text("utf-8")
    assert "`toy`" in card
    assert "base_model: owner/toy" in card


def test_single_file_is_merged_into_and_extracted_from(eraser: Eraser, tmp_path: Path) -> None:
    base, pipe = tmp_path / "base.safetensors", toy_pipeline()
    save_file(original_state(pipe), base)
    out = merge([eraser], base, tmp_path / "merged.safetensors", progress=False)
    assert verify(out, base, [eraser]).touched == 4
    layers = dict(pipe.transformer.named_modules())
    with torch.no_grad():
        for module, pair in eraser.pairs.items():
            layers[module].weight += pair.delta()
    for name, tensor in original_state(pipe).items():
        torch.testing.assert_close(load_file(out)[name], tensor, rtol=1e-6, atol=1e-6)
    assert_same_update(extract(base, out, rank=8, progress=False).eraser, eraser)


def test_families_are_found_by_name_and_pipeline() -> None:
    assert family_named("toy") is family_of("ToyPipeline")
    with pytest.raises(EsdLoraError, match=r"unknown family 'toi' \(did you mean 'toy'\?\)\. Known: sd, .*, toy\."):
        family_named("toi")
    with pytest.raises(EsdLoraError, match=r"Supported: .*ToyPipeline"):
        family_of("OtherPipeline")
