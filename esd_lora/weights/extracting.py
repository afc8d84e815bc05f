"""Extracting: a fully fine-tuned model, such as the ESD authors' released weights, as an eraser."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.bars import Bar
from esd_lora.bases.stored import EMA, StoredFile, bare_names, find_layers, only_layers, open_stored
from esd_lora.erasers.eraser import Eraser, LoraPair, hash_weight
from esd_lora.erasers.header import ErasedConcept, EraserHeader, Origin
from esd_lora.erasers.stacking import check_cut, kept_rank
from esd_lora.erasers.tensor_files import DTYPES, Header, read_header, read_rows, read_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.families import ModelFamily
from esd_lora.families.layer_names import OriginalLayer
from esd_lora.files import PICKLES, hash_file

_ROUNDING = 1e-12  # share of the squared norm, in eigenvalues of a Gram matrix in float64


class Extracted(NamedTuple):
    """An extracted eraser and how much of the difference is in it."""

    eraser: Eraser
    energy: dict[str, float]
    """Layer to the share of the difference's squared norm that is kept."""
    overall: float
    """The same over all layers together."""
    beyond: dict[str, float]
    """Biases and norms that differ, which no LoRA can hold, to the difference's norm relative to the base's."""


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    concepts: Sequence[str] = (),
    progress: bool = True,
) -> Extracted:
    """Turn the difference of two models into an eraser, by the best low-rank approximation of every layer's.

    Nothing is clamped and layers that do not differ are left out, so a merged eraser of rank r comes back whole at rank r. What
    rounding to another dtype makes of a tensor is no difference.

    Args:
        base: The model that was fine-tuned: a built-in base, a diffusers directory, a Hub id or a single file.
        tuned: The result: the same, or a file with some of the denoiser's weights under diffusers' or the original names
            (`.safetensors`, or `.pt` read as tensors alone).
        rank: Highest rank of a layer; 4 to 64 is usual.
        energy: Share of every layer's squared norm to keep, up to 1; .9 to .99 is usual. Each layer gets the lowest rank that
            does.
        concepts: Names of what the tuned model erases; by default its file's name.
        progress: Whether to show a progress bar.

    Raises:
        EsdLoraError: If a model cannot be read, they do not fit each other, or do not differ in any layer.
    """
    if rank is None and energy is None:
        raise EsdLoraError("extracting needs a rank or a share of energy to keep: give one.")
    check_cut(rank, energy)
    stored, tuned = open_stored(base), Path(tuned)
    result, files, layout = _open_tuned(stored.family, tuned)
    pairs: dict[str, LoraPair] = {}
    hashes: dict[str, str] = {}
    kept: dict[str, tuple[float, float]] = {}
    layers = {module for file in stored.files for members in file.layers.values() for module, _ in members}
    compared: set[str] = set()
    for module, old in Bar(stored.weights(), total=len(layers), desc="extracting", unit="layer", disable=not progress):
        if module not in result.layers:
            continue
        new = result.layers[module]()
        compared.add(module)
        if old.numel() != new.numel() or len(old) != len(new):
            raise EsdLoraError(f"layer {module} has shape {list(old.shape)} in {base} and {list(new.shape)} in {tuned}.")
        new = new.reshape(old.shape)
        difference = new.double() - old.double()
        if not bool(difference.isfinite().all()):
            raise EsdLoraError(f"layer {module} of {tuned} or {base} holds NaN or infinity. Fetch it again.")
        if _differs(old, new):
            pairs[module], kept[module] = _approximate(difference, rank, energy)
            hashes[module] = hash_weight(old)
    if not pairs:
        what = "share no layer" if not compared else f"do not differ in any of the {len(compared)} layers they share"
        raise EsdLoraError(f"{base} and {tuned} {what}: nothing to extract. Is {base} what it was tuned from?")
    beyond = _differences(_open_denoiser(stored.family, stored.files).others, result.others)
    if beyond:
        name = max(beyond, key=lambda name: beyond[name])
        warnings.warn(
            f"{len(beyond)} biases and norms of {tuned} differ too, which no LoRA can hold; the most, by {beyond[name]:.2%}, is"
            f" {name}. Measure what the eraser erases.",
            stacklevel=2,
        )
    overall = sum(part for part, _ in kept.values()) / sum(whole for _, whole in kept.values())
    read_from = {file.name: hash_file(file) for file in files}
    header = EraserHeader(
        family=stored.family.name,
        prefix=stored.family.denoiser,
        prediction_type=stored.prediction_type,
        base=str(base),
        base_hashes=hashes,
        concepts=tuple(ErasedConcept(name=name, pairs=(), eta=None) for name in concepts or [tuned.stem]),
        objective="unknown",
        scope="unknown",
        recipes=(),
        versions={"esd-lora": version("esd-lora"), "torch": torch.__version__},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        origins=(Origin(how="extracted", files=read_from, layout=layout, rank=rank, energy=energy),),
        truncation=max(0.0, 1 - overall) ** 0.5,
    )
    return Extracted(Eraser(pairs, header), {m: part / whole for m, (part, whole) in kept.items()}, overall, beyond)


