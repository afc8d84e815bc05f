"""Low precision and accelerators. What is marked `gpu` runs where there is a CUDA device and is skipped elsewhere."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from esd_lora.adapter import applied
from esd_lora.bases.loading import choose_device, choose_dtype, load_base
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.errors import EsdLoraError
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train
from esd_lora.watching import StepReport
from published_denoisers import DENOISERS
from random_erasers import eraser_on
from tiny import tiny_recipe

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def test_devices_and_dtypes() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    assert choose_dtype(torch.device("cpu"), None) == torch.float32
    assert choose_dtype(torch.device("mps"), None) == torch.float16
    assert choose_dtype(torch.device("cpu"), "bfloat16") == torch.bfloat16
    with pytest.raises(EsdLoraError, match="did you mean 'cuda'"):
        choose_device("cudda")
    if not torch.cuda.is_available():
        with pytest.raises(EsdLoraError, match="not available here"):
            choose_device("cuda")


@gpu
def test_gpu_is_chosen_where_there_is_one() -> None:
    assert choose_device("auto").type == "cuda"
    assert choose_dtype(choose_device("auto"), None) in (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_float32_over_a_half_precision_base(tiny_dir: Path, device: str, dtype: torch.dtype) -> None:
    base = load_base(tiny_dir, device=device, dtype=dtype)
    learnt: list[torch.Tensor] = []

    def look(report: StepReport) -> None:
        assert {p.dtype for p in report.state.parameters} == {torch.float32}
        assert {p.device.type for p in report.state.parameters} == {device}
        assert report.teacher.base.model.dtype == dtype
        learnt.append(report.state.parameters[0].detach().clone())

    eraser = train(tiny_recipe(tiny_dir, lr=1e-6), base=base, progress=False, on_step=[look])
    # An update of 1e-6 on a weight near 0.1 is below the resolution of either (4e-4, 6e-5); a float32 master keeps it. Where
    # a weight lies next to the middle between two, it is rounded to the other.
    moved, rounded = (learnt[0].to(kind) != learnt[-1].to(kind) for kind in (torch.float32, torch.bfloat16))
    assert moved.any()
    assert rounded.float().mean() < 0.05
    assert {tensor.dtype for pair in eraser.pairs.values() for tensor in pair} == {torch.float32}
    assert {tensor.device.type for pair in eraser.pairs.values() for tensor in pair} == {"cpu"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_trains_as_float32_does(tiny_dir: Path, device: str, dtype: torch.dtype, near: float) -> None:
    losses: dict[torch.dtype, list[float]] = {}
    for each in (torch.float32, dtype):
        base = load_base(tiny_dir, device=device, dtype=each)
        losses[each] = []
        recipe = tiny_recipe(tiny_dir, lr=0.01, steps=8)
        train(recipe, base=base, progress=False, on_step=[lambda report, to=losses[each]: to.append(report.state.loss)])
    assert losses[dtype] == pytest.approx(losses[torch.float32], rel=near)
    assert losses[dtype] != losses[torch.float32]


@gpu
def test_seed_gives_the_same_points_on_every_device(tiny_dir: Path) -> None:
    losses: dict[str, list[float]] = {"cpu": [], "cuda": []}
    for device, to in losses.items():
        base = load_base(tiny_dir, device=device, dtype=torch.float32)
        train(tiny_recipe(tiny_dir), base=base, progress=False, on_step=[lambda r, to=to: to.append(r.state.loss)])
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)


@gpu
def test_stable_diffusion_trains_in_eight_gigabytes(tiny_dir: Path) -> None:
    """SD 1.5's U-Net at its real size with random weights, `sd/fast`, 512 px, bfloat16; text encoder of toy width."""
    base = load_base(tiny_dir, device="cuda", dtype=torch.bfloat16)
    with torch.device("cuda"):
        config = {**DENOISERS["sd15"][2], "cross_attention_dim": 16}
        base.pipe.unet = UNet2DConditionModel(**config).to(torch.bfloat16).requires_grad_(False).eval()
    brief = {"train.steps": 2, "train.trajectories": 2, "train.preserve_trajectories": 2, "train.trajectory_steps": 2}
    torch.cuda.reset_peak_memory_stats()
    train(load_recipe("sd/fast", brief, concepts=["a cat"], preserve=["a dog"]), base=base, progress=False)
    peak = torch.cuda.max_memory_allocated() / 2**30
    assert peak < 8


@pytest.mark.parametrize(("size", "warned"), [(1e-3, True), (0.1, False)])
def test_update_that_half_precision_rounds_away_is_warned_of(tiny_dir: Path, size: float, warned: bool) -> None:
    """bfloat16 has 8 bits: an update of a thousandth of the weights drowns in rounding, one of a tenth does not."""
    base = load_base(tiny_dir, dtype="bfloat16", device="cpu")
    eraser = eraser_on(base.model, base.family.modules(base.model, "xattn"))
    pairs: dict[str, LoraPair] = {}
    for path, weight in base.weights(eraser.pairs):
        down, up = eraser.pairs[path]
        scale = size * float(weight.float().norm()) / float((up.flatten(1) @ down.flatten(1)).norm())
        pairs[path] = LoraPair(down, up * scale)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with applied(base, [Eraser(pairs, eraser.header)]):
            pass
    assert any("rounding changes the erasers' update" in str(warning.message) for warning in caught) == warned
