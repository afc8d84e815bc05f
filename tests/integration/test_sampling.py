"""Pictures with erasers on: fused, so that a stack of any size costs nothing, and adjustable all the same."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL.Image import Image

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.manifests import write_manifest
from esd_lora.erasers.stacking import Strength, stack
from esd_lora.errors import EsdLoraError
from esd_lora.sampling import generate, sweep

PROMPTS = ["a cat", "a dog"]


def pixels(pictures: Sequence[Image]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=float) for picture in pictures])


def weights(base: Base) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def test_every_strength_is_that_of_a_stack_of_that_weight(base: Base, cat: Eraser, car: Eraser) -> None:
    found = sweep(base, PROMPTS, [0.5, 0, 1, -1], erasers=[cat, car], weights=[1, 0.5], steps=2)
    assert list(found) == [0.5, 0, 1, -1]
    for strength, pictures in found.items():
        expected = generate(base, PROMPTS, erasers=[cat, car], weights=[strength, strength / 2], steps=2)
        assert np.abs(pixels(pictures) - pixels(expected)).max() <= 1
    plain = generate(base, PROMPTS, steps=2)
    assert np.array_equal(pixels(found[0]), pixels(plain))
    assert not np.array_equal(pixels(found[1]), pixels(plain))
    assert not np.array_equal(pixels(found[-1]), pixels(found[1]))


@pytest.mark.filterwarnings("ignore:eraser of .* was trained on other weights")  # bfloat16 rounds the base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_leaves_as_it_came_bit_for_bit(tiny_dir: Path, cat: Eraser, car: Eraser, dtype: torch.dtype) -> None:
    base = load_base(tiny_dir, device="cpu", dtype=dtype)
    before = weights(base)
    with applied(base, [cat, car]) as fused:
        for strength in (1.0, -3.0, 0.1):
            fused.set_strength(strength)
            stacked = stack([cat, car], [strength, strength])
            for module, pair in stacked.pairs.items():
                old = before[f"{module}.weight"]
                new = base.model.get_submodule(module).weight
                spacing = torch.finfo(dtype).eps * (old.float().abs() + pair.delta().abs())
                assert ((new.float() - (old.float() + pair.delta())).abs() <= spacing + 1e-6).all()
        fused.set_strength(0.0)
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


def test_base_is_restored_after_a_fault(base: Base, cat: Eraser) -> None:
    before = weights(base)
    with pytest.raises(RuntimeError, match="on the way"), applied(base, [cat]):
        raise RuntimeError("on the way")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert not hasattr(base.model, "peft_config")


def test_ten_erasers_add_no_layer_and_no_operation(base: Base, cat: Eraser, car: Eraser) -> None:
    def operations() -> list[str]:
        seen: list[str] = []
        hooks = [m.register_forward_hook(lambda m, *_: seen.append(type(m).__name__)) for m in base.model.modules()]
        with torch.no_grad():
            base.predict(torch.zeros(1, 4, 8, 8), torch.tensor([500]), base.encode(["a cat"]))
        for hook in hooks:
            hook.remove()
        return seen

    plain = operations()
    with applied(base, [cat, car] * 5, [0.1] * 10):
        assert operations() == plain


def test_strength_by_block_at_inference(base: Base, cat: Eraser) -> None:
    nothing = Strength(1.0, dict.fromkeys(("down", "mid", "up"), 0.0))
    plain = generate(base, PROMPTS, steps=2)
    assert np.array_equal(pixels(generate(base, PROMPTS, erasers=[cat], weights=[nothing], steps=2)), pixels(plain))
    some = generate(base, PROMPTS, erasers=[cat], weights=[Strength(1.0, {"up": 0.0})], steps=2)
    whole = generate(base, PROMPTS, erasers=[cat], steps=2)
    assert not np.array_equal(pixels(some), pixels(plain))
    assert not np.array_equal(pixels(some), pixels(whole))


def test_manifest_is_taken_for_an_eraser(base: Base, cat_dir: Path, car_dir: Path, tmp_path: Path) -> None:
    for folder in (cat_dir, car_dir):
        shutil.copytree(folder, tmp_path / folder.name)
    strengths = [Strength(0.5), Strength(-1.0, {"mid": 2.0})]
    write_manifest(tmp_path / "stack.yaml", [tmp_path / cat_dir.name, tmp_path / car_dir.name], strengths)
    one = generate(base, PROMPTS, erasers=[tmp_path / "stack.yaml"], steps=2)
    two = generate(base, PROMPTS, erasers=[cat_dir, car_dir], weights=strengths, steps=2)
    assert np.array_equal(pixels(one), pixels(two))


def test_strength_in_plain_diffusers(tiny_dir: Path, base: Base, cat: Eraser, car: Eraser, tmp_path: Path) -> None:
    """Whoever loads the stack with diffusers has one adapter, whose weight may be changed."""
    stack([cat, car]).save(tmp_path / "stack")
    plain = load_base(tiny_dir, device="cpu")
    plain.pipe.load_lora_weights(tmp_path / "stack", adapter_name="esd_both")
    for strength in (1.0, 0.25, -1.0):
        plain.pipe.set_adapters("esd_both", strength)
        theirs = plain.pipe(
            "a cat", num_inference_steps=2, guidance_scale=base.guidance, generator=torch.Generator().manual_seed(0)
        )
        ours = sweep(base, ["a cat"], [strength], erasers=[cat, car], steps=2)[strength]
        assert np.abs(pixels(theirs.images) - pixels(ours)).max() <= 1


def test_weights_without_erasers(base: Base) -> None:
    with pytest.raises(EsdLoraError, match="1 weights and no erasers"):
        generate(base, PROMPTS, weights=[1.0])


def test_eraser_that_does_not_know_its_base_is_warned_about(base: Base, cat: Eraser) -> None:
    foreign = Eraser(cat.pairs, cat.header.model_copy(update={"base_hashes": {}, "prediction_type": None}))
    with pytest.warns(UserWarning, match="does not say which weights 16 of its 16 layers"):
        generate(base, ["a cat"], erasers=[foreign], steps=1)
