"""Merging into checkpoints in one file: the original names, fused layers, averaged copies, and nothing else touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import original_checkpoints
from esd_lora.bases.stored import open_stored
from esd_lora.erasers.eraser import Eraser, hash_weight
from esd_lora.erasers.stacking import Strength, stack
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.weights import merging
from esd_lora.weights import streaming as merged_file
from esd_lora.weights.merging import merge
from esd_lora.weights.streaming import MERGED_KEY
from esd_lora.weights.verifying import verify
from random_erasers import eraser_on
from toy_denoisers import MODELS, eraser_on_all_layers, layers_of, original_deltas
from toys import make_toy

KINDS = ("sd", "sd2-v", "sdxl", "sd3", "sd35", "flux-dev", "pixart", "lumina2", "qwen-image", "flux2-dev", "z-image", "wan")
FAMILY = {kind: kind for kind in KINDS} | {"sd2-v": "sd", "sd35": "sd3", "flux-dev": "flux", "flux2-dev": "flux2"}


def with_base_hashes(eraser: Eraser, model: torch.nn.Module) -> Eraser:
    """As if trained on the model."""
    layers = dict(model.named_modules())
    hashes = {module: hash_weight(layers[module].weight) for module in eraser.pairs}
    return Eraser(eraser.pairs, eraser.header.model_copy(update={"base_hashes": hashes}))


def write_checkpoint(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, torch.nn.Module, Eraser]:
    """A toy checkpoint in one file, its denoiser, and an eraser of all its layers."""
    pipe = make_toy(kind)
    model = getattr(pipe, "transformer", None) or pipe.unet
    file = folder / f"{kind}.safetensors"
    state = MODELS[FAMILY[kind]][1](model) if hasattr(pipe, "transformer") else original_checkpoints.checkpoint(pipe)
    save_file({name: tensor.detach().to(dtype).contiguous().clone() for name, tensor in state.items()}, file, {"who": "me"})
    prediction = {"prediction_type": "v_prediction"} if kind == "sd2-v" else {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    eraser = eraser_on(model, layers_of(FAMILY[kind], model), "a cat", **{**MODELS[FAMILY[kind]][2], **prediction})
    return file, model, with_base_hashes(eraser, model)


def assert_merged(out: Path, file: Path, family: str, model: torch.nn.Module, eraser: Eraser) -> None:
    """The update in the original's layout, from a model whose weights were changed by hand; everything else as it was."""
    before, after = load_file(file), load_file(out)
    expected = original_deltas(family, model, eraser)
    assert after.keys() == before.keys()
    touched = 0
    for name, old in before.items():
        delta = expected.get(name)
        assert after[name].dtype == old.dtype
        if delta is None or not delta.any():
            assert torch.equal(after[name], old), name
        else:
            touched += 1
            eps = torch.finfo(old.dtype).eps
            torch.testing.assert_close(after[name].float(), old.float() + delta, rtol=eps, atol=2e-5)
    assert touched > 5


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_sum_and_the_rest_is_untouched(kind: str, tmp_path: Path) -> None:
    file, model, eraser = write_checkpoint(kind, tmp_path)
    before = file.read_bytes()
    out = merge([eraser], file, tmp_path / "new" / "merged.safetensors", progress=False)
    assert_merged(out, file, FAMILY[kind], model, eraser)
    assert file.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    proved = verify(out, file, [eraser])
    assert proved.worst <= 0.5
    assert proved.touched + proved.untouched == len(load_file(file))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_stays_and_is_rounded_to_once(dtype: torch.dtype, tmp_path: Path) -> None:
    file, model, eraser = write_checkpoint("sdxl", tmp_path, dtype)
    out = merge([eraser], file, tmp_path / "merged.safetensors", progress=False)
    assert_merged(out, file, "sdxl", model, eraser)
    name, module = "model.diffusion_model.middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in"
    old, new = load_file(file)[name], load_file(out)[name]
    assert torch.equal(new, (old.float() + eraser.pairs[module].delta()).to(dtype))


def test_averaged_weights_are_merged_too(tmp_path: Path) -> None:
    """v1-5-pruned holds the U-Net twice; an eraser merged into one of them would leave the concept in the other."""
    file, model, eraser = write_checkpoint("sd", tmp_path)
    state = load_file(file)
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in state.items()
        if name.startswith("model.diffusion_model.")
    }
    save_file({**state, **averaged}, file)
    out = merge([eraser], file, tmp_path / "merged.safetensors", progress=False)
    expected, before, after = original_deltas("sd", model, eraser), load_file(file), load_file(out)
    for name, delta in expected.items():
        twin = "model_ema." + name.removeprefix("model.").replace(".", "")
        torch.testing.assert_close(after[twin], before[twin] + delta, rtol=1e-6, atol=2e-5)
    verify(out, file, [eraser])


