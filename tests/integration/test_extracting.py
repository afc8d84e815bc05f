"""Fully fine-tuned models as erasers: what was merged comes back, what no LoRA can hold is said."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_merge_single_file import FAMILY, KINDS, write_checkpoint

import original_checkpoints
from esd_lora.erasers.eraser import Eraser, hash_weight
from esd_lora.erasers.header import parse_header
from esd_lora.erasers.stacking import kept_rank
from esd_lora.errors import EsdLoraError
from esd_lora.formats.inspecting import inspect_file
from esd_lora.weights.extracting import extract
from esd_lora.weights.merging import merge
from random_erasers import build_header, eraser_on, random_eraser
from tiny import tiny_pipeline
from toy_denoisers import MODELS, layers_of
from toys import make_toy


def assert_same(extracted: Eraser, expected: Eraser) -> None:
    assert extracted.pairs.keys() == expected.pairs.keys()
    for module, pair in expected.pairs.items():
        delta = extracted.pairs[module].delta().reshape(pair.shape)
        assert (delta - pair.delta()).norm() <= 1e-4 * pair.delta().norm(), module


@pytest.mark.parametrize("kind", KINDS)
def test_merged_eraser_comes_back(kind: str, tmp_path: Path) -> None:
    """At its own rank, from a single file, to 1e-4; layers that it does not touch are left out."""
    file, model, _ = write_checkpoint(kind, tmp_path)
    family = FAMILY[kind]
    prediction = {"prediction_type": "v_prediction"} if kind == "sd2-v" else {}
    layers = layers_of(family, model)[::4]
    eraser = eraser_on(model, layers, "a cat", rank=2, **{**MODELS[family][2], **prediction})
    with pytest.warns(UserWarning, match="does not say which weights"):
        tuned = merge([eraser], file, tmp_path / "tuned.safetensors", progress=False)
    for cut in ({"rank": 2}, {"energy": 1 - 1e-9}):
        extracted = extract(file, tuned, progress=False, **cut)
        assert_same(extracted.eraser, eraser)
        assert extracted.overall > 1 - 1e-6
        assert extracted.beyond == {}
    header = extracted.eraser.header
    assert header.family == family
    weights = dict(model.named_parameters())
    assert header.base_hashes == {module: hash_weight(weights[f"{module}.weight"]) for module in layers}
    assert (header.origins[0].how, list(header.origins[0].files)) == ("extracted", ["tuned.safetensors"])
    again = merge([extracted.eraser], file, tmp_path / "again.safetensors", progress=False)  # no warning: it knows its base
    for name, tensor in load_file(again).items():
        torch.testing.assert_close(tensor, load_file(tuned)[name], rtol=1e-4, atol=1e-4)


def tuned_unet(seed: int = 1, layers: str = "attn2") -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The toy's U-Net with its cross-attention fully trained, weights and biases, and what was trained."""
    unet = tiny_pipeline().unet
    generator = torch.Generator().manual_seed(seed)
    trained: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if layers in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
                trained[name] = parameter.detach().clone()
    return unet, trained


@pytest.mark.parametrize("form", ["safetensors", "pt", "prefixed", "compvis", "directory", "nested"])
def test_released_forms(tiny_dir: Path, tmp_path: Path, form: str) -> None:
    """The authors' esd-*.safetensors and .pt hold the trained parameters under diffusers' names, older ones whole models."""
    unet, trained = tuned_unet()
    tuned = tmp_path / f"esd-cat.{'pt' if form in ('pt', 'nested') else 'safetensors'}"
    if form == "safetensors":
        save_file(trained, tuned)
    elif form == "pt":
        torch.save(unet.state_dict(), tuned)
    elif form == "nested":
        torch.save({"state_dict": trained, "step": 3}, tuned)
    elif form == "prefixed":
        save_file({f"unet.{name}": tensor for name, tensor in trained.items()}, tuned)
    elif form == "compvis":
        save_file({name: tensor.contiguous() for name, tensor in original_checkpoints.unet(unet).items()}, tuned)
    else:
        tuned = shutil.copytree(tiny_dir, tmp_path / "esd-cat")
        unet.save_pretrained(tuned / "unet")
    with pytest.warns(UserWarning, match=r"biases and norms of .* differ too, which no LoRA can hold"):
        extracted = extract(tiny_dir, tuned, energy=1.0, progress=False)
    assert extracted.eraser.names == ["esd-cat"]
    before, after = (dict(model.named_modules()) for model in (tiny_pipeline().unet, unet))
    assert extracted.eraser.pairs.keys() == set(layers_of("sd", unet, "xattn"))
    for module, pair in extracted.eraser.pairs.items():
        torch.testing.assert_close(pair.delta(), after[module].weight - before[module].weight, rtol=1e-4, atol=1e-5)
    assert set(extracted.beyond) == {name for name in trained if not name.endswith(".weight")}


