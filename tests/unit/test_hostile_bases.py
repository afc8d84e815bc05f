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
