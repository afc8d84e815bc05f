"""Bases that a stranger made: whatever their configurations name, no code of theirs is run, and it is told in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import original_checkpoints
from esd_lora.bases.loading import load_base
from esd_lora.bases.stored import open_stored
from esd_lora.errors import EsdLoraError
from toys import make_toy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-file checkpoint without a text encoder, which comes from the directory then. Tests only read it."""
    file = original_checkpoints.save_checkpoint(make_toy("sd"), tmp_path_factory.mktemp("single") / "model.safetensors")
    save_file({n: t.clone() for n, t in load_file(file).items() if not n.startswith("cond_stage_model.")}, file)
    return file


@pytest.fixture
def folder(tiny_dir: Path, tmp_path: Path) -> Path:
    """A base with code in every place that a library might take it from, which leaves a trace when it is run."""
    folder = shutil.copytree(tiny_dir, tmp_path / "base")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n"
    for place in ("pipeline.py", "mine.py", "unet/mine.py", "text_encoder/mine.py", "scheduler/mine.py", "unet/modeling.py"):
        (folder / place).write_text(code)
    return folder


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}))


READERS: dict[str, Callable[[Path, Path], object]] = {
    "directory": lambda folder, _: load_base(folder, device="cpu"),
    "stored": lambda folder, _: open_stored(folder),
    "base config": lambda folder, checkpoint: load_base(checkpoint, config=folder, device="cpu"),
}
COMPONENTS: dict[str, dict[str, object]] = {
    "class of subprocess": {"unet": ["subprocess", "Popen"]},
    "function of os": {"text_encoder": ["os", "system"]},
    "module of the directory": {"unet": ["mine", "Mine"]},
    "module of the directory, for the text": {"text_encoder": ["mine", "Mine"]},
    "module of the directory, for the schedule": {"scheduler": ["mine", "Mine"]},
    "class that takes code": {"text_encoder": ["transformers", "AutoModel"]},
    "tokenizer that takes code": {"tokenizer": ["transformers", "AutoTokenizer"]},
    "pipeline in a pipeline": {"unet": ["diffusers", "StableDiffusionPipeline"]},
    "path as a class": {"unet": ["diffusers", "models.unets"]},
    "null": {"unet": None},
    "nothing": {"unet": [None, None]},
    "three words": {"vae": ["diffusers", "AutoencoderKL", "x"]},
    "numbers": {"vae": [1, 2]},
    "mapping": {"scheduler": {}},
    "long": {"unet": ["x" * 10_000, "y"]},
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("components", COMPONENTS.values(), ids=COMPONENTS)
def test_index_names_classes_of_two_libraries(
    folder: Path, checkpoint: Path, components: dict[str, object], reader: Callable[[Path, Path], object]
) -> None:
    change(folder / "model_index.json", **components)
    with pytest.raises(EsdLoraError, match=rf"model_index\.json: component {next(iter(components))} is .*, expected") as caught:
        reader(folder, checkpoint)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_pipeline_of_its_own(folder: Path, checkpoint: Path, reader: Callable[[Path, Path], object]) -> None:
    change(folder / "model_index.json", _class_name=["mine", "Mine"])
    with pytest.raises(EsdLoraError, match="names code of its own as its pipeline"):
        reader(folder, checkpoint)
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_code_that_lies_there_is_not_run(folder: Path, checkpoint: Path, reader: Callable[[Path, Path], object]) -> None:
    mapped = {"auto_map": {"AutoModel": "mine.Mine", "AutoConfig": "mine.Mine"}, "custom_pipeline": "pipeline"}
    change(folder / "model_index.json", custom_pipeline="pipeline", _ignore_files=[])
    for config in ("unet/config.json", "text_encoder/config.json"):
        change(folder / config, **mapped)
    assert reader(folder, checkpoint)
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("name", ["CLIPTextConfig", "pipeline", "logging", "CLIPTokenizer", "NoSuchModel"])
def test_text_encoder_is_a_class_of_models(folder: Path, checkpoint: Path, name: str) -> None:
    change(folder / "model_index.json", text_encoder=["transformers", name])
    with pytest.raises(EsdLoraError, match=rf"names transformers\.{name}, which is no class of models"):
        load_base(checkpoint, config=folder, device="cpu")


INDICES = {
    "list": "[]",
    "null": "null",
    "cut off": '{"_class_name":',
    "deep": "[" * 100_000,
    "no class": "{}",
    "not a number": '{"_class_name": NaN}',
    "long": "{}" + " " * 2**20,
    "UTF-16": "\ud83d",
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("text", INDICES.values(), ids=INDICES)
def test_damaged_index(folder: Path, checkpoint: Path, text: str, reader: Callable[[Path, Path], object]) -> None:
    (folder / "model_index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(EsdLoraError, match=r"model_index\.json is damaged: ") as caught:
        reader(folder, checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"prediction_type": 5}', '{"prediction_type": ["flow"]}'])
def test_damaged_schedule(folder: Path, text: str) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(text)
    with pytest.raises(EsdLoraError, match=r"scheduler_config\.json is damaged"):
        open_stored(folder)
    if "prediction_type" not in text:  # diffusers reads it then, and does not look
        with pytest.raises(EsdLoraError, match="cannot be loaded"):
            load_base(folder, device="cpu")


@pytest.mark.parametrize("values", [{"block_out_channels": "x"}, {"down_block_types": [3]}, {"cross_attention_dim": None}])
def test_damaged_denoiser(folder: Path, values: dict[str, object]) -> None:
    change(folder / "unet" / "config.json", **values)
    with pytest.raises(EsdLoraError, match="cannot be loaded") as caught:
        load_base(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", [READERS["directory"], READERS["base config"]], ids=["directory", "base config"])
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize(
    "value", ["kernels-community/flash-attn", "mine/kernel@main:x", "flash_attention_2", {"": "mine/x"}, 7]
)
def test_kernel_is_not_fetched(
    folder: Path, checkpoint: Path, name: str, value: object, reader: Callable[[Path, Path], object]
) -> None:
    """With the package `kernels` installed, transformers would fetch and run it."""
    change(folder / "text_encoder" / "config.json", text_config={name: value})
    with pytest.raises(EsdLoraError, match=rf"text_encoder.config\.json: {name} is .*, which may be code that is fetched"):
        reader(folder, checkpoint)


@pytest.mark.parametrize(("method", "words"), [("mxfp4", "may be code that is fetched"), ("bitsandbytes", "cannot be loaded")])
def test_quantisation_that_fetches_kernels(folder: Path, method: str, words: str) -> None:
    change(folder / "text_encoder" / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True})
    with pytest.raises(EsdLoraError, match=words):
        load_base(folder, device="cpu")


def test_plain_attention_is_taken(folder: Path) -> None:
    change(folder / "text_encoder" / "config.json", attn_implementation="eager", experts_implementation=None)
    assert load_base(folder, device="cpu")


@pytest.mark.parametrize("reader", [READERS["directory"], READERS["base config"]], ids=["directory", "base config"])
@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("unet", {"layers_per_block": 9_000}),
        ("unet", {"num_class_embeds": 10**7}),
        ("text_encoder", {"num_hidden_layers": 9_000}),
        ("text_encoder", {"intermediate_size": 10**9}),
        ("vae", {"layers_per_block": 9_000}),
    ],
)
def test_model_larger_than_its_weights_is_not_built(
    folder: Path, checkpoint: Path, part: str, values: dict[str, object], reader: Callable[[Path, Path], object]
) -> None:
    change(folder / part / "config.json", **values)
    with pytest.raises(
        EsdLoraError, match=r"a configuration of .* describes a model far larger than the \d+ tensors there are"
    ):
        reader(folder, checkpoint)


@pytest.mark.parametrize("reader", [READERS["directory"], READERS["base config"]], ids=["directory", "base config"])
@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"transformer_layers_per_block": [1, [10**9]]}),
        ("text_encoder", {"num_hidden_layers": 10**30}),
    ],
)
def test_layers_without_number(
    folder: Path, checkpoint: Path, part: str, values: dict[str, object], reader: Callable[[Path, Path], object]
) -> None:
    change(folder / part / "config.json", **values)
    with pytest.raises(EsdLoraError, match=rf"config\.json: {next(iter(values))} is .*, more than any model has"):
        reader(folder, checkpoint)


