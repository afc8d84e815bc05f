"""Extracting: a fully fine-tuned model, such as the ESD authors' released weights, as an eraser."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from esd_lora.bases.stored import EMA, Stored, StoredFile, bare_names, find_layers, only_layers, open_stored, read_layer
from esd_lora.erasers.eraser import Eraser, LoraPair, hash_weight
from esd_lora.erasers.header import ErasedConcept, EraserHeader, Origin
from esd_lora.erasers.tensor_files import DTYPES, read_header, read_rows, read_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.families.layer_names import Place, places_in
from esd_lora.files import PICKLES, hash_file


class Extracted(NamedTuple):
    """An extracted eraser and how much of the difference is in it."""

    eraser: Eraser
    energy: dict[str, float]
    """Layer to the share of the difference's squared norm that is kept."""
    overall: float
    """The same over all layers together."""
    beyond: dict[str, float]
    """What differs and no LoRA can hold (biases, norms), to the difference's norm relative to the base's."""


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    concepts: Sequence[str] = (),
    progress: bool = True,
) -> Extracted:
    """Turns the difference of two models into an eraser, by the best low-rank approximation of every layer's.

    Nothing is clamped and layers that do not differ are left out, so a merged eraser of rank r comes back whole at rank r.

    Args:
        base: The model that was fine-tuned: a built-in base, a diffusers directory, a Hub id or a single file.
        tuned: The result: the same, or a file with some of the denoiser's weights under diffusers' or the original names
            (`.safetensors`, or `.pt` read as tensors alone).
        rank: Highest rank of a layer; 4 to 64 is usual.
        energy: Share of every layer's squared norm to keep, up to 1; .9 to .99 is usual. Each layer gets the lowest rank that
            does.
        concepts: Names of what the tuned model erases; its file's name unless given.
        progress: Whether to show a progress bar.

    Raises:
        EsdLoraError: If a model cannot be read, they do not fit each other, or do not differ in any layer.
    """
    if rank is None and energy is None:
        raise EsdLoraError("extracting needs a rank or a share of energy to keep: give one.")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise EsdLoraError(f"rank {rank}, energy {energy}: expected a rank of 1 or more, and a share above 0 and up to 1.")
    stored, tuned = open_stored(base), Path(tuned)
    others, rest, files = _tuned(stored, tuned)
    found: dict[str, LoraPair] = {}
    hashes: dict[str, str] = {}
    kept: dict[str, tuple[float, float]] = {}
    layers = [module for file in stored.files for members in file.layers.values() for module, _ in members]
    compared: set[str] = set()
    for module, old in tqdm(stored.weights(), total=len(set(layers)), desc="extracting", unit="layer", disable=not progress):
        if module not in others:
            continue
        new = others[module]()
        compared.add(module)
        if old.numel() != new.numel() or len(old) != len(new):
            raise EsdLoraError(f"layer {module} has shape {list(old.shape)} in {base} and {list(new.shape)} in {tuned}.")
        difference = new.reshape(old.shape).double() - old.double()
        if not bool(difference.isfinite().all()):
            raise EsdLoraError(f"layer {module} of {tuned} or {base} holds NaN or infinity. Fetch it again.")
        if bool(difference.any()):
            found[module], kept[module] = _factors(difference, rank, energy)
            hashes[module] = hash_weight(old)
    if not found:
        what = "share no layer" if not compared else f"do not differ in any of the {len(compared)} layers they share"
        raise EsdLoraError(f"{base} and {tuned} {what}: nothing to extract. Is {base} what it was tuned from?")
    beyond = _beyond(_readers(stored.family, stored.files)[1], rest)
    if beyond:
        name = max(beyond, key=lambda name: beyond[name])
        warnings.warn(
            f"{len(beyond)} biases and norms of {tuned} differ too, which no LoRA can hold; the most, by {beyond[name]:.2%}, is"
            f" {name}. Measure what the eraser erases.",
            stacklevel=2,
        )
    overall = sum(part for part, _ in kept.values()) / sum(whole for _, whole in kept.values())
    header = EraserHeader(
        family=stored.family,
        prefix="unet" if stored.family in ("sd", "sdxl") else "transformer",
        prediction_type=stored.prediction_type,
        base=str(base),
        base_hashes=hashes,
        concepts=tuple(ErasedConcept(name=name, pairs=(), eta=None) for name in concepts or [tuned.stem]),
        objective="unknown",
        scope="unknown",
        recipes=(),
        versions={"esd-lora": version("esd-lora"), "torch": torch.__version__},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        origins=(
            Origin(
                how="extracted",
                files={file.name: hash_file(file) for file in files},
                layout=", ".join([f"rank {rank}"] * (rank is not None) + [f"energy {energy}"] * (energy is not None)),
            ),
        ),
        truncation=max(0.0, 1 - overall) ** 0.5,
    )
    return Extracted(Eraser(found, header), {m: part / whole for m, (part, whole) in kept.items()}, overall, beyond)


