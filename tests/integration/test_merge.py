"""Merging: the erased checkpoint is the sum, everything else is untouched, and it is never half there."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from esd_lora.adapter import applied
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.erasers.stacking import stack
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.weights import merging
from esd_lora.weights import streaming as merged_file
from esd_lora.weights.merging import merge
from esd_lora.weights.streaming import MERGED_KEY
from esd_lora.weights.verifying import verify
from original_checkpoints import save_checkpoint
from tiny import save_tiny, tiny_pipeline

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a directory and the hash of what it holds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def unet_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in (folder / "unet").glob("*.safetensors") for name, value in load_file(file).items()}


def assert_merged(out: Path, source: Path, stacked: Eraser) -> None:
    """The sum, made in float32 and rounded once to the stored dtype, where the stack has a layer; the old bytes elsewhere."""
    before, after = unet_weights(source), unet_weights(out)
    assert after.keys() == before.keys()
    for name, old in before.items():
        new, pair = after[name], stacked.pairs.get(name.removesuffix(".weight"))
        assert new.dtype == old.dtype
        if pair is None or not name.endswith(".weight"):
            assert torch.equal(new, old), name
            continue
        up, down = pair.up.double().flatten(1), pair.down.double().flatten(1)
        exact = old.double() + (up @ down).reshape(old.shape)
        rounding = torch.finfo(new.dtype).eps / 2 * exact.abs() + torch.finfo(new.dtype).smallest_normal
        summing = torch.finfo(torch.float32).eps * (old.double().abs() + (up.abs() @ down.abs()).reshape(old.shape))
        assert ((new.double() - exact).abs() <= rounding + summing).all(), name
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{module}.weight" for module in stacked.pairs}


@pytest.fixture(scope="module")
def half_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy base stored in float16."""
    folder = tmp_path_factory.mktemp("half") / "tiny"
    tiny_pipeline().to(dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy base with its U-Net in several files."""
    folder = shutil.copytree(tiny_dir, tmp_path_factory.mktemp("sharded") / "tiny")
    (folder / WEIGHTS).unlink()
    tiny_pipeline().unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    return folder


def test_merged_model_predicts_what_the_stack_does(tiny_dir: Path, tmp_path: Path, cat: Eraser, car_dir: Path) -> None:
    out = merge([cat, car_dir], tiny_dir, tmp_path / "merged", weights=[1, 0.5], progress=False)
    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([900, 20])
    base, merged = load_base(tiny_dir), load_base(out)
    with torch.no_grad():
        condition = base.encode(["a cat", "a dog"])
        plain = base.predict(x_t, t, condition)
        with applied(base, [cat, Eraser.load(car_dir)], [1, 0.5]):
            stacked = base.predict(x_t, t, condition)
        torch.testing.assert_close(merged.predict(x_t, t, condition), stacked, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(stacked, plain, atol=1e-3)


def test_weights_are_the_sum_and_the_rest_is_untouched(tiny_dir: Path, tmp_path: Path, cat: Eraser, car: Eraser) -> None:
    before = hashes(tiny_dir)
    out = merge([cat, car], tiny_dir, tmp_path / "merged", weights=[1, -0.5], progress=False)
    assert_merged(out, tiny_dir, stack([cat, car], [1, -0.5]))
    assert hashes(tiny_dir) == before
    after = hashes(out)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {WEIGHTS}
    assert list(tmp_path.iterdir()) == [out]


def test_float16_base_stays_float16(half_dir: Path, tmp_path: Path, cat: Eraser, car: Eraser) -> None:
    out = merge([cat, car], half_dir, tmp_path / "merged", progress=False)
    assert {value.dtype for value in unet_weights(out).values()} == {torch.float16}
    assert_merged(out, half_dir, stack([cat, car]))


def test_sharded_base(sharded_dir: Path, tmp_path: Path, cat: Eraser, car: Eraser) -> None:
    out = merge([cat, car], sharded_dir, tmp_path / "merged", progress=False)
    assert hashes(out).keys() == hashes(sharded_dir).keys()
    assert_merged(out, sharded_dir, stack([cat, car]))
    loaded = load_base(out).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in unet_weights(out).items())


@pytest.mark.parametrize("kind", ["tiny", "half", "sharded"])
def test_proof_of_a_directory(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, cat: Eraser, car: Eraser, cat_dir: Path
) -> None:
    source = request.getfixturevalue(f"{kind}_dir")
    out = merge([cat, car], source, tmp_path / "merged", weights=[1, 0.5], progress=False)
    proved = verify(out, source, [cat_dir, car], weights=[1, 0.5])
    assert (proved.touched, proved.touched + proved.untouched) == (len({*cat.pairs, *car.pairs}), len(unet_weights(source)))
    assert proved.worst <= 0.5
    assert kind != "half" or proved.worst > 0.4
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        before = (out / file).read_text()
        (out / file).write_text(before + " ")
        with pytest.raises(EsdLoraError, match=f"{file} differs"):
            verify(out, source, [cat, car], weights=[1, 0.5])
        (out / file).write_text(before)
    (out / "unet" / "more.safetensors").write_bytes(next((out / "unet").glob("*.safetensors")).read_bytes())
    with pytest.raises(EsdLoraError, match="what files unet has differs"):
        verify(out, source, [cat, car], weights=[1, 0.5])


@pytest.mark.parametrize(("value", "name"), [(0.02, "drift"), (float("nan"), "nan")])
def test_proof_sees_what_is_small(half_dir: Path, tmp_path: Path, cat: Eraser, value: float, name: str) -> None:
    """A float16 value near zero may be off by half of its own spacing, not by that of larger ones."""
    out = merge([cat], half_dir, tmp_path / name, progress=False)
    tensors = load_file(out / WEIGHTS)
    weight = tensors[f"{next(iter(cat.pairs))}.weight"].flatten()
    smallest = weight.abs().argmin()
    assert weight[smallest].abs() < 0.01
    weight[smallest] += value * weight[smallest].abs()
    save_file(tensors, out / WEIGHTS)
    words = "plus the erasers' update there" if name == "drift" else "holds NaN or infinity: base . update does not"
    with pytest.raises(EsdLoraError, match=words):
        verify(out, half_dir, [cat])


def with_weight(source: Path, out: Path, module: str, value: float) -> Path:
    """A copy of a base, one value of a layer changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / WEIGHTS)
    tensors[f"{module}.weight"].flatten()[-1] = value
    save_file(tensors, out / WEIGHTS)
    return out


