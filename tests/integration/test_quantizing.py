"""Denoisers in int8 and nf4: how far they are from whole ones; an eraser made beside one is an eraser of the base."""

from __future__ import annotations

import math
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from esd_lora.adapter import applied
from esd_lora.bases import loading
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.bases.quantizing import QUANTIZED, dequantized, quantized_layers
from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.fusing.closed_form import fuse
from esd_lora.pictures import paint
from esd_lora.prediction_cache import network_key
from esd_lora.recipe_files import load_recipe
from esd_lora.sampling import generate
from esd_lora.training import train
from esd_lora.watching import StepReport
from tiny import tiny_recipe
from toys import TOYS, load_toy, save_toy

NEAR = {"int8": 0.02, "nf4": 0.6}
"""How far a toy's prediction may be off, in units of its size: toys are narrow, where rounding hurts most."""
NF4 = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra nf4, 120 MB of CUDA kernels, is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # bitsandbytes' own, when it is imported
]
KINDS = ["int8", pytest.param("nf4", marks=NF4)]


def prediction(base: Base) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, *base.latent_shape(), generator=generator), torch.tensor([500, 100])
    with torch.no_grad():
        return base.predict(x_t, t, base.encode(["a cat", "a dog"]))


@pytest.mark.parametrize(("name", "kind"), [*((name, "int8") for name in TOYS), pytest.param("flux-dev", "nf4", marks=NF4)])
def test_every_family(name: str, kind: str, tmp_path: Path) -> None:
    folder = save_toy(name, tmp_path)
    whole, quantized = load_toy(folder), load_toy(folder, dtype=kind)
    layers = dict(quantized_layers(quantized.model, quantized.family))
    assert layers
    assert not any(quantized.family.text_read_by(path) for path in layers)
    before, after = prediction(whole), prediction(quantized)
    assert 0 < float((after - before).norm() / before.norm()) < NEAR[kind]
    for (path, weight), (_, as_held) in zip(whole.weights(layers), quantized.weights(layers), strict=True):
        assert as_held.shape == weight.shape, path
        assert float((as_held - weight).norm() / weight.norm()) < NEAR[kind]
    losses: list[float] = []
    eraser = train(
        tiny_recipe(folder, scope="full", lr=1e-3, steps=3),
        base=quantized,
        progress=False,
        on_step=[lambda report: losses.append(report.state.loss)],
    )
    assert all(map(math.isfinite, losses))
    assert any(pair.up.abs().max() > 0 for path, pair in eraser.pairs.items() if path in layers), "gradients reach them"
    assert {pair.up.dtype for pair in eraser.pairs.values()} == {torch.float32}
    assert torch.equal(prediction(quantized), after), "the base is as it was"
    whole.check(eraser)
    assert eraser.header.base_hashes == whole.hashes(eraser.pairs)
    with applied(whole, [eraser]):
        assert not torch.equal(prediction(whole), before)


@pytest.mark.parametrize("kind", KINDS)
def test_erasers_lie_beside_quantized_weights(tiny_dir: Path, car: Eraser, kind: str) -> None:
    whole, quantized = load_base(tiny_dir), load_base(tiny_dir, dtype=kind)
    untouched = prediction(quantized)
    with applied(whole, [car]) as on_whole, applied(quantized, [car]) as on_quantized:
        for strength in (1.0, -0.5):
            on_whole.set_strength(strength)
            on_quantized.set_strength(strength)
            moved, near = prediction(whole), prediction(quantized)
            assert float((moved - near).norm() / moved.norm()) < NEAR[kind]
        on_quantized.set_strength(0.0)
        torch.testing.assert_close(prediction(quantized), untouched)
    assert torch.equal(prediction(quantized), untouched)
    assert not hasattr(quantized.model, "peft_config")


