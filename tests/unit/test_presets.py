"""The preset of a base that comes without a recipe: by family and size, from configurations alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from esd_lora.bases import presets
from esd_lora.bases.presets import preset_for
from esd_lora.cli import main
from esd_lora.errors import EsdLoraError
from esd_lora.families import FAMILIES
from esd_lora.recipe_files import recipe_kind
from esd_lora.wording import HubId
from original_checkpoints import save_checkpoint
from tiny import tiny_pipeline
from toys import make_toy


def save(name: str, folder: Path, side: int) -> Path:
    """A toy pipeline that calls itself as large as a published one."""
    make_toy(name).save_pretrained(folder)
    config = next(folder / part / "config.json" for part in ("unet", "transformer") if (folder / part).is_dir())
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "sample_size": side}), "utf-8")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "side", "preset"),
    [
        ("sd", 64, "sd/fast"),
        ("sd", 8, "fast"),
        ("sdxl", 128, "sdxl/fast"),
        ("sd3", 128, "sdxl/fast"),
        ("flux-dev", 128, "flux/fast"),
        ("sana", 32, "sdxl/fast"),
        ("pixart", 128, "sdxl/fast"),
        ("lumina2", 128, "sdxl/fast"),
        ("qwen-image", 128, "flux/fast"),
        ("kolors", 128, "sdxl/fast"),
    ],
)
def test_family_and_size_choose(name: str, side: int, preset: str, tmp_path: Path) -> None:
    assert preset_for(str(save(name, tmp_path / name, side))) == preset


def test_a_hub_id_needs_the_index_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("sdxl", tmp_path / "xl", 128)
    (folder / "unet" / "config.json").unlink()
    wanted: list[HubId] = []
    monkeypatch.setattr(presets, "look_up", lambda hub_id: wanted.append(hub_id) or folder)
    assert preset_for("owner/xl@v1") == "sdxl/fast"
    assert wanted == [HubId("owner/xl", "v1")]


def test_a_single_file_is_told_by_its_tensors(tmp_path: Path) -> None:
    assert preset_for(str(save_checkpoint(tiny_pipeline(), tmp_path / "model.safetensors"))) == "sd/fast"
    (tmp_path / "lora.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(EsdLoraError, match="tensors that are no model known here"):
        preset_for(str(tmp_path / "lora.safetensors"))


def test_every_family_s_preset_ships() -> None:
    assert {recipe_kind(family.preset) for family in FAMILIES} == {"preset"}


@pytest.mark.parametrize(
    ("recipes", "shown"), [((), "preset sd/fast, "), (("concepts/van-gogh",), "preset sd/fast, "), (("paper",), "")]
)
def test_the_command_says_which(recipes: tuple[str, ...], shown: str, tmp_path: Path) -> None:
    base = save("sd", tmp_path / "base", 64)  # without weights, so that nothing is trained
    done = CliRunner().invoke(main, ["train", *recipes, "--concept", "x", "--base", str(base), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert done.output.startswith(shown)
    assert ("preset" in done.output) == bool(shown)
    assert not (tmp_path / "out").exists()