def test_sum_beyond_float16_is_refused(half_dir: Path, tmp_path: Path, cat: Eraser) -> None:
    folder = tmp_path / "results"
    with pytest.raises(
        EsdLoraError, match=r"is stored as float16, which ends at 65504, and base \+ update goes beyond"
    ) as caught:
        merge([cat], half_dir, folder / "merged", weights=[1e7], progress=False)
    assert "attn2.to_" in str(caught.value)
    assert not list(folder.iterdir())
    with pytest.raises(EsdLoraError, match=r"layer .*attn2.*: times 1e\+39 its values go beyond"):
        merge([cat], half_dir, folder / "merged", weights=[1e39], progress=False)
    assert not list(folder.iterdir())


def test_update_beyond_float32_is_refused(tiny_dir: Path, tmp_path: Path, cat: Eraser) -> None:
    """Each factor is finite, their product is not."""
    module, pair = next(iter(cat.pairs.items()))
    huge = Eraser({module: pair._replace(down=pair.down * 1e30, up=pair.up * 1e30)}, cat.header)
    with pytest.raises(
        EsdLoraError, match=rf"{module}\.weight plus the erasers' update is NaN or infinity, so nothing is written"
    ):
        merge([huge], tiny_dir, tmp_path / "merged", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["tiny", "half"])
def test_damaged_base_is_not_merged_into(
    kind: str, value: float, request: pytest.FixtureRequest, tmp_path: Path, cat: Eraser
) -> None:
    module = next(iter(cat.pairs))
    source = with_weight(request.getfixturevalue(f"{kind}_dir"), tmp_path / "base", module, value)
    with (
        pytest.raises(EsdLoraError, match=rf"base.*{module}\.weight holds NaN or infinity before anything is merged into it"),
        pytest.warns(UserWarning, match="differ"),
    ):
        merge([cat], source, tmp_path / "merged", progress=False)
    assert list(tmp_path.iterdir()) == [source]


def test_proof_says_why_a_value_is_no_number(half_dir: Path, tmp_path: Path, cat: Eraser) -> None:
    module = next(iter(cat.pairs))
    out = merge([cat], half_dir, tmp_path / "merged", progress=False)
    broken = with_weight(out, tmp_path / "broken", module, float("inf"))
    with pytest.raises(EsdLoraError, match=rf"{module}\.weight holds NaN or infinity: base \+ update does not\. Merge again"):
        verify(broken, half_dir, [cat])
    with pytest.raises(EsdLoraError, match=r"reaches \S+, and it is stored as float16, which ends at 65504"):
        verify(broken, half_dir, [cat], weights=[1e9])
    with pytest.raises(EsdLoraError, match=r"holds NaN or infinity: so does the base there"):
        verify(broken, with_weight(half_dir, tmp_path / "base", module, float("nan")), [cat])


def test_directory_and_file_are_not_compared(tiny_dir: Path, tmp_path: Path, cat: Eraser) -> None:
    file = save_checkpoint(tiny_pipeline(), tmp_path / "model.safetensors")
    with pytest.raises(EsdLoraError, match="not of one layout"):
        verify(file, tiny_dir, [cat])


