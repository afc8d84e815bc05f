"""Proving a merge: read both bases again and compare every tensor with what it has to be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from esd_lora.bases.stored import WEIGHTS, Stored, StoredFile, open_stored
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.stacking import Strength, stack
from esd_lora.erasers.tensor_files import DTYPES, Header, all_finite, read_rows
from esd_lora.errors import EsdLoraError
from esd_lora.families.layer_names import OriginalLayer
from esd_lora.files import hash_folder
from esd_lora.formats.opening import open_eraser
from esd_lora.progress import advance, stage

_VALUES = 2**20  # compared at once


class Verified(NamedTuple):
    """The result of comparing every tensor of a merged base with the base's."""

    touched: int
    """Number of tensors that are the base's plus the update, to within the rounding of their dtype."""
    untouched: int
    """Number of tensors that are the base's bit for bit."""
    worst: float
    """Largest distance of a touched value from base + update, in units of the dtype's spacing there; up to .5 is rounding."""


def verify(
    merged: str | Path,
    base: str | Path,
    erasers: Sequence[Eraser | str | Path],
    *,
    weights: Sequence[float | Strength] | None = None,
) -> Verified:
    """Prove that a merged base is the base plus the erasers' updates, and nothing else.

    The sum is made anew in float64, from the updates multiplied out; a stored value may differ from it by what rounding to
    its dtype, and summing in float32, cost.

    Args:
        merged: Directory or file that `merging.merge` wrote.
        base: Base that it read.
        erasers: Erasers or their paths, as they were merged.
        weights: Their strengths, as they were merged.

    Raises:
        EsdLoraError: With the first tensor or file that is not what it has to be.
    """
    before, after = open_stored(base), open_stored(merged)
    stacked = stack([open_eraser(eraser, before.family.name) for eraser in erasers], weights)
    _check_files(before, after, stacked)
    worst: list[float] = []
    untouched = 0
    files = before.files_of(stacked.pairs)
    with stage("verifying", sum(map(_size, files)), "B"):
        for old, new in zip(files, after.files_of(stacked.pairs), strict=True):
            if _shapes(old.header) != _shapes(new.header):
                raise EsdLoraError(f"{new.path} has other tensors than {old.path}. Merge again.")
            compared = _compare(old, new, stacked)
            worst += compared
            untouched += len(old.header.tensors) - len(compared)
    return Verified(len(worst), untouched, max(worst, default=0.0))


def _compare(old: StoredFile, new: StoredFile, stacked: Eraser) -> list[float]:
    """Return how far every touched tensor of a file is from what it has to be, as `_distance` measures it."""
    worst: list[float] = []
    with old.path.open("rb") as source, new.path.open("rb") as result:
        for name in old.header.tensors:
            members = [(stacked.pairs[m], place) for m, place in old.layers.get(name, ()) if m in stacked.pairs]
            if members:
                worst.append(_distance(source, old.header, result, new.header, name, members))
                if worst[-1] > 0.5 + 1e-6:
                    raise EsdLoraError(f"{new.path}: {name} is not {old.path} plus the erasers' update there. Merge again.")
            elif not _same_bytes(source, old.header, result, new.header, name):
                raise EsdLoraError(f"{new.path}: {name} differs from {old.path}, and no eraser touches it. Merge again.")
            advance(_span(old.header, name))
    return worst


def _span(header: Header, name: str) -> int:
    """Return the bytes of a tensor."""
    begin, end = header.tensors[name]["data_offsets"]
    return end - begin


def _size(file: StoredFile) -> int:
    """Return the bytes of all tensors of a file."""
    return sum(_span(file.header, name) for name in file.header.tensors)


def _check_files(before: Stored, after: Stored, stacked: Eraser) -> None:
    """Refuse another layout, and differences outside of the weights that are merged."""
    if before.denoiser and after.denoiser:
        paths = [[file.path for file in stored.files_of(stacked.pairs)] for stored in (before, after)]
        folders = [{path.parent for path in files} for files in paths]
        left_out = ([path for d in merged for path in d.iterdir() if path.suffix in WEIGHTS] for merged in folders)
        old, new = (hash_folder(stored.path, left) for stored, left in zip((before, after), left_out, strict=True))
        strange = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        first, second = ([(path.parent.name, path.name) for path in files] for files in paths)
        if first != second:
            strange = [f"what files {' and '.join(sorted({name for name, _ in {*first} ^ {*second}}))} has"]
        if strange:
            raise EsdLoraError(f"{after.path} is not {before.path} plus the erasers: {strange[0]} differs. Merge again.")
    elif before.denoiser or after.denoiser:
        raise EsdLoraError(f"{before.path} and {after.path} are not of one layout: one is a directory, the other a file.")


def _distance(
    source: BinaryIO, old: Header, result: BinaryIO, new: Header, name: str, members: Sequence[tuple[LoraPair, OriginalLayer]]
) -> float:
    """Return how far a tensor's values are from base + updates at most, beyond float32's own error, in its dtype's spacings."""
    rows, inputs = old.tensors[name]["shape"][:2]
    info = torch.finfo(DTYPES[old.tensors[name]["dtype"]])
    step = max(1, _VALUES * rows // torch.Size(old.tensors[name]["shape"]).numel())
    worst = 0.0
    for first in range(0, rows, step):
        block = slice(first, min(first + step, rows))
        expected = read_rows(source, old, name, block).flatten(1).double()
        base_finite = all_finite(expected)
        slack = expected.abs()
        for pair, place in members:
            up, down = place.reordered(pair.up.flatten(1).double(), inputs), pair.down.flatten(1).double()
            start = place.rows(inputs).start or 0
            a, b = max(block.start, start), min(block.stop, start + len(up))
            if a < b:
                part = up[a - start : b - start]
                expected[a - first : b - first] += part @ down
                slack[a - first : b - first] += part.abs() @ down.abs()
        actual = read_rows(result, new, name, block).flatten(1).double()
        if not all_finite(actual):
            raise EsdLoraError(f"{result.name}: {name} holds NaN or infinity: {_cause(base_finite, expected, info)}")
        beyond = (actual - expected).abs() - 4 * torch.finfo(torch.float32).eps * slack
        spacing = expected.abs().clamp_min(info.tiny) * info.eps
        worst = max(worst, float((beyond.clamp_min(0) / spacing).nan_to_num(nan=torch.inf).max()))
    return worst


def _cause(base_finite: bool, expected: Tensor, info: torch.finfo) -> str:
    """Return why a merged tensor holds NaN or infinity, in the end of a sentence, and what to do.

    Args:
        base_finite: Whether the base's own values are finite.
        expected: Base + update, in float64.
        info: Of the type it is stored in.
    """
    if not base_finite:
        return "so does the base there. Fetch the base again."
    largest = float(expected.abs().max())
    if largest > info.max:
        end = f"{info.dtype}, which ends at {info.max:g}"
        return f"base + update reaches {largest:.3g}, and it is stored as {end}. Merge at a lower strength, or a float32 base."
    return "base + update does not. Merge again."


def _shapes(header: Header) -> dict[str, tuple[str, list[int]]]:
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.tensors.items()}


def _same_bytes(a: BinaryIO, header_a: Header, b: BinaryIO, header_b: Header, name: str) -> bool:
    """Return whether both files hold the tensor bit for bit, compared piece by piece."""
    begin, end = header_a.tensors[name]["data_offsets"]
    a.seek(header_a.start + begin)
    b.seek(header_b.start + header_b.tensors[name]["data_offsets"][0])
    left = end - begin
    while left:
        size = min(left, _VALUES)
        if a.read(size) != b.read(size):
            return False
        left -= size
    return True
