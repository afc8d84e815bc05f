"""LoRA files of other programs wherever an eraser is taken: what `import` makes of them, without importing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.formats.exporting import export
from esd_lora.formats.importing import import_lora
from esd_lora.formats.opening import is_foreign, open_eraser


def good(*args: object) -> tuple[str, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def files(cat: Eraser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same eraser in other layouts, ours and those of a stranger who knows nothing of our header. Read only."""
    folder = tmp_path_factory.mktemp("files")
    kohya = export(cat, folder / "no-cat.safetensors", layout="kohya")
    stranger = folder / "stranger.safetensors"
    save_file(load_file(kohya), stranger, {"ss_network_module": "networks.lora"})
    return {
        "kohya": kohya,
        "diffusers": export(cat, folder / "diffusers.safetensors", layout="diffusers"),
        "peft": export(cat, folder / "peft", layout="peft"),
        "stranger": stranger,
    }


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft", "stranger"])
def test_every_layout_opens_as_the_eraser(files: dict[str, Path], cat: Eraser, layout: str) -> None:
    opened = open_eraser(files[layout], "sd")
    assert opened.pairs.keys() == cat.pairs.keys()
    for module, pair in cat.pairs.items():
        torch.testing.assert_close(opened.pairs[module].delta(), pair.delta(), rtol=1e-5, atol=1e-6)
    assert opened.names == (["stranger"] if layout == "stranger" else cat.names)
    assert opened.header.base_hashes == ({} if layout == "stranger" else cat.header.base_hashes)
    assert is_foreign(files[layout]) == (layout != "diffusers")


def test_what_is_an_eraser_opens_as_it_is(cat_dir: Path, cat: Eraser, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "esd_lora"):
        assert open_eraser(cat) is cat
        assert open_eraser(cat_dir).header == cat.header
    assert caplog.messages == []


def test_family_of_the_base_decides_where_names_fit_several(tmp_path: Path) -> None:
    """Keys that SD and SDXL share, of widths that neither has."""
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    file = tmp_path / "both.safetensors"
    save_file({f"{module}.lora_A.weight": torch.ones(2, 16), f"{module}.lora_B.weight": torch.ones(8, 2)}, file)
    with pytest.raises(EsdLoraError, match="fit sd and sdxl alike: say which with esd-lora import --family"):
        open_eraser(file)
    assert open_eraser(file, "sdxl").header.family == "sdxl"
    assert open_eraser(file, "sd").header.family == "sd"
    with pytest.raises(EsdLoraError, match="which no model of family 'flux' has"):
        open_eraser(file, "flux")


@pytest.mark.filterwarnings("ignore:eraser of .* does not say which weights")  # of which the stranger's file knows nothing
@pytest.mark.parametrize("layout", ["kohya", "peft", "stranger"])
def test_commands_take_any_layout(files: dict[str, Path], cat_dir: Path, tiny_dir: Path, tmp_path: Path, layout: str) -> None:
    """Painted, stacked, merged and exported, what comes out is what comes of the eraser itself."""
    results: dict[str, list[bytes]] = {}
    for name, eraser in {"foreign": files[layout], "own": cat_dir}.items():
        out = tmp_path / name
        on = ["--base", tiny_dir]
        _, painting = good("generate", "a cat", *on, "--steps", 2, "--eraser", eraser, "-o", out / "pictures")
        _, merging = good("merge", eraser, *on, "-o", out / "merged", "--verify")
        assert merging.count("converted in memory") == (name == "foreign"), "once, though it is opened again to verify"
        if layout != "stranger":  # whose layers fit several families where no base is at hand
            good("stack", eraser, "-o", out / "stack")
            good("inspect", eraser)
        results[name] = [
            (out / "pictures" / "000_seed0.png").read_bytes(),
            next((out / "merged" / "unet").glob("*.safetensors")).read_bytes()[-4096:],
        ]
        lines = [line for line in painting.splitlines() if "converted in memory" in line]
        assert len(lines) == (name == "foreign"), painting
        if lines:
            what = (
                "a LoRA in kohya's names, of which nothing is known" if layout == "stranger" else "an eraser in the layout of"
            )
            assert lines[0].startswith(f"{eraser} is {what}")
    assert results["foreign"][0] == results["own"][0]


def test_members_of_manifests_are_erasers_of_ours(files: dict[str, Path]) -> None:
    result = CliRunner().invoke(main, ["stack", str(files["kohya"]), "-o", str(files["kohya"].with_name("stack.yaml"))])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_style_file_with_text_layers_says_how_to_import_it(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["stranger"])
    tensors |= {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.ones(1, 4)}  # T5's
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(EsdLoraError, match=r"changes a text encoder that .* take esd-lora import --without-text-encoder"):
        open_eraser(tmp_path / "style.safetensors", "sd")


def test_opening_is_importing(files: dict[str, Path]) -> None:
    opened, imported = open_eraser(files["stranger"], "sd"), import_lora(files["stranger"], family="sd")
    assert opened.header.model_copy(update={"created": ""}) == imported.header.model_copy(update={"created": ""})