def test_a_step_holds_no_copies_of_weights(tiny_dir: Path) -> None:
    """Left to itself, autograd keeps what the product reads, which is the whole weight in the activations' dtype."""

    def held(base: Base) -> int:
        size = 0

        def pack(value: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += value.nbytes
            return value

        x_t, t = torch.randn(2, *base.latent_shape()).requires_grad_(), torch.tensor([500, 100])
        condition = base.encode(["a cat", "a dog"])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            base.predict(x_t, t, condition)
        return size

    assert held(load_base(tiny_dir, dtype="int8")) <= held(load_base(tiny_dir))


@pytest.mark.parametrize("kind", KINDS)
def test_text_layers_are_solved_as_on_the_whole_base(kind: str) -> None:
    recipe = load_recipe("instant", concepts=["a cat"])
    whole, quantized = (train(recipe, dtype=dtype, progress=False) for dtype in (None, kind))
    assert all(torch.equal(pair.up, quantized.pairs[path].up) for path, pair in whole.pairs.items())
    assert whole.header.base_hashes == quantized.header.base_hashes


def test_pictures_on_the_command_line(cat_dir: Path, tiny_dir: Path, tmp_path: Path) -> None:
    args = ["generate", "a cat", "--base", str(tiny_dir), "--eraser", str(cat_dir), "--steps", "2", "--dtype", "int8"]
    result = CliRunner().invoke(main, [*args, "--compare", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_a_training_says_what_the_base_is_held_in(tiny_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tiny_recipe(tiny_dir, steps=1), dtype="int8")
    assert "on cpu in int8" in capfd.readouterr().err


def test_a_cache_tells_them_apart(tiny_dir: Path, tmp_path: Path) -> None:
    for dtype in ("int8", "int8", "float32"):
        train(tiny_recipe(tiny_dir, steps=1), dtype=dtype, progress=False, teacher_cache=tmp_path)
    keys = {network_key(load_base(tiny_dir, dtype=dtype).own_weights(), {}) for dtype in ("int8", "float32")}
    assert len(keys) == 2


def test_dequantized_leaves_other_weights_alone() -> None:
    weight = torch.ones(3, 3)
    assert dequantized(weight) is weight


def test_damage_is_found_in_a_quantized_base(tiny_dir: Path) -> None:
    base = load_base(tiny_dir, dtype="int8")
    path, layer = next(quantized_layers(base.model, base.family))
    weight: Any = layer.weight
    weight.scale.fill_(math.nan)
    assert f"unet.{path} holds NaN" in str(base.damaged_module())


def test_refusals(tiny_dir: Path, cat: Eraser, car: Eraser, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(tiny_dir, dtype="int8")
    with pytest.raises(
        EsdLoraError, match=r"is loaded in int8, and fusing needs its weights as they are\. Load it in bfloat16"
    ):
        fuse([cat, car], base)
    with pytest.raises(EsdLoraError, match=r"Known: .*float16, int8, nf4"):
        load_base(tiny_dir, dtype="int4")
    monkeypatch.setitem(QUANTIZED, "int8", "no_such_library")
    with pytest.raises(
        EsdLoraError,
        match=r"needs no_such_library, which is not installed: run in your clone of esd-lora: pip install '\.\[int8\]'",
    ):
        load_base(tiny_dir, dtype="int8")


def test_generated_pictures_are_the_painted_ones(tiny_dir: Path, cat: Eraser) -> None:
    base = load_base(tiny_dir, dtype="int8")
    made = generate(base, ["a cat"], erasers=[cat], steps=2)[0]
    with applied(base, [cat]):
        assert made.tobytes() == paint(base, ["a cat"], [0], steps=2)[0].tobytes()


def test_encoders_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a card has no room for all of them, each comes when it is called and sends the one before it back, in a ring."""
    folder = save_toy("sd3", tmp_path)
    together = load_toy(folder, text_first=True).encode(["a cat", ""])
    monkeypatch.setattr(loading, "_free", lambda _: 0)
    base = load_toy(folder, text_first=True)
    encoders = [base.pipe.text_encoder, base.pipe.text_encoder_2, base.pipe.text_encoder_3]
    assert [encoder._hf_hook.prev_module_hook.model for encoder in encoders] == [encoders[-1], *encoders[:-1]]
    in_turn = base.encode(["a cat", ""])
    assert all(torch.equal(value, in_turn[name]) for name, value in together.items())
    left = [weakref.ref(encoder) for encoder in encoders]
    del encoders
    base.free_text_encoders()
    assert [encoder() for encoder in left] == [None] * 3, "at once, not when circles are looked for"
    assert prediction_of(base, in_turn).isfinite().all()


def prediction_of(base: Base, condition: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return base.predict(torch.zeros(2, *base.latent_shape()), torch.tensor([500, 100]), condition)


def test_watchers_see_a_quantized_base(tiny_dir: Path) -> None:
    seen: list[str] = []

    def look(report: StepReport) -> None:
        seen.append(report.teacher.base.held_in)

    train(tiny_recipe(tiny_dir, steps=2), dtype="int8", progress=False, on_step=[look])
    assert seen == ["int8", "int8"]
