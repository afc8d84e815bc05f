"""Merging is addition: what was put in comes out again, to within one rounding for each way."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import original_checkpoints
from esd_lora.weights.merging import merge
from esd_lora.weights.verifying import verify
from random_erasers import eraser_on
from toy_denoisers import layers_of
from toys import make_toy

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, dict[torch.dtype, Path]]:
    """A toy U-Net, and checkpoints of it in one file each."""
    pipe, folder = make_toy("sd"), tmp_path_factory.mktemp("bases")
    files = {dtype: folder / f"{str(dtype)[6:]}.safetensors" for dtype in DTYPES}
    for dtype, file in files.items():
        save_file(
            {n: t.detach().to(dtype).contiguous().clone() for n, t in original_checkpoints.checkpoint(pipe).items()}, file
        )
    return pipe.unet, files


@settings(max_examples=40)
@given(
    st.sampled_from(DTYPES),
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.sampled_from(["xattn", "noxattn", "full"]),
    st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3),
)
def test_merging_and_taking_out_restores_the_base(
    bases: tuple[torch.nn.Module, dict[torch.dtype, Path]],
    dtype: torch.dtype,
    seed: int,
    rank: int,
    scope: str,
    weight: float,
) -> None:
    unet, files = bases
    file, folder = files[dtype], files[dtype].parent
    eraser = eraser_on(unet, layers_of("sd", unet, scope), seed=seed, rank=rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the eraser is of no weights in particular
        there = merge([eraser], file, folder / "there.safetensors", weights=[weight], force=True, progress=False)
        back = merge([eraser], there, folder / "back.safetensors", weights=[-weight], force=True, progress=False)
    touched = verify(there, file, [eraser], weights=[weight]).touched
    old, merged, new = (load_file(path) for path in (file, there, back))
    changed = 0
    for name, value in old.items():
        if torch.equal(merged[name], value):
            assert torch.equal(new[name], value), name
            continue
        changed += 1
        roundings = torch.finfo(dtype).eps / 2 * (merged[name].double().abs() + value.double().abs())
        # Sums are made in float32, whose error is relative to the largest term.
        update = (merged[name].double() - value.double()).abs().max() + value.double().abs().max()
        slack = roundings + 8 * torch.finfo(torch.float32).eps * update + torch.finfo(dtype).smallest_normal
        assert ((new[name].double() - value.double()).abs() <= slack).all(), name
    assert 0 < changed <= touched
