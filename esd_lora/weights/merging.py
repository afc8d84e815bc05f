"""Merging erasers into a base for good: a new diffusers directory or single-file checkpoint, written tensor by tensor."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from esd_lora.bars import Bar
from esd_lora.bases.stored import WEIGHTS, Stored, open_stored
from esd_lora.erasers.eraser import Eraser, hash_weight
from esd_lora.erasers.fitting import check_kind, compare_weights
from esd_lora.erasers.privacy import scrub, without_folders
from esd_lora.erasers.stacking import Strength, stack, strengths_of
from esd_lora.erasers.tensor_files import hash_tensors, read_header
from esd_lora.errors import EsdLoraError
from esd_lora.families import read_components
from esd_lora.files import replaced_file, reporting_write_errors, reserve_directory, reserve_file, staged_directory
from esd_lora.formats.opening import open_eraser
from esd_lora.progress import advance, stage
from esd_lora.weights.streaming import write_merged

_COMPARED = 64 * 2**20
"""Most values of the base that are hashed: all of cross-attention in Stable Diffusion."""


def merge(
    erasers: Sequence[Eraser | str | Path],
    base: str | Path,
    out: str | Path,
    *,
    weights: Sequence[float | Strength] | None = None,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Add erasers to a base's weights and write the result in the base's own layout.

    Sums are made in float32 and rounded once, to the dtype the base is stored in. Untouched tensors are copied byte for
    byte, averaged (EMA) copies of the denoiser are merged too. The output appears whole, by a rename, or not at all; the
    input is only read. Memory stays below a few hundred megabytes whatever the size of the base.

    Args:
        erasers: Erasers or their paths.
        base: A built-in base, a local diffusers directory, a Hub id, or a single-file `.safetensors` checkpoint.
        out: Directory to make; for a single-file base, the file.
        weights: Strength of each eraser, 1 by default; -1 takes a merged eraser out again, within rounding.
        force: Replace a merged base that is already at `out`.
        progress: Whether to show a progress bar.

    Returns:
        `out`.

    Raises:
        EsdLoraError: If base or erasers cannot be read or do not fit, or `out` exists, is the base itself, or cannot be
            written.
    """
    out = Path(out)
    stored, members, stacked = prepare_merge(erasers, base, weights)
    _check_place(stored, out)
    entry = {
        "base": without_folders(str(base)),
        "erasers": [_entry(*pair) for pair in zip(members, strengths_of(members, weights), strict=True)],
    }
    size = size_of(stored)
    read = [stored.path, *(eraser for eraser in erasers if not isinstance(eraser, Eraser))]
    with (reserve_directory if stored.denoiser else reserve_file)(out, force, read), reporting_write_errors(out):
        _check_replaced(stored, out)
        if (free := shutil.disk_usage(out.parent).free) < size:
            raise EsdLoraError(f"output {out} needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there. Make room.")
        total = sum(file.path.stat().st_size for file in stored.files_of(stacked.pairs))
        with Bar(total=total, unit="B", unit_scale=True, desc="merging", disable=not progress) as bar:
            (_write_directory if stored.denoiser else _write_file)(stored, stacked, out, entry, bar)
    return out


def prepare_merge(
    erasers: Sequence[Eraser | str | Path], base: str | Path, weights: Sequence[float | Strength] | None = None
) -> tuple[Stored, list[Eraser], Eraser]:
    """Return the base as it is stored, the erasers, and their stack, which fits it.

    Args:
        erasers: As in `merge`.
        base: As in `merge`.
        weights: As in `merge`.

    Raises:
        EsdLoraError: If base or erasers cannot be read or do not fit.
    """
    stored = open_stored(base)
    members = [open_eraser(eraser, stored.family.name) for eraser in erasers]
    stacked = stack(members, weights)
    _check_fit(stored, stacked, str(base))
    compared, hashes = _compared(stacked), dict[str, str]()
    with stage("comparing the base with what it was trained on", len(compared), "layer"):
        for module, weight in stored.weights(compared):
            hashes[module] = hash_weight(weight)
            advance()
    compare_weights(stacked, hashes, str(base))
    return stored, members, stacked


def size_of(stored: Stored) -> int:
    """Return the bytes of a base, and so of what it is merged into."""
    return sum(file.stat().st_size for file in stored.path.rglob("*")) if stored.denoiser else stored.path.stat().st_size