def _differs(old: Tensor, new: Tensor) -> bool:
    """Return whether two tensors are neither the same nor one of them the other in a coarser dtype.

    Where they differ by more, their difference is taken as it stands: to round the finer one first would add its error.
    """
    return not (torch.equal(old.to(new.dtype), new) or torch.equal(new.to(old.dtype), old))


def _approximate(difference: Tensor, rank: int | None, energy: float | None) -> tuple[LoraPair, tuple[float, float]]:
    """Return the best approximation at a rank (Eckart and Young, 1936); its squared norm and that of the whole.

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix; the other factor is a projection, so
    no small singular value is ever divided by.
    """
    flat = difference.flatten(1)
    wide = flat.shape[0] <= flat.shape[1]
    squares, vectors = torch.linalg.eigh(flat @ flat.T if wide else flat.T @ flat)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    count = kept_rank(squares, rank, energy, rounding=_ROUNDING)
    vectors = vectors[:, :count]
    up, down = (vectors, vectors.T @ flat) if wide else (flat @ vectors, vectors.T)
    tail = [1] * (difference.dim() - 2)
    pair = LoraPair(down.float().reshape(count, *difference.shape[1:]), up.float().reshape(-1, count, *tail))
    return pair, (float(squares[:count].sum()), float(squares.sum()))


class _Denoiser(NamedTuple):
    """A denoiser on disk, or a part of one, whose tensors are read one at a time."""

    layers: dict[str, Callable[[], Tensor]]
    """Module path to the weight of a linear or convolution, in diffusers' order."""
    others: dict[str, Callable[[], Tensor]]
    """Name in diffusers, as far as it is known, to every other tensor: biases, norms."""


def _open_tuned(family: ModelFamily, tuned: Path) -> tuple[_Denoiser, list[Path], str]:
    """Return the tuned model's denoiser, the files it is read from, and their layout."""
    if tuned.suffix.lower() in PICKLES:
        tensors = {name: tensor for name, tensor in read_tensors(tuned)[0].items() if tensor.is_floating_point()}
        entries = {name: {"dtype": "F32", "shape": list(tensor.shape)} for name, tensor in tensors.items()}  # or any other
        file = only_layers(StoredFile(tuned, Header(entries, {}, 0), find_layers(family, tensors)))
        return _open_denoiser(family, [file], lambda _, name, rows: tensors[name][rows]), [tuned], "pickle"
    if tuned.suffix.lower() == ".safetensors":
        header = read_header(tuned)
        file = only_layers(StoredFile(tuned, header, find_layers(family, header.tensors)))
        return _open_denoiser(family, [file]), [tuned], "safetensors"
    stored = open_stored(tuned)
    if stored.family is not family:
        raise EsdLoraError(f"{tuned} is of family {stored.family.name!r}, the base of {family.name!r}.")
    return _open_denoiser(family, stored.files), [file.path for file in stored.files], "directory"


def _read_stored(file: StoredFile, name: str, rows: slice) -> Tensor:
    with file.path.open("rb") as source:
        return read_rows(source, file.header, name, rows)


def _open_denoiser(
    family: ModelFamily, files: Sequence[StoredFile], read: Callable[[StoredFile, str, slice], Tensor] = _read_stored
) -> _Denoiser:
    """Return the denoiser in some files; `read` gives rows of one tensor by name."""

    def read_layer(file: StoredFile, name: str, place: OriginalLayer) -> Tensor:
        inputs = file.header.tensors[name]["shape"][1]
        return place.reordered(read(file, name, place.rows(inputs)), inputs)

    layers = {
        module: partial(read_layer, file, name, place)
        for file in files
        for name, members in file.layers.items()
        for module, place in members
        if not name.startswith(EMA)
    }
    files_of = {name: file for file in files for name in file.header.tensors}
    bare = bare_names(files_of)
    modules = {place.name: module for module, place in family.original_layers(bare).items() if not place.total}
    others: dict[str, Callable[[], Tensor]] = {}
    for name, full in bare.items():
        file = files_of[full]
        if full not in file.layers and file.header.tensors[full]["dtype"] in DTYPES:
            original, _, kind = name.rpartition(".")
            others[f"{modules.get(original, original)}.{kind}"] = partial(read, file, full, slice(None))
    return _Denoiser(layers, others)


def _differences(old: Mapping[str, Callable[[], Tensor]], new: Mapping[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Return the tensors that differ, to the norm of the difference relative to the old one's."""
    out: dict[str, float] = {}
    for name in (name for name in old if name in new):
        before, after = old[name](), new[name]()
        if before.shape == after.shape and _differs(before, after):
            norm = before.double().norm().clamp_min(1e-12)
            out[name] = float((after.double() - before.double()).norm() / norm)
    return out