def test_metadata_grows_by_what_was_merged(tmp_path: Path) -> None:
    file, _, eraser = write_checkpoint("sd", tmp_path)
    out = merge([eraser], file, tmp_path / "one.safetensors", weights=[Strength(0.5, {"mid": 2.0})], progress=False)
    with pytest.warns(UserWarning, match="other weights"):
        again = merge([eraser], out, tmp_path / "two.safetensors", weights=[-1.0], progress=False)
    with safe_open(again, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["who"] == "me"
    first, second = json.loads(metadata[MERGED_KEY])
    assert [(e["weight"], e["blocks"]) for e in first["erasers"]] == [(0.5, {"mid": 2.0})]
    assert second["erasers"][0]["weight"] == -1.0
    assert second["erasers"][0]["recipes"] == [recipe.model_dump(mode="json") for recipe in eraser.header.recipes]


@pytest.mark.filterwarnings("ignore:eraser of .* was trained on other weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merging_and_taking_out_restores_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    file, _, eraser = write_checkpoint("sd", tmp_path, dtype)
    there = merge([eraser], file, tmp_path / "there.safetensors", progress=False)
    back = merge([eraser], there, tmp_path / "back.safetensors", weights=[-1.0], progress=False)
    before, between, after = load_file(file), load_file(there), load_file(back)
    for name, old in before.items():
        spacing = torch.finfo(dtype).eps * torch.maximum(old.abs(), between[name].abs()).float()
        assert ((after[name].float() - old.float()).abs() <= spacing + 1e-6).all(), name


def test_stack_of_scopes_ranks_and_weights(tmp_path: Path) -> None:
    file, model, _ = write_checkpoint("sdxl", tmp_path)
    members = [
        with_base_hashes(eraser_on(model, layers_of("sdxl", model, scope), seed=i, rank=i + 1, **MODELS["sdxl"][2]), model)
        for i, scope in enumerate(("xattn", "noxattn", "xattn-kv"))
    ]
    out = merge(members, file, tmp_path / "merged.safetensors", weights=[1.0, -0.5, 2.0], progress=False)
    assert_merged(out, file, "sdxl", model, stack(members, [1.0, -0.5, 2.0]))


def test_published_layout(tmp_path: Path) -> None:
    """Four levels with two resnets each, as in SD 1.x itself; the toys have fewer."""
    model = MODELS["sd"][0]()
    eraser = with_base_hashes(eraser_on_all_layers("sd", model), model)
    clip = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    file = tmp_path / "sd.safetensors"
    save_file({**{n: t.contiguous() for n, t in original_checkpoints.unet(model).items()}, **clip}, file)
    out = merge([eraser], file, tmp_path / "merged.safetensors", progress=False)
    assert_merged(out, file, "sd", model, eraser)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_found_and_hashed_alike(kind: str, tmp_path: Path) -> None:
    """What a checkpoint holds is what the model made of it has: names, order of rows, values."""
    file, model, _ = write_checkpoint(kind, tmp_path)
    layers = dict(model.named_modules())
    weights = dict(open_stored(file).weights())
    assert set(layers_of(FAMILY[kind], model)) <= weights.keys()
    for module, weight in weights.items():
        assert torch.equal(weight.flatten(), layers[module].weight.flatten()), module


def test_tampered_results_are_told(tmp_path: Path) -> None:
    file, _, eraser = write_checkpoint("sd", tmp_path)
    out = merge([eraser], file, tmp_path / "merged.safetensors", progress=False)
    good = load_file(out)
    touched, untouched = "model.diffusion_model.middle_block.1.proj_in.weight", "model.diffusion_model.out.0.weight"
    for name in (touched, untouched):
        bad = {n: t.clone() for n, t in good.items()}
        bad[name].view(-1)[3] += 0.01
        save_file(bad, out)
        with pytest.raises(EsdLoraError, match=name.replace(".", r"\.")):
            verify(out, file, [eraser])
    save_file({n: t for n, t in good.items() if n != untouched}, out)
    with pytest.raises(EsdLoraError, match="other tensors"):
        verify(out, file, [eraser])
    save_file(good, out)
    with pytest.raises(EsdLoraError, match="is not"):
        verify(out, file, [eraser], weights=[0.9])


def refusal(eraser: Eraser, file: Path, out: Path, **options: object) -> str:
    before = {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file()}
    with pytest.raises(EsdLoraError) as caught:
        merge([eraser], file, out, progress=False, **options)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_refused(tmp_path: Path) -> None:
    file, _, eraser = write_checkpoint("sd", tmp_path)
    out = tmp_path / "merged.safetensors"
    assert "/proc" in refusal(eraser, file, Path("/proc/esd-lora/merged.safetensors"))
    (tmp_path / "link.safetensors").hardlink_to(file)
    assert "is the base itself" in refusal(eraser, file, file, force=True)
    assert "is the base itself" in refusal(eraser, file, tmp_path / "link.safetensors", force=True)
    (tmp_path / "mine.safetensors").write_bytes(b"years of work")
    assert "--force" in refusal(eraser, file, tmp_path / "mine.safetensors")
    assert "damaged" in refusal(eraser, file, tmp_path / "mine.safetensors", force=True)
    assert ".safetensors" in refusal(eraser, file, tmp_path / "folder")
    assert "is a directory" in refusal(eraser, file, (tmp_path / "d.safetensors", (tmp_path / "d.safetensors").mkdir())[0])
    other = Eraser(eraser.pairs, eraser.header.model_copy(update={"family": "sdxl"}))
    assert "family 'sdxl'" in refusal(other, file, out)
    other = Eraser(eraser.pairs, eraser.header.model_copy(update={"prediction_type": "v_prediction"}))
    assert "prediction type 'v_prediction'" in refusal(other, file, out)
    module = next(iter(eraser.pairs))
    other = Eraser({**eraser.pairs, "mid_block.nothing": eraser.pairs[module]}, eraser.header)
    assert "no layer mid_block.nothing" in refusal(other, file, out)
    pair = eraser.pairs[module]
    grown = Eraser({module: pair._replace(up=torch.cat([pair.up, pair.up]))}, eraser.header)
    assert "made for another model" in refusal(grown, file, out)
    state = load_file(file)
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    save_file({**state, name: state[name].to(torch.float8_e4m3fn)}, file)
    assert "quantised" in refusal(eraser, file, out)


def test_disk_without_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _, eraser = write_checkpoint("sd", tmp_path)
    size = file.stat().st_size
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 300_000))
    message = refusal(eraser, file, tmp_path / "merged.safetensors")
    assert f"needs {size / 10**6:,.1f} MB, and {(size - 300_000) / 10**6:,.1f} MB are free" in message
    assert not (tmp_path / "merged.safetensors").exists()
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    merge([eraser], file, tmp_path / "merged.safetensors", progress=False)