def _entry(eraser: Eraser, strength: Strength) -> dict[str, Any]:
    """Return what the merged file says about one eraser."""
    header = eraser.header
    return {
        "concepts": [concept.model_dump(mode="json") for concept in header.concepts],
        "weight": strength.weight,
        "blocks": dict(strength.blocks),
        "sha256": hash_tensors(eraser.state_dict()),
        "created": header.created,
        "recipes": scrub([recipe.model_dump(mode="json") for recipe in header.recipes]),
    }


def _check_fit(stored: Stored, stacked: Eraser, base: str) -> None:
    """Refuse erasers of another kind of model, and layers that the base lacks or has in another shape."""
    check_kind(stacked, stored.family.name, stored.prediction_type, base)
    left = set(stacked.pairs)
    for file in stored.files_of(stacked.pairs):
        for name, members in file.layers.items():
            shape = file.header.tensors[name]["shape"]
            for module, place in members:
                pair = stacked.pairs.get(module)
                if not pair:
                    continue
                left.discard(module)
                rows = len(range(*place.rows(shape[1]).indices(shape[0])))
                # A linear layer and a convolution of one pixel hold the same numbers.
                if (rows, *(n for n in shape[1:] if n != 1)) != (pair.shape[0], *(n for n in pair.shape[1:] if n != 1)):
                    raise EsdLoraError(
                        f"base layer {name} has shape {shape}, the eraser changes one of {list(pair.shape)}: it was made for"
                        " another model."
                    )
    if left:
        raise EsdLoraError(
            f"base {base!r} has no layer {min(left)} in floating point: the eraser was made for another model, or the base is"
            " quantised."
        )


def _compared(stacked: Eraser) -> list[str]:
    """Return the layers that are hashed: the smallest, which are most of them."""
    sizes = {module: math.prod(pair.shape) for module, pair in stacked.pairs.items()}
    smallest = sorted(sizes, key=lambda module: sizes[module])
    totals = accumulate(sizes[module] for module in smallest)
    return [module for module, total in zip(smallest, totals, strict=True) if total <= _COMPARED] or smallest[:1]


def _check_place(stored: Stored, out: Path) -> None:
    """Refuse an output that is the base or lies in it, or has the name of another layout."""
    if stored.denoiser and stored.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise EsdLoraError(f"output {out} is inside the base itself. The base is never written to; choose another place.")
    if out.exists() and out.samefile(stored.path):
        raise EsdLoraError(f"output {out} is the base itself. The base is never written to; choose another place.")
    if stored.denoiser and out.suffix == ".safetensors":
        raise EsdLoraError(f"output {out} is named like a file, and the base is a diffusers directory: so is what comes out.")
    if not stored.denoiser and out.suffix != ".safetensors":
        raise EsdLoraError(
            f"output {out}: the base is one file, and so is what comes out. Give a name that ends in .safetensors."
        )


def _check_replaced(stored: Stored, out: Path) -> None:
    """Refuse to replace anything but a pipeline or checkpoint, or more than that."""
    if out.is_file():
        read_header(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / "model_index.json").is_file():
        raise EsdLoraError(f"output {out} is not a diffusers directory, so --force does not replace it. Choose another.")
    known = {path.name for path in stored.path.iterdir()} | {"model_index.json", *read_components(out / "model_index.json")}
    if strange := sorted(path.name for path in out.iterdir() if path.name not in known):
        raise EsdLoraError(f"output {out} holds {strange[0]}, which is no part of a pipeline and would be lost. Move it first.")


def _write_file(stored: Stored, stacked: Eraser, out: Path, entry: Mapping[str, Any], bar: Bar) -> None:
    with replaced_file(out) as partial:
        write_merged(stored.files[0], stacked, partial, entry, bar)


def _write_directory(stored: Stored, stacked: Eraser, out: Path, entry: Mapping[str, Any], bar: Bar) -> None:
    files = stored.files_of(stacked.pairs)
    merged = {file.path.parent for file in files}

    def left_out(folder: str, names: list[str]) -> list[str]:
        # Merged weights are written anew, and other formats would bring the concept back.
        return [n for n in names if Path(folder) in merged and Path(n).suffix in WEIGHTS]

    with staged_directory(out, None) as folder:
        with stage("copying what is not merged"):
            shutil.copytree(stored.path, folder, dirs_exist_ok=True, ignore=left_out)
        folder.chmod(0o755)
        for file in files:
            write_merged(file, stacked, folder / file.path.parent.name / file.path.name, entry, bar)
