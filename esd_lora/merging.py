"""Merging erasers into a base for good: a new diffusers directory, written tensor by tensor."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from esd_lora.bases import BUILT_IN, base_files
from esd_lora.eraser import Eraser, LoraPair, hash_weight
from esd_lora.errors import EsdLoraError
from esd_lora.families import family_of, read_pipeline
from esd_lora.families._base import prediction_type
from esd_lora.stacking import stack

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".msgpack", ".onnx")
_CHUNK = 16 * 2**20


def merge(
    erasers: Sequence[Eraser | str | Path],
    base: str | Path,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Adds erasers to a base's weights and writes the result as a new diffusers directory.

    Sums are made in float32 and rounded once, to the dtype the base is stored in. Untouched tensors are copied byte for
    byte. The output appears whole, by a rename, or not at all; the input is only read.

    Args:
        erasers: Erasers or their paths.
        base: A built-in base, a local diffusers directory, or a Hub id.
        out: Directory to make.
        weights: Strength of each eraser, 1 by default.
        force: Replace a diffusers directory that is already at `out`.
        progress: Whether to show a progress bar.

    Returns:
        `out`.

    Raises:
        EsdLoraError: If base or erasers cannot be read or do not fit, or `out` exists or is the base itself.
    """
    source, out = _files_of(str(base)), Path(out)
    stacked = stack([eraser if isinstance(eraser, Eraser) else Eraser.load(eraser) for eraser in erasers], weights)
    family = family_of(read_pipeline(source / "model_index.json"))
    if stacked.header.family != family.name:
        raise EsdLoraError(f"erasers are of family {stacked.header.family!r}, base {str(base)!r} of {family.name!r}.")
    _check_prediction_type(source, stacked)
    _check_out(source, out, force)
    files = sorted((source / family.denoiser).glob("*.safetensors"))
    if not files:
        raise EsdLoraError(f"{source / family.denoiser} has no .safetensors weights. Save the base as safetensors first.")
    _check_weights(files, stacked, str(base))
    provenance = {
        "base": str(base),
        "concepts": [concept.model_dump() for concept in stacked.header.concepts],
        "created": stacked.header.created,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:

        def left_out(folder: str, names: list[str]) -> list[str]:
            # Denoiser weights: merged ones are written anew, and other formats would bring the concept back.
            return [n for n in names if Path(folder) == source / family.denoiser and Path(n).suffix in _WEIGHTS]

        shutil.copytree(source, partial, dirs_exist_ok=True, ignore=left_out)
        with tqdm(
            total=sum(f.stat().st_size for f in files), unit="B", unit_scale=True, desc="merging", disable=not progress
        ) as bar:
            left = set(stacked.pairs)
            for file in files:
                target = partial / family.denoiser / file.name
                with target.open("wb") as sink:
                    for name, chunk in _merged_chunks(file, stacked, provenance):
                        sink.write(chunk)
                        bar.update(len(chunk))
                        left.discard(name.removesuffix(".weight"))
        if left:
            raise EsdLoraError(f"base {str(base)!r} has no layer {min(left)}: the eraser was made for another model.")
        partial.chmod(0o755)
        if out.exists():
            retired = out.rename(partial.with_name(f"{partial.name}-replaced"))
            try:
                partial.rename(out)
            except OSError:
                retired.rename(out)
                raise
            shutil.rmtree(retired)
        else:
            partial.rename(out)
    except OSError as error:
        raise EsdLoraError(f"merging into {out} failed: {error}. Nothing was written there.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _files_of(base: str) -> Path:
    """The local diffusers directory of a base; a Hub id is fetched into the cache."""
    folder = base_files(base) if base in BUILT_IN else Path(base)
    if not folder.is_dir() and base.count("/") == 1:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        try:
            folder = Path(DiffusionPipeline.download(base, use_safetensors=True))
        except (OSError, ValueError) as error:
            raise EsdLoraError(f"base {base!r} cannot be fetched: {str(error).strip().splitlines()[0]}") from error
    if not (folder / "model_index.json").is_file():
        raise EsdLoraError(f"no base {base!r}: expected {', '.join(BUILT_IN)}, a diffusers directory, or a Hub id.")
    return folder


def _check_prediction_type(source: Path, stacked: Eraser) -> None:
    config = source / "scheduler" / "scheduler_config.json"
    found = prediction_type(json.loads(config.read_text("utf-8")))
    if found != stacked.header.prediction_type:
        raise EsdLoraError(f"erasers have prediction type {stacked.header.prediction_type!r}, the base {found!r}.")


def _check_weights(files: Sequence[Path], stacked: Eraser, base: str) -> None:
    """Refuses damaged files, and warns when the layers to change are not those the erasers were trained on."""
    changed = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    module = name.removesuffix(".weight")
                    if name.endswith(".weight") and module in stacked.pairs:
                        changed += stacked.header.base_hashes.get(module, "") != hash_weight(opened.get_tensor(name))
        except SafetensorError as error:
            raise EsdLoraError(f"{file} is damaged ({error}). Fetch the base again.") from error
    if changed:
        warnings.warn(
            f"erasers of {stacked.names} were trained on other weights ({stacked.header.base!r}): {changed} of"
            f" {len(stacked.pairs)} layers differ in {base!r}. Measure what the merged model erases.",
            stacklevel=3,
        )


def _check_out(source: Path, out: Path, force: bool) -> None:
    inside = out.resolve()
    if inside == source.resolve() or source.resolve() in inside.parents:
        raise EsdLoraError(f"output {out} is inside the base itself. The base is never written to; choose another place.")
    if out.exists() and not force:
        raise EsdLoraError(f"output {out} already exists. Choose another, or add --force.")
    if out.exists() and not (out / "model_index.json").is_file():
        raise EsdLoraError(f"output {out} is not a diffusers directory, so --force does not replace it. Choose another.")


def _merged_chunks(file: Path, stacked: Eraser, provenance: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The merged safetensors file piece by piece: the header, then every tensor in its old order.

    A safetensors file is an 8-byte little-endian length, a JSON header of that length, then the tensors' bytes at the
    offsets the header gives. Shapes and dtypes stay, so offsets stay too; only the metadata grows.
    """
    with file.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header = json.loads(source.read(length))
        metadata = {**header.pop("__metadata__", {}), "esd_lora_merged": json.dumps(provenance)}
        text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        yield "", struct.pack("<Q", len(text)) + text
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            begin, end = entry["data_offsets"]
            source.seek(8 + length + begin)
            pair = stacked.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if pair:
                yield name, _added(name, source.read(end - begin), entry, pair)
            else:
                for at in range(begin, end, _CHUNK):
                    yield name, source.read(min(_CHUNK, end - at))


def _added(name: str, raw: bytes, entry: dict[str, Any], pair: LoraPair) -> bytes:
    if entry["dtype"] not in _DTYPES or tuple(entry["shape"]) != pair.shape:
        raise EsdLoraError(
            f"base layer {name} is {entry['dtype']} {entry['shape']}, the eraser changes a float layer of {list(pair.shape)}:"
            " it was made for another model, or the base is quantised."
        )
    dtype = _DTYPES[entry["dtype"]]
    weight = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(pair.shape)
    summed = (weight.to(torch.promote_types(dtype, torch.float32)) + pair.delta()).to(dtype)
    return summed.contiguous().view(torch.uint8).numpy().tobytes()