def test_disk_that_fills_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _, eraser = write_checkpoint("sd", tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merged_file, "_copy", full)
    out = tmp_path / "new" / "merged.safetensors"
    assert "No space left on device" in refusal(eraser, file, out)
    assert not list(out.parent.iterdir())


def test_disk_that_refuses_while_others_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread hears that asks the disk for what is written so far, whoever called hears."""
    file, _, eraser = write_checkpoint("sd", tmp_path)

    really = os.fsync

    def refusing(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.EIO, "Input/output error")
        really(descriptor)

    monkeypatch.setattr(merged_file, "_FLUSHED", 2**16)
    monkeypatch.setattr(merged_file.os, "fsync", refusing)
    out = tmp_path / "new" / "merged.safetensors"
    assert "Input/output error" in refusal(eraser, file, out)
    assert not list(out.parent.iterdir())


def test_however_it_is_cut_and_copied_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, turns, flushes and the kernel's way of copying leave the bytes of one that reads and writes them in turn."""
    file, _, eraser = write_checkpoint("sd", tmp_path, torch.float16)
    few = Eraser({module: eraser.pairs[module] for module in list(eraser.pairs)[:3]}, eraser.header)
    expected = merge([few], file, tmp_path / "kernel.safetensors", progress=False).read_bytes()
    for name, size in (("_TURN", 2**12), ("_RUN", 10_000), ("_FLUSHED", 1), ("_PIECE", 2**10)):
        monkeypatch.setattr(merged_file, name, size)
    assert merge([few], file, tmp_path / "cut.safetensors", progress=False).read_bytes() == expected

    def no_copy(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(merged_file.os, "copy_file_range", no_copy, raising=False)
    assert merge([few], file, tmp_path / "plain.safetensors", progress=False).read_bytes() == expected


@pytest.mark.filterwarnings("ignore:eraser of .* was trained on other weights")
def test_tensors_keep_their_place_within_what_the_kernel_copies_as_one(tmp_path: Path) -> None:
    file, _, eraser = write_checkpoint("sd", tmp_path)
    once = merge([eraser], file, tmp_path / "once.safetensors", progress=False)
    twice = merge([eraser], once, tmp_path / "twice.safetensors", weights=[-1], progress=False)
    starts = [read_header(path).start for path in (file, once, twice)]
    assert starts == [starts[0], starts[0] + merged_file._FOLIO, starts[0] + merged_file._FOLIO]


KILLED = """
import os, signal, sys
from pathlib import Path
from esd_lora.weights import merging, streaming as merged_file
file, eraser, out, after, force = sys.argv[1:]
write_checkpoint = 0
really = merged_file._add
def dying(*args):
    global write_checkpoint
    write_checkpoint += 1
    if write_checkpoint == int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return really(*args)
merged_file._add = dying
merging.merge([eraser], file, out, force=bool(int(force)), progress=False)
"""


@pytest.mark.parametrize("force", [False, True])
def test_kill_leaves_no_output_or_the_old_one(force: bool, tmp_path: Path) -> None:
    file, _, eraser = write_checkpoint("sd", tmp_path)
    eraser.save(tmp_path / "eraser")
    out = tmp_path / "new" / "merged.safetensors"
    if force:
        merge([eraser], file, out, weights=[0.5], progress=False)
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (file, out) if path.exists()}
    for after in (1, 60):
        command = [sys.executable, "-c", KILLED, *map(str, (file, tmp_path / "eraser", out, after, int(force)))]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert out.exists() == force
        assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (file, out) if path.exists()} == before
    assert len(list(out.parent.iterdir())) > force
    merge([eraser], file, out, force=force, progress=False)
    verify(out, file, [eraser])
    assert list(out.parent.iterdir()) == [out]  # what the killed runs left is gone too
