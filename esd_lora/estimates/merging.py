"""What a merge takes: it reads and writes the whole base once, which the disk bounds, so copying a part of it is timed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import Strength
from esd_lora.weights.merging import prepare_merge, size_of

_COPIED = 256 * 2**20  # bytes of the base that are copied to see how fast that goes


class MergeEstimate(NamedTuple):
    """What a merge takes."""

    size: int
    """Bytes to read and to write."""
    changed: int
    """Tensors that change."""
    tensors: int
    """Tensors of the files that are written anew."""
    seconds: float
    free: int
    """Bytes that are free where the result goes."""

    def lines(self) -> list[str]:
        """Return the estimate as lines of text."""
        room = "" if self.free >= self.size else f", and {self.free / 1e9:,.2f} GB are free there: make room"
        return [
            f"{self.changed} of {self.tensors} tensors change; the others are copied",
            f"{self.size / 1e9:,.2f} GB to read and to write{room}",
            f"in all {self.seconds:,.1f} s, as fast as copying goes here; below 200 MB of memory",
        ]


def estimate_merging(
    erasers: Sequence[Eraser | str | Path],
    base: str | Path,
    out: str | Path,
    *,
    weights: Sequence[float | Strength] | None = None,
) -> MergeEstimate:
    """Return what `merge` takes; its arguments are the same. What is written to time it is gone afterwards.

    Raises:
        EsdLoraError: As `merge` does where base or erasers cannot be read or do not fit.
    """
    stored, _, stacked = prepare_merge(erasers, base, weights)
    files = stored.files_of(stacked.pairs)
    changed = sum(any(module in stacked.pairs for module, _ in members) for file in files for members in file.layers.values())
    place = next(folder for folder in Path(out).absolute().parents if folder.is_dir())
    largest = max((file.path for file in files), key=lambda path: path.stat().st_size)
    size = size_of(stored)
    return MergeEstimate(
        size=size,
        changed=changed,
        tensors=sum(len(file.header.tensors) for file in files),
        seconds=_time_copying(largest, place) * size,
        free=shutil.disk_usage(place).free,
    )


def _time_copying(file: Path, place: Path) -> float:
    """Return how long a byte takes from a file to a folder, on the disk: the better of two, as the first also reads it."""
    seconds: list[float] = []
    with tempfile.TemporaryFile(dir=place) as sink:
        for _ in range(2):
            sink.seek(0)
            started = time.monotonic()
            with file.open("rb") as source:
                copied = 0
                while copied < _COPIED and (piece := source.read(2**20)):
                    copied += sink.write(piece)
            sink.flush()
            os.fsync(sink.fileno())
            seconds.append((time.monotonic() - started) / copied)
    return min(seconds)
