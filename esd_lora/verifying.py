"""Proving a merge: read both bases again and compare every tensor with what it has to be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from esd_lora.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.families.stored import open_stored
from esd_lora.manifests import load_eraser
from esd_lora.outputs import hash_folder
from esd_lora.stacking import Strength, stack
from esd_lora.tensor_files import DTYPES, Header, read_rows

_VALUES = 4 * 2**20  # compared at once


class Verified(NamedTuple):
    """What was compared."""

    touched: int
    """Tensors that are the base's plus the update, to within the rounding of their dtype."""
    untouched: int
    """Tensors that are the base's bit for bit."""
    worst: float
    """Largest distance of a touched value from base + update, in units of the dtype's spacing there; up to .5 is rounding."""


def verify(
    merged: str | Path,
    base: str | Path,
    erasers: Sequence[Eraser | str | Path],
    *,
    weights: Sequence[float | Strength] | None = None,
) -> Verified:
    """Proves that a merged base is the base plus the erasers' updates, and nothing else.

    The sum is made anew in float64, from the updates multiplied out; a stored value may differ from it by what rounding to
    its dtype, and summing in float32, cost.

    Args:
        merged: What `merging.merge` wrote.
        base: What it read.
        erasers: Erasers or their paths, as they were merged.
        weights: Their strengths, as they were merged.

    Raises:
        EsdLoraError: With the first tensor or file that is not what it has to be.
    """
    before, after = open_stored(base), open_stored(merged)
    stacked = stack([e if isinstance(e, Eraser) else load_eraser(e) for e in erasers], weights)
    if before.denoiser and after.denoiser:
        ours, theirs = (hash_folder(s.path, leave_out=s.denoiser) for s in (after, before))
        if strange := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
            raise EsdLoraError(f"{merged} is not {base} plus the erasers: {strange[0]} differs. Merge again.")
    touched = untouched = 0
    worst = 0.0
    for old, new in zip(before.files, after.files, strict=True):
        if _shapes(old.header) != _shapes(new.header):
            raise EsdLoraError(f"{new.path} has other tensors than {old.path}. Merge again.")
        with old.path.open("rb") as source, new.path.open("rb") as result:
            for name, entry in old.header.tensors.items():
                members = [(p, stacked.pairs[m]) for m, p in old.layers.get(name, ()) if m in stacked.pairs]
                if not members:
                    untouched += 1
                    if not _same_bytes(source, old.header, result, new.header, name):
                        raise EsdLoraError(
                            f"{new.path}: {name} differs from {old.path}, and no eraser touches it. Merge again."
                        )
                    continue
                touched += 1
                shape = entry["shape"]
                step = max(1, _VALUES * shape[0] // torch.Size(shape).numel())
                for first in range(0, shape[0], step):
                    rows = slice(first, min(first + step, shape[0]))
                    expected = read_rows(source, old.header, name, rows).flatten(1).double()
                    slack = expected.abs()
                    for place, pair in members:
                        start = place.rows(shape[1]).start or 0
                        up = place.reordered(pair.up.flatten(1).double(), shape[1])
                        a, b = max(rows.start, start), min(rows.stop, start + len(up))
                        if a < b:
                            factors = up[a - start : b - start], pair.down.flatten(1).double()
                            expected[a - first : b - first] += factors[0] @ factors[1]
                            slack[a - first : b - first] += factors[0].abs() @ factors[1].abs()
                    found = read_rows(result, new.header, name, rows).flatten(1).double()
                    spacing = (
                        expected.abs() * torch.finfo(DTYPES[entry["dtype"]]).eps + torch.finfo(DTYPES[entry["dtype"]]).tiny
                    )
                    off = ((found - expected).abs() - 4 * torch.finfo(torch.float32).eps * slack).clamp_min(0) / spacing
                    worst = max(worst, float(off.max()))
                    if worst > 0.5 + 1e-6:
                        raise EsdLoraError(f"{new.path}: {name} is not {old.path} plus the erasers' update there. Merge again.")
    return Verified(touched, untouched, worst)


def _shapes(header: Header) -> dict[str, tuple[str, list[int]]]:
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.tensors.items()}


def _same_bytes(a, header_a: Header, b, header_b: Header, name: str) -> bool:
    """Whether both files hold the tensor bit for bit, compared piece by piece."""
    begin, end = header_a.tensors[name]["data_offsets"]
    a.seek(header_a.start + begin)
    b.seek(header_b.start + header_b.tensors[name]["data_offsets"][0])
    left = end - begin
    while left:
        size = min(left, 4 * _VALUES)
        if a.read(size) != b.read(size):
            return False
        left -= size
    return True