def test_channels_without_number(folder: Path) -> None:
    change(folder / "unet" / "config.json", block_out_channels=[10**9, 10**9])
    with pytest.raises(EsdLoraError, match="cannot be loaded") as caught:
        load_base(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_layers_without_weights(folder: Path) -> None:
    change(folder / "unet" / "config.json", num_class_embeds=5)
    with pytest.raises(EsdLoraError, match=r"lacks 1 tensors of the unet, class_embedding\.weight the first"):
        load_base(folder, device="cpu")


def test_text_encoders_without_weights(folder: Path) -> None:
    """transformers would fill them with noise: a base saved by a later version, under other names, would read no prompt."""
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({f"x.{name}": tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(EsdLoraError, match=rf"lacks {len(tensors)} tensors of the text_encoder, .*update transformers"):
        load_base(folder, device="cpu")


@pytest.mark.parametrize("values", [{"pos_embed_max_size": 20_000}, {"pos_embed_max_size": None, "sample_size": 10**9}])
def test_table_of_places_without_end(tmp_path: Path, values: dict[str, object]) -> None:
    make_toy("sd3").save_pretrained(tmp_path)
    change(tmp_path / "transformer" / "config.json", **values)
    with pytest.raises(EsdLoraError, match=r"describes a table of [\d,]+ numbers for the places in a picture"):
        load_base(tmp_path, device="cpu")


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{}" + " " * 2**20])
def test_damaged_configuration_of_a_component(folder: Path, text: str) -> None:
    (folder / "vae" / "config.json").write_text(text)
    with pytest.raises(EsdLoraError, match=r"vae.config\.json is damaged"):
        load_base(folder, device="cpu")