def test_metadata_says_what_was_merged(tiny_dir: Path, tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    out = merge([cat_dir, car_dir], tiny_dir, tmp_path / "merged", weights=[1, 0.5], progress=False)
    with safe_open(out / WEIGHTS, framework="pt") as opened:
        metadata = opened.metadata()
    with safe_open(tiny_dir / WEIGHTS, framework="pt") as opened:
        assert metadata.items() >= opened.metadata().items()
    (merged,) = json.loads(metadata[MERGED_KEY])
    assert merged["base"] == tiny_dir.name
    for member, folder, weight in zip(merged["erasers"], (cat_dir, car_dir), (1, 0.5), strict=True):
        eraser = Eraser.load(folder)
        assert member["weight"] == weight
        assert [concept["name"] for concept in member["concepts"]] == eraser.names
        assert member["sha256"] == hash_tensors(eraser.state_dict())
        local = {"base": tiny_dir.name}  # of a path on this machine the last part
        assert member["recipes"] == [recipe.model_dump(mode="json") | local for recipe in eraser.header.recipes]


def test_stack_merges_as_its_members_do(tiny_dir: Path, tmp_path: Path, cat: Eraser, car: Eraser) -> None:
    stack([cat, car], [0.5, 2]).save(tmp_path / "stack")
    one = merge([tmp_path / "stack"], tiny_dir, tmp_path / "one", progress=False)
    two = merge([cat, car], tiny_dir, tmp_path / "two", weights=[0.5, 2], progress=False)
    (a, b) = unet_weights(one), unet_weights(two)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_unmerged_copy_of_the_denoiser_goes_along(tiny_dir: Path, tmp_path: Path, cat: Eraser) -> None:
    """Stable Diffusion's directories often hold the same weights once more, pickled: there nothing would be erased."""
    source = shutil.copytree(tiny_dir, tmp_path / "base")
    torch.save(unet_weights(source), source / "unet" / "diffusion_pytorch_model.bin")
    out = merge([cat], source, tmp_path / "merged", progress=False)
    assert hashes(out).keys() == hashes(tiny_dir).keys()


def test_existing_output_needs_force(tiny_dir: Path, tmp_path: Path, cat: Eraser, car: Eraser) -> None:
    out = merge([cat], tiny_dir, tmp_path / "merged", progress=False)
    before = hashes(out)
    with pytest.raises(EsdLoraError, match="--force"):
        merge([car], tiny_dir, out, progress=False)
    assert hashes(out) == before
    merge([car], tiny_dir, out, force=True, progress=False)
    assert_merged(out, tiny_dir, car)
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_no_part_of_a_pipeline_is_not_lost(tiny_dir: Path, tmp_path: Path, cat: Eraser) -> None:
    out = merge([cat], tiny_dir, tmp_path / "merged", progress=False)
    (out / "notes.txt").write_text("years of work")
    before = hashes(tmp_path)
    with pytest.raises(EsdLoraError, match=r"holds notes\.txt"):
        merge([cat], tiny_dir, out, force=True, progress=False)
    assert hashes(tmp_path) == before


def test_force_takes_nothing_that_is_read(tiny_dir: Path, cat_dir: Path, tmp_path: Path, cat: Eraser) -> None:
    """Not the base, not an eraser, not by way of a link."""
    out = merge([cat], tiny_dir, tmp_path / "merged", progress=False)
    base, eraser = shutil.copytree(tiny_dir, out / "base"), shutil.copytree(cat_dir, out / "no-cat")
    (tmp_path / "link").symlink_to(base)
    before = hashes(tmp_path)
    for erasers, source in (([cat], base), ([cat], tmp_path / "link"), ([eraser], tiny_dir)):
        with pytest.raises(EsdLoraError, match=r"which is read|is the base itself|inside the base"):
            merge(erasers, source, out, force=True, progress=False)
    assert hashes(tmp_path) == before


def test_force_replaces_nothing_but_a_pipeline(tiny_dir: Path, tmp_path: Path, cat: Eraser) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    for out, reason in ((tmp_path / "home", "not a diffusers directory"), (tmp_path / "file", "is a file")):
        with pytest.raises(EsdLoraError, match=reason):
            merge([cat], tiny_dir, out, force=True, progress=False)
    assert hashes(tmp_path).keys() == {"home/thesis.tex", "file"}


@pytest.mark.parametrize("below", [".", "unet", "new/one"])
@pytest.mark.parametrize("force", [False, True])
def test_output_inside_the_base(tiny_dir: Path, tmp_path: Path, cat: Eraser, below: str, force: bool) -> None:
    (tmp_path / "link").symlink_to(tiny_dir)
    before = hashes(tiny_dir)
    for source in (tiny_dir, tmp_path / "link"):
        with pytest.raises(EsdLoraError, match="inside the base"):
            merge([cat], source, tiny_dir / below, force=force, progress=False)
    assert hashes(tiny_dir) == before


def no_space(*_: object, **__: object) -> bytes:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("force", [False, True])
def test_full_disk_leaves_nothing_new(
    tiny_dir: Path, tmp_path: Path, cat: Eraser, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    out = tmp_path / "merged"
    if force:
        merge([cat], tiny_dir, out, progress=False)
    before = hashes(tmp_path)
    monkeypatch.setattr(merged_file, "_add", no_space)
    with pytest.raises(EsdLoraError, match="No space left on device"):
        merge([cat], tiny_dir, out, force=force, progress=False)
    assert hashes(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["merged"] if force else [])


def test_last_rename_that_fails_keeps_the_old_pipeline(
    tiny_dir: Path, tmp_path: Path, cat: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = merge([cat], tiny_dir, tmp_path / "merged", progress=False)
    before = hashes(tmp_path)
    monkeypatch.setattr("esd_lora.files._exchange_at_once", lambda *_: errno.ENOSPC)
    with pytest.raises(EsdLoraError, match="No space left on device"):
        merge([cat], tiny_dir, out, weights=[2], force=True, progress=False)
    assert hashes(tmp_path) == before


def test_interruption_leaves_nothing(tiny_dir: Path, tmp_path: Path, cat: Eraser, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(merged_file, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge([cat], tiny_dir, tmp_path / "merged", progress=False)
    assert not list(tmp_path.iterdir())


def refusal(erasers: list[Eraser | Path], source: Path, out: Path, **options: object) -> str:
    before = hashes(source)
    with pytest.raises(EsdLoraError) as caught:
        merge(erasers, source, out, progress=False, **options)
    assert not out.exists()
    assert hashes(source) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_base(tmp_path: Path, cat: Eraser) -> None:
    for base in (tmp_path, tmp_path / "nothing", Path("emojy"), Path("owner/no-such-model")):
        assert str(base) in refusal([cat], base, tmp_path / "merged")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_index(tiny_dir: Path, tmp_path: Path, cat: Eraser, text: str) -> None:
    source = shutil.copytree(tiny_dir, tmp_path / "base")
    (source / "model_index.json").write_text(text)
    assert "model_index.json" in refusal([cat], source, tmp_path / "merged")


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_damaged_weights(tiny_dir: Path, tmp_path: Path, cat: Eraser, share: float) -> None:
    source = shutil.copytree(tiny_dir, tmp_path / "base")
    whole = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    assert Path(WEIGHTS).name in refusal([cat], source, tmp_path / "merged")


def test_base_without_safetensors(tiny_dir: Path, tmp_path: Path, cat: Eraser) -> None:
    source = shutil.copytree(tiny_dir, tmp_path / "base")
    (source / WEIGHTS).rename(source / "unet" / "diffusion_pytorch_model.bin")
    assert "safetensors" in refusal([cat], source, tmp_path / "merged")


@pytest.mark.parametrize(("field", "value"), [("family", "sdxl"), ("prediction_type", "v_prediction")])
def test_eraser_of_another_kind(tiny_dir: Path, tmp_path: Path, cat: Eraser, field: str, value: str) -> None:
    other = Eraser(cat.pairs, cat.header.model_copy(update={field: value}))
    assert repr(value) in refusal([other], tiny_dir, tmp_path / "merged")


def test_eraser_of_other_layers(tiny_dir: Path, tmp_path: Path, cat: Eraser) -> None:
    (module, pair), *_ = cat.pairs.items()
    elsewhere = Eraser({**cat.pairs, "mid_block.nothing": pair}, cat.header)
    assert "mid_block.nothing" in refusal([elsewhere], tiny_dir, tmp_path / "merged")
    grown = Eraser({module: pair._replace(down=torch.cat([pair.down, pair.down], 1))}, cat.header)
    assert module in refusal([grown], tiny_dir, tmp_path / "merged")


def test_eraser_of_other_weights_is_warned_about(tmp_path: Path, cat: Eraser) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.warns(UserWarning, match="other weights"):
        merge([cat], other, tmp_path / "merged", progress=False)


def test_smallest_layers_are_compared_where_all_would_take_long(
    tmp_path: Path, cat: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sorted(pair.up.shape[0] * pair.down.shape[1] for pair in cat.pairs.values())
    monkeypatch.setattr(merging, "_COMPARED", sum(sizes[:5]))
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.warns(UserWarning, match="5 of 5 layers compared differ"):
        merge([cat], other, tmp_path / "merged", progress=False)


def test_missing_eraser(tiny_dir: Path, tmp_path: Path) -> None:
    assert WEIGHTS_NAME in refusal([tmp_path / "nothing"], tiny_dir, tmp_path / "merged")
    assert "at least one" in refusal([], tiny_dir, tmp_path / "merged")
