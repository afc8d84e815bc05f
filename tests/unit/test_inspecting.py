"""Looking into files: facts, bars, differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.manifests import write_manifest
from esd_lora.erasers.measured import Measured, Number
from esd_lora.erasers.stacking import Strength, compress, stack
from esd_lora.errors import EsdLoraError
from esd_lora.formats.cards import render_card, save_with_card
from esd_lora.formats.exporting import export
from esd_lora.formats.inspecting import bars, block_of, diff, inspect_file
from random_erasers import build_header, random_eraser
from toy_denoisers import MODELS, eraser_on_all_layers


def test_bars_are_as_long_as_values() -> None:
    assert [line.count("█") for line in bars({"a": 2.0, "bb": 1.0, "c": 0.0})] == [30, 15, 0]
    assert len({line.rindex("  ") for line in bars({"a": 2.0, "bcd": 1.0})}) == 1
    assert bars({}) == []
    assert "█" not in bars({"a": 0.0})[0]


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k", "down_blocks.0"),
        ("mid_block.resnets.0.conv1", "mid_block"),
        ("single_transformer_blocks.12.proj_mlp", "single_transformer_blocks.12"),
        ("conv_in", "conv_in"),
    ],
)
def test_blocks(module: str, block: str) -> None:
    assert block_of(module) == block


def test_facts_of_a_stack(tmp_path: Path) -> None:
    members = [random_eraser({"conv": 2, "mid.attn2.to_k": 1}, "a cat"), random_eraser({"conv": 1}, "a hat", seed=1)]
    stacked = compress(stack(members, [Strength(-0.5, {"conv": 2.0}), 1.0]), rank=2).eraser
    inspected = inspect_file(stacked.save(tmp_path / "stack"))
    text = "\n".join(inspected.lines())
    assert "a cat (eta 3, weight -0.5, amplified, conv x 2)" in text
    assert f"{stacked.header.truncation:.2%} of the update's norm" in text
    assert "rank 1, 2" in text
    document = inspected.as_json()
    norms = {module: float(pair.delta().norm()) for module, pair in stacked.pairs.items()}
    assert {module: facts["norm"] for module, facts in document["layers"].items()} == pytest.approx(norms)
    assert document["norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5)
    assert document["blocks"]["conv"] == {"layers": 1, "norm": pytest.approx(norms["conv"])}


def test_foreign_file(tmp_path: Path) -> None:
    eraser = eraser_on_all_layers("sd", MODELS["sd"][0]())
    file = export(eraser, tmp_path / "k.safetensors", layout="kohya")
    inspected = inspect_file(file)
    assert inspected.layers.keys() == eraser.pairs.keys()
    assert inspected.size == file.stat().st_size
    lines = inspected.lines()
    assert any("--layers shows each" in line for line in lines)
    assert len(inspected.lines(each_layer=True)) > len(eraser.pairs)
    assert not any("--layers" in line for line in inspected.lines(each_layer=False))


def test_manifest(tmp_path: Path) -> None:
    folder = random_eraser({"conv": 2}, dtype=torch.float32).save(tmp_path / "one")
    write_manifest(tmp_path / "s.yaml", [folder], [Strength(2.0)])
    inspected, plain = inspect_file(tmp_path / "s.yaml"), inspect_file(folder)
    assert inspected.layers["conv"].norm == pytest.approx(2 * plain.layers["conv"].norm)
    assert plain.sha256_tensors != inspected.sha256_tensors


def test_measured_numbers_are_shown(tmp_path: Path) -> None:
    made = random_eraser({"conv": 2})
    rate = Number(value=0.05, low=0.01, high=0.2, of=20, hits=1)
    variants = {"erased": {"target": {"accuracy": rate, "<b>": rate}}}
    found = Measured(suite="mine", date="2026-01-02", concepts=("cat",), variants=variants, record={"detectors": {"judge": {}}})
    folder = save_with_card(Eraser(made.pairs, made.header.model_copy(update={"evaluation": found})), tmp_path / "one")
    assert "suite mine, 2026-01-02: accuracy 5.0 % (1.0 to 20.0) (erased)" in "\n".join(inspect_file(folder).lines())
    card = (folder / "README.md").read_text()
    assert "| target | erased | accuracy | 5.0 % (1.0 to 20.0) |  | 20 |" in card
    assert "| target | erased | &lt;b> |" in card
    assert "Not measured:" in render_card(made)


def test_difference_of_equal_files(tmp_path: Path) -> None:
    """An export is no difference, a truncation is as large as it says."""
    eraser = eraser_on_all_layers("sd", MODELS["sd"][0]())
    folder = eraser.save(tmp_path / "one")
    same = diff(folder, export(eraser, tmp_path / "k.safetensors", layout="kohya"))
    assert same.overall < 1e-7
    assert same.header == {}
    assert same.only == ([], [])
    smaller = compress(eraser, rank=1)
    other = diff(folder, smaller.eraser.save(tmp_path / "two"))
    assert other.overall == pytest.approx(smaller.overall, rel=1e-4)
    assert {module: distance for module, (distance, _) in other.layers.items()} == pytest.approx(smaller.errors, abs=1e-4)
    assert list(other.header) == ["truncation"]


def test_difference_of_others(tmp_path: Path) -> None:
    a = random_eraser({"conv": 2, "mid.attn2.to_k": 1}, "a cat").save(tmp_path / "a")
    b = stack([random_eraser({"conv": 2, "mid.attn2.to_v": 1}, "a hat", seed=1)], [1.0]).save(tmp_path / "b")
    difference = diff(a, b)
    first, second = Eraser.load(a).pairs, Eraser.load(b).pairs
    assert difference.only == (["mid.attn2.to_k"], ["mid.attn2.to_v"])
    apart = first["conv"].delta() - second["conv"].delta()
    assert difference.layers["conv"][0] == pytest.approx(float(apart.norm()) / first["conv"].norm())
    assert difference.layers["conv"][1] == pytest.approx(
        first["conv"].inner(second["conv"]) / first["conv"].norm() / second["conv"].norm()
    )
    squares = float(apart.norm()) ** 2 + first["mid.attn2.to_k"].norm() ** 2 + second["mid.attn2.to_v"].norm() ** 2
    assert difference.overall == pytest.approx((squares / sum(pair.norm() ** 2 for pair in first.values())) ** 0.5)
    text = "\n".join(difference.lines())
    assert "only in the first: 1 layers (mid.attn2.to_k)" in text
    assert "concepts" in difference.header


def test_files_of_two_models(tmp_path: Path) -> None:
    a = random_eraser({"conv": 2}).save(tmp_path / "a")
    b = Eraser({"conv": random_eraser({"shortcut": 1}).pairs["shortcut"]}, build_header()).save(tmp_path / "b")
    with pytest.raises(EsdLoraError, match="two models' files"):
        diff(a, b)
