"""What is written holds finite numbers, or is refused with layer and cause; what is scaled is rounded no more than once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from esd_lora.cli import main
from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser, LoraPair
from esd_lora.erasers.header import HEADER_KEY, ErasedConcept
from esd_lora.erasers.stacking import Strength, stack
from esd_lora.erasers.tensor_files import all_finite, file_content, read_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.formats.exporting import LAYOUTS, export, kohya_tensors
from esd_lora.formats.importing import import_lora
from random_erasers import eraser_on, random_eraser
from tiny import tiny_pipeline
from toy_denoisers import MODELS, layers_of

HALVES = (torch.float16, torch.bfloat16)
LAYER = "mid.attn2.to_k"


def half(dtype: torch.dtype = torch.float16) -> Eraser:
    return random_eraser({LAYER: 2, "conv": 1}, dtype=dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("strength", [0.3, 1e-6, -1.7])
def test_half_precision_eraser_is_scaled_without_rounding(dtype: torch.dtype, strength: float, tmp_path: Path) -> None:
    eraser = half(dtype)
    stacked = Eraser.load(stack([eraser], [strength]).save(tmp_path))
    for module, pair in stacked.pairs.items():
        exact = strength * eraser.pairs[module].up.double().flatten(1) @ eraser.pairs[module].down.double().flatten(1)
        torch.testing.assert_close(pair.delta().double().flatten(1), exact, rtol=1e-6, atol=0)
        assert (pair.up.dtype, pair.down.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("strength", [1, -1, 0.5, 0])
def test_half_precision_eraser_stays_one_where_that_is_exact(strength: float) -> None:
    eraser = half()
    for module, pair in stack([eraser], [strength]).pairs.items():
        assert torch.equal(pair.up, eraser.pairs[module].up * strength)
        assert pair.up.dtype == torch.float16
    assert strength != 1 or stack([eraser]).files() == eraser.files()


def test_halving_what_half_precision_cannot_hold() -> None:
    """The smallest number of float16 has no half there."""
    smallest = torch.full((4, 2), 2.0**-24, dtype=torch.float16)
    pair = LoraPair(torch.ones(2, 3, dtype=torch.float16), smallest).scaled(0.5, "layer x")
    assert pair.up.dtype == torch.float32
    assert torch.equal(pair.up, smallest.float() / 2)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_layers_of_one_weight_whose_factors_have_different_types(family: str, tmp_path: Path) -> None:
    """Queries, keys and values are rows of one original weight, and strengths by block scale only some of them."""
    model = MODELS[family][0]()
    layers = layers_of(family, model, "xattn")
    precise = eraser_on(model, layers, **MODELS[family][2])
    pairs = {m: LoraPair(p.down.half(), p.up.half()) for m, p in precise.pairs.items()}
    blocks = {module: 0.3 for module in layers if "_k_" in module or module.endswith("to_k")}
    stacked = stack([Eraser(pairs, precise.header)], [Strength(1, blocks)])
    assert {pair.up.dtype for pair in stacked.pairs.values()} == {torch.float16, torch.float32}
    back = import_lora(export(stacked, tmp_path / "kohya.safetensors", layout="kohya"))
    assert back.pairs.keys() == stacked.pairs.keys()
    for module, pair in stacked.pairs.items():
        assert (back.pairs[module].delta() - pair.delta()).norm() < 1e-6 * pair.delta().norm(), module


@pytest.mark.parametrize("strength", [1e39, -1e39, 1e308, float("inf"), float("nan")])
def test_strength_beyond_the_largest_number_is_refused(strength: float) -> None:
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(EsdLoraError, match=rf"layer {LAYER}: times .* beyond 3\.4e\+38, where float32 ends"):
            stack([random_eraser({LAYER: 2}, dtype=dtype)], [strength])


def test_stack_beyond_the_largest_number_leaves_nothing(tmp_path: Path) -> None:
    half(torch.float32).save(tmp_path / "no-cat")
    result = CliRunner().invoke(main, ["stack", f"{tmp_path / 'no-cat'}:1e39", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: strength 1e+39 of")
    assert "is beyond all use" in result.stderr
    assert not (tmp_path / "out" / WEIGHTS_NAME).exists()


@pytest.mark.parametrize("alpha", [1e308, -1e300])
def test_alpha_beyond_the_largest_number_is_refused_and_nothing_imported(alpha: float, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    tensors = kohya_tensors(eraser_on(pipe.unet, ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]))
    tensors = {name: torch.tensor(alpha, dtype=torch.float64) if "alpha" in name else value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "foreign.safetensors")
    command = ["import", str(tmp_path / "foreign.safetensors"), "--family", "sd", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1, result.output
    assert "foreign.safetensors: layer mid_block_attentions_0_transformer_blocks_0_attn2_to_k: times" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["save", *LAYOUTS[1:]])
def test_no_file_with_what_is_no_number(layout: str, value: float, tmp_path: Path) -> None:
    eraser = random_eraser({LAYER: 2, "conv": 1}, dtype=torch.float32)
    eraser.pairs["conv"].up[0, 0] = value
    with pytest.raises(EsdLoraError, match=r"conv\.lora_B\.weight would hold NaN or infinity, so nothing is written"):
        eraser.save(tmp_path) if layout == "save" else export(eraser, tmp_path / "x.safetensors", layout=layout)
    assert not list(tmp_path.iterdir())


def test_large_finite_numbers_are_no_infinity() -> None:
    """Their sum is."""
    large = torch.full((10,), 3e38)
    assert not large.sum().isfinite()
    assert all_finite(large)
    assert file_content({"x": large, "whole": torch.tensor([1])}, {})
    assert all_finite(torch.full((10,), 60000.0, dtype=torch.float16))


BROKEN = {
    "strength": (
        {"concepts": (ErasedConcept(name="a cat", pairs=(), eta=1).model_copy(update={"weight": float("inf")}),)},
        "concepts.0.weight",
    ),
    "cost": ({"cost": {"seconds": float("nan")}}, "cost.seconds"),
    "truncation": ({"truncation": float("nan")}, "truncation"),
}


@pytest.mark.parametrize(("changes", "place"), BROKEN.values(), ids=BROKEN)
def test_header_with_what_is_no_number(changes: dict[str, object], place: str, tmp_path: Path) -> None:
    eraser = half()
    header = eraser.header.model_copy(update=changes)
    with pytest.raises(EsdLoraError, match=f"header cannot be written: {place}: expected a finite number"):
        Eraser(eraser.pairs, header).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stack_of_strengths_whose_product_is_infinite(tmp_path: Path) -> None:
    """The update is zero there, so that no layer says anything."""
    eraser = random_eraser({LAYER: 1}, dtype=torch.float64)
    eraser.pairs[LAYER].up.zero_()
    with pytest.raises(EsdLoraError, match=r"header cannot be written: concepts\.0\.weight: expected a finite number"):
        stack([stack([eraser], [1e200])], [1e200]).save(tmp_path / "out")


def test_header_of_a_stranger_with_what_is_no_number(tmp_path: Path) -> None:
    eraser = half()
    text = eraser.header.model_dump_json().replace('"truncation":0.0', '"truncation":NaN')
    assert "NaN" in text
    file = tmp_path / "theirs.safetensors"
    file.write_bytes(file_content(eraser.state_dict(), {HEADER_KEY: text}))
    with pytest.raises(EsdLoraError, match=r"theirs\.safetensors has a damaged header \(NaN is no JSON\)"):
        Eraser.load(file)
    assert read_tensors(file)