def _factors(difference: Tensor, rank: int | None, energy: float | None) -> tuple[LoraPair, tuple[float, float]]:
    """The best approximation at a rank (Eckart and Young, 1936); its squared norm and that of the whole.

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix; the other factor is a projection, so
    no small singular value is ever divided by.
    """
    flat = difference.flatten(1)
    wide = flat.shape[0] <= flat.shape[1]
    squares, vectors = torch.linalg.eigh(flat @ flat.T if wide else flat.T @ flat)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    whole = float(squares.sum())
    count = len(squares) if rank is None else min(rank, len(squares))
    if energy is not None:
        count = min(count, 1 + int((squares.cumsum(0) < energy * whole * (1 - 1e-12)).sum()))
    vectors = vectors[:, :count]
    up, down = (vectors, vectors.T @ flat) if wide else (flat @ vectors, vectors.T)
    tail = [1] * (difference.dim() - 2)
    pair = LoraPair(down.float().reshape(count, *difference.shape[1:]), up.float().reshape(-1, count, *tail))
    return pair, (float(squares[:count].sum()), whole)


Readers = dict[str, Callable[[], Tensor]]


def _tuned(stored: Stored, tuned: Path) -> tuple[Readers, Readers, list[Path]]:
    """How to read every layer's weight of the tuned model, and everything else in it; the files that it is read from."""
    if tuned.suffix.lower() in PICKLES:
        tensors = {name: tensor for name, tensor in read_tensors(tuned)[0].items() if tensor.is_floating_point()}
        places = find_layers(stored.family, tensors)
        layers: Readers = {
            module: lambda place=place, tensor=tensors[name]: place.reordered(
                tensor[place.rows(tensor.shape[1])], tensor.shape[1]
            )
            for name, members in places.items()
            for module, place in members
            if tensors[name].dim() in (2, 4) and not name.startswith(EMA)
        }
        others: Readers = {name: lambda tensor=tensor: tensor for name, tensor in tensors.items() if name not in places}
        return layers, _canonical(stored.family, tensors, others), [tuned]
    if tuned.suffix.lower() == ".safetensors":
        header = read_header(tuned)
        found = only_layers(StoredFile(tuned, header, find_layers(stored.family, header.tensors)))
        return *_readers(stored.family, [found]), [tuned]
    other = open_stored(tuned)
    if other.family != stored.family:
        raise EsdLoraError(f"{tuned} is of family {other.family!r}, the base of {stored.family!r}.")
    return *_readers(other.family, other.files), [file.path for file in other.files]


def _readers(family: str, files: Sequence[StoredFile]) -> tuple[Readers, Readers]:
    """How to read every layer's weight, by module path, and every other tensor, by its name in diffusers."""

    def layer(file: StoredFile, name: str, place: Place) -> Tensor:
        with file.path.open("rb") as source:
            return read_layer(source, file.header, name, place)

    def tensor(file: StoredFile, name: str) -> Tensor:
        with file.path.open("rb") as source:
            return read_rows(source, file.header, name)

    layers = {
        module: partial(layer, file, name, place)
        for file in files
        for name, members in file.layers.items()
        for module, place in members
        if not name.startswith(EMA)
    }
    others = {
        name: partial(tensor, file, name)
        for file in files
        for name, entry in file.header.tensors.items()
        if name not in file.layers and entry["dtype"] in DTYPES
    }
    return layers, _canonical(family, [name for file in files for name in file.header.tensors], others)


def _canonical(family: str, names: Collection[str], readers: Readers) -> Readers:
    """Under diffusers' names, as far as these are known; `names` are all that the model has."""
    bare = bare_names(names)
    original = {place.name: module for module, place in places_in(family, bare).items() if not place.total}
    out: Readers = {}
    for name, full in bare.items():
        if full in readers:
            module, _, kind = name.rpartition(".")
            out[f"{original.get(module, module)}.{kind}"] = readers[full]
    return out


def _beyond(ours: Readers, theirs: Readers) -> dict[str, float]:
    """What differs outside the layers' weights, to the norm of the difference relative to the base's."""
    out: dict[str, float] = {}
    for name in ours.keys() & theirs.keys():
        old, new = ours[name]().double(), theirs[name]().double()
        if old.shape == new.shape and not torch.equal(old, new):
            out[name] = float((new - old).norm() / old.norm().clamp_min(1e-12))
    return out