def test_lower_rank_keeps_what_svd_keeps(tiny_dir: Path, tmp_path: Path) -> None:
    unet, trained = tuned_unet()
    save_file({name: tensor for name, tensor in trained.items() if name.endswith("weight")}, tmp_path / "t.safetensors")
    extracted = extract(tiny_dir, tmp_path / "t.safetensors", rank=3, progress=False)
    before, after = (dict(model.named_modules()) for model in (tiny_pipeline().unet, unet))
    kept = whole = 0.0
    for module, pair in extracted.eraser.pairs.items():
        delta = (after[module].weight.double() - before[module].weight.double()).detach()
        squares = torch.linalg.svdvals(delta).square()
        assert pair.rank == 3
        assert extracted.energy[module] == pytest.approx(float(squares[:3].sum() / squares.sum()), abs=1e-9)
        distance = (pair.delta().double() - delta).norm().square() / squares.sum()
        assert float(distance) == pytest.approx(1 - extracted.energy[module], abs=1e-6)
        kept, whole = kept + float(squares[:3].sum()), whole + float(squares.sum())
    assert extracted.overall == pytest.approx(kept / whole, abs=1e-9)
    assert extracted.eraser.header.truncation == pytest.approx((1 - kept / whole) ** 0.5, abs=1e-6)
    by_energy = extract(tiny_dir, tmp_path / "t.safetensors", energy=0.8, progress=False)
    for module, pair in by_energy.eraser.pairs.items():
        squares = torch.linalg.svdvals((after[module].weight.double() - before[module].weight.double()).detach()).square()
        assert by_energy.energy[module] >= 0.8
        assert float(squares[: pair.rank - 1].sum() / squares.sum()) < 0.8


def test_norms_of_a_pickle_are_compared_too(tiny_dir: Path, tmp_path: Path) -> None:
    unet, _ = tuned_unet()
    with torch.no_grad():
        unet.conv_norm_out.weight += 1
    torch.save(unet.state_dict(), tmp_path / "t.pt")
    with pytest.warns(UserWarning, match="differ too, which no LoRA can hold"):
        assert "conv_norm_out.weight" in extract(tiny_dir, tmp_path / "t.pt", rank=1, progress=False).beyond


@pytest.mark.parametrize(
    ("cut", "words"),
    [({"rank": 3}, "rank 3"), ({"energy": 0.5}, "energy 0.5"), ({"rank": 2, "energy": 1.0}, "rank 2, energy 1.0")],
)
@pytest.mark.parametrize("layout", ["safetensors", "pickle", "directory"])
def test_origin_says_what_was_read_and_kept(
    cut: dict[str, float], words: str, layout: str, tiny_dir: Path, tmp_path: Path
) -> None:
    unet, trained = tuned_unet()
    tuned = tmp_path / {"safetensors": "t.safetensors", "pickle": "t.pt", "directory": "t"}[layout]
    weights = {name: tensor for name, tensor in trained.items() if name.endswith("weight")}
    if layout == "directory":
        shutil.copytree(tiny_dir, tuned)
        unet.save_pretrained(tuned / "unet")
    else:
        save_file(weights, tuned) if layout == "safetensors" else torch.save(weights, tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of biases
        eraser = extract(tiny_dir, tuned, progress=False, **cut).eraser  # type: ignore[arg-type]
    (origin,) = Eraser.load(eraser.save(tmp_path / "eraser")).header.origins
    assert (origin.how, origin.layout) == ("extracted", layout)
    assert (origin.rank, origin.energy) == (cut.get("rank"), cut.get("energy"))
    assert f"), {layout}, {words}; provenance unknown" in "\n".join(inspect_file(tmp_path / "eraser").lines())


def test_origin_of_an_older_extraction_is_read(tmp_path: Path) -> None:
    """Whose rank stood in the layout's field."""
    text = json.loads(build_header().model_dump_json())
    text["origins"] = [{"how": "extracted", "files": {"esd-cat.pt": "0" * 64}, "layout": "rank 4, energy 0.9", "notes": {}}]
    header = parse_header(json.dumps(text), Path("x.safetensors"))
    (origin,) = header.origins
    assert (origin.layout, origin.rank, origin.energy) == ("rank 4, energy 0.9", None, None)
    folder = Eraser(random_eraser({"conv": 1}).pairs, header).save(tmp_path / "eraser")
    assert "), rank 4, energy 0.9; provenance unknown" in "\n".join(inspect_file(folder).lines())


@pytest.mark.parametrize(
    ("stored", "copied", "finer"),
    [
        ("float32", "bfloat16", False),
        ("float32", "float16", False),
        ("float16", "bfloat16", False),
        ("bfloat16", "float32", False),
        ("bfloat16", "float32", True),
        ("float16", "float32", True),
    ],
)
def test_copy_in_another_dtype_does_not_differ(stored: str, copied: str, finer: bool, tmp_path: Path) -> None:
    """Nor do its biases. `finer`: the copy's place is taken by what the base itself was rounded from."""
    unet = tiny_pipeline().unet
    rounded = {name: tensor.to(getattr(torch, stored)) for name, tensor in unet.state_dict().items()}
    pipe = tiny_pipeline()
    pipe.unet.load_state_dict(rounded)
    pipe.to(dtype=getattr(torch, stored)).save_pretrained(tmp_path / "base")
    original = unet.state_dict() if finer else rounded
    copy = {name: tensor.to(getattr(torch, copied)) for name, tensor in original.items()}
    save_file(copy, tmp_path / "copy.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "do not differ in any of the" in refusal(tmp_path / "base", tmp_path / "copy.safetensors", rank=4)
    name = next(name for name in copy if name.endswith("attn2.to_k.weight"))
    copy[name] = (copy[name].float() * 1.1).to(copy[name].dtype)
    save_file(copy, tmp_path / "tuned.safetensors")
    extracted = extract(tmp_path / "base", tmp_path / "tuned.safetensors", rank=4, progress=False)
    assert list(extracted.eraser.pairs) == [name.removesuffix(".weight")]
    assert extracted.beyond == {}


@settings(max_examples=200)
@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=12).filter(lambda values: max(values) > 1e-3),
    st.none() | st.integers(1, 14),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 1e-12]),
)
def test_rank_is_the_lowest_that_keeps_the_energy(
    values: list[float], rank: int | None, energy: float, rounding: float
) -> None:
    """Written out as a search, from the large end; the sum from the small end may differ from it in the last bit."""
    squares = torch.tensor(sorted(values, reverse=True), dtype=torch.float64).square()
    whole, slack = float(squares.sum()), 1e-15
    kept = kept_rank(squares, rank, energy, rounding=rounding)
    assert 1 <= kept <= min(rank or len(squares), len(squares))
    if kept < min(rank or len(squares), len(squares)):
        assert float(squares[:kept].sum()) >= (energy * (1 - rounding) - slack) * whole
    if kept > 1:
        assert float(squares[: kept - 1].sum()) < (energy * (1 - rounding) + slack) * whole


def test_full_energy_keeps_what_rounding_adds_only_where_there_is_none() -> None:
    squares = torch.tensor([1.0, 0.5, 1e-14, 1e-30], dtype=torch.float64)
    assert kept_rank(squares, None, 1.0) == 4
    assert kept_rank(squares, None, 1.0, rounding=1e-12) == 2


def refusal(base: Path, tuned: Path, **cut: float) -> str:
    with pytest.raises(EsdLoraError) as caught:
        extract(base, tuned, progress=False, **cut)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    _, trained = tuned_unet()
    save_file(trained, tmp_path / "t.safetensors")
    assert "give one" in refusal(tiny_dir, tmp_path / "t.safetensors")
    assert "1 or more" in refusal(tiny_dir, tmp_path / "t.safetensors", rank=0)
    assert "up to 1" in refusal(tiny_dir, tmp_path / "t.safetensors", energy=1.5)
    assert "do not differ" in refusal(tiny_dir, tiny_dir, rank=4)
    assert "no file" in refusal(tiny_dir, tmp_path / "nothing.safetensors", rank=4)
    assert "no base" in refusal(tiny_dir, tmp_path / "nothing", rank=4)
    assert "no base" in refusal(tmp_path / "nothing", tmp_path / "t.safetensors", rank=4)
    make_toy("sdxl").save_pretrained(tmp_path / "xl")
    assert "family 'sdxl'" in refusal(tiny_dir, tmp_path / "xl", rank=4)
    name = next(name for name in trained if name.endswith("to_k.weight"))
    save_file({name: torch.ones(3, 3)}, tmp_path / "t.safetensors")
    assert "has shape" in refusal(tiny_dir, tmp_path / "t.safetensors", rank=4)
    save_file({name: torch.full_like(trained[name], torch.nan)}, tmp_path / "t.safetensors")
    assert "NaN" in refusal(tiny_dir, tmp_path / "t.safetensors", rank=4)
    save_file({"text_model.weight": torch.ones(3, 3)}, tmp_path / "t.safetensors")
    assert "share no layer" in refusal(tiny_dir, tmp_path / "t.safetensors", rank=4)
