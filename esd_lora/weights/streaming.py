"""One merged safetensors file: written in pieces that stay in the processor's cache, several tensors at a time."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from esd_lora.bases.stored import StoredFile
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.tensor_files import DTYPES, Header, all_finite
from esd_lora.errors import EsdLoraError
from esd_lora.families.layer_names import OriginalLayer

MERGED_KEY = "esd_lora_merged"
"""Metadata of a merged file: a JSON list of what was merged into it, the latest last."""
_PIECE = 2**20  # bytes; four times as many made copying four times as slow, once they fell out of the cache
_NOT_BY_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # two file systems, or one that cannot
_FOLIO = 128 * 2**10  # bytes that Linux reads ahead, and keeps and copies as one
_TURN = 8 * 2**20  # bytes, of folios, that the kernel copies before another thread may write
_RUN = 64 * 2**20  # bytes of untouched tensors that one thread copies in a go
_FLUSHED = 256 * 2**20  # bytes after which the disk may begin, while further ones are written


class Bar(Protocol):
    """A progress bar, such as tqdm's."""

    def update(self, n: float) -> object: ...


def write_merged(file: StoredFile, stacked: Eraser, target: Path, provenance: Mapping[str, Any], bar: Bar) -> None:
    """Write a merged safetensors file: the old one's tensors at the old offsets, the stack's updates added.

    A safetensors file is an 8-byte little-endian length, a JSON header of that length, then the tensors' bytes at the
    offsets the header gives. Shapes and dtypes stay, so offsets stay too; only the metadata grows.

    Args:
        file: File of the base.
        stacked: Stack whose layers fit the file's.
        target: File to write; whatever it holds is lost.
        provenance: Added to the metadata.
        bar: Updated with every byte of the tensors.

    Raises:
        OSError: If the system does not let it.
        EsdLoraError: If a tensor would hold NaN or infinity.
    """
    metadata = {**file.header.metadata, MERGED_KEY: json.dumps([*merged_before(file.header), provenance])}
    text = json.dumps({"__metadata__": metadata, **file.header.tensors}, separators=(",", ":")).encode()
    # Tensors keep their place within what the kernel copies as one; elsewhere within it, copying took half as long again.
    text += b" " * ((file.header.start - 8 - len(text)) % _FOLIO)
    start = 8 + len(text)
    with target.open("wb") as sink:
        sink.write(struct.pack("<Q", len(text)) + text)
        sink.truncate(start + max((end for _, _, end in _tensors(file)), default=0))

    # One thread writes at a time: two that wait for each other in the kernel took twice as long, while one computes anyway.
    turn = Lock()
    unflushed = 0

    def write(part: tuple[str, int, int]) -> None:
        nonlocal unflushed
        name, begin, end = part
        with file.path.open("rb", buffering=0) as source, target.open("r+b", buffering=0) as sink:
            source.seek(file.header.start + begin)
            sink.seek(start + begin)
            if name:
                _add(file, name, stacked, source, sink, turn)
            else:
                _copy(source, sink, end - begin, turn)
            with turn:
                unflushed += end - begin
                due = unflushed >= _FLUSHED
                unflushed = 0 if due else unflushed
            if due:  # the others go on meanwhile, and less is left for the end
                os.fsync(sink.fileno())
        bar.update(end - begin)

    # Pieces are too small to be shared out further by torch.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for _ in threads.map(write, _parts(file, stacked)):
            pass  # raises what one of them raised


def merged_before(header: Header) -> list[dict[str, Any]]:
    """Return what was merged into a file before, as it says itself."""
    try:
        merged = json.loads(header.metadata.get(MERGED_KEY, "[]"))
    except (ValueError, RecursionError):
        return []
    return merged if isinstance(merged, list) else []


def _tensors(file: StoredFile) -> list[tuple[str, int, int]]:
    """Return name, first and last byte of every tensor, in their order in the file."""
    tensors = [(name, *entry["data_offsets"]) for name, entry in file.header.tensors.items()]
    return sorted(tensors, key=lambda tensor: tensor[1])


def _parts(file: StoredFile, stacked: Eraser) -> Iterator[tuple[str, int, int]]:
    """Yield touched tensors one by one, the others joined to runs without a name."""
    touched = {name for name, members in file.layers.items() if any(module in stacked.pairs for module, _ in members)}
    begun = last = 0
    for name, begin, end in _tensors(file):
        if name in touched or end - begun > _RUN:
            if begin > begun:
                yield "", begun, begin
            begun = begin
        if name in touched:
            yield name, begin, end
            begun = end
        last = end
    if last > begun:
        yield "", begun, last


def _copy(source: BinaryIO, sink: BinaryIO, length: int, turn: Lock) -> None:
    """Copy from where one file stands to where the other does, inside the kernel where it can."""
    while length and hasattr(os, "copy_file_range"):
        try:
            with turn:
                count = os.copy_file_range(source.fileno(), sink.fileno(), min(length, _TURN - source.tell() % _TURN))
        except OSError as error:
            if error.errno in _NOT_BY_KERNEL:
                break
            raise
        if not count:
            raise OSError(f"{source.name} became shorter while it was read")
        length -= count
    buffer = memoryview(bytearray(_PIECE))
    while length:
        piece = buffer[: min(length, _PIECE)]
        _read(source, piece)
        _write(sink, piece, turn)
        length -= len(piece)


def _read(source: BinaryIO, piece: memoryview) -> None:
    """Fill the piece; the system may give less at a time."""
    done = 0
    while done < len(piece):
        count: int = source.readinto(piece[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{source.name} became shorter while it was read")
        done += count


def _write(sink: BinaryIO, piece: memoryview, turn: Lock) -> None:
    done = 0
    while done < len(piece):
        with turn:
            done += sink.write(piece[done:])


class _Addition(NamedTuple):
    """An update that goes onto some rows of a stored tensor."""

    first: int
    """First of the rows."""
    up: Tensor
    down: Tensor

    @classmethod
    def at(cls, place: OriginalLayer, pair: LoraPair, inputs: int, dtype: torch.dtype) -> _Addition:
        up = place.reordered(pair.up.flatten(1), inputs)
        return cls(place.rows(inputs).start or 0, up.to(dtype), pair.down.flatten(1).to(dtype))

    def apply(self, block: Tensor, first: int) -> None:
        """Add to a block of the tensor's rows, from row `first` on, as far as the update reaches there."""
        a, b = max(first, self.first), min(first + len(block), self.first + len(self.up))
        if a < b:
            block[a - first : b - first].addmm_(self.up[a - self.first : b - self.first], self.down)


def _add(file: StoredFile, name: str, stacked: Eraser, source: BinaryIO, sink: BinaryIO, turn: Lock) -> None:
    """Write one touched tensor, some rows at a time: summed in float32 or better, rounded once.

    Raises:
        EsdLoraError: If it would hold NaN or infinity, with the cause.
    """
    entry = file.header.tensors[name]
    dtype, rows, inputs = DTYPES[entry["dtype"]], *entry["shape"][:2]
    width = torch.Size(entry["shape"][1:]).numel()
    precise = torch.promote_types(dtype, torch.float32)
    members = [(place, pair) for module, place in file.layers[name] if (pair := stacked.pairs.get(module))]
    additions = [_Addition.at(place, pair, inputs, precise) for place, pair in members]
    step = min(rows, max(1, _PIECE // (width * dtype.itemsize)))
    buffer = bytearray(step * width * dtype.itemsize)
    stored = torch.frombuffer(buffer, dtype=dtype).reshape(step, width)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        piece = memoryview(buffer)[: count * width * dtype.itemsize]
        _read(source, piece)
        block = stored[:count].to(precise)  # the stored one itself if that is its dtype
        for addition in additions:
            addition.apply(block, first)
        if block.dtype != dtype:
            stored[:count].copy_(block)
        if not all_finite(stored[:count]):
            rounded = all_finite(block)
            source.seek(-len(piece), os.SEEK_CUR)
            _read(source, piece)
            raise EsdLoraError(f"{file.path}: {name} {_overflow(dtype, base=all_finite(stored[:count]), total=rounded)}")
        _write(sink, piece, turn)


def _overflow(dtype: torch.dtype, *, base: bool, total: bool) -> str:
    """Return why a merged tensor would hold NaN or infinity.

    Args:
        dtype: Type that the base stores it in.
        base: Whether the base's own values are finite.
        total: Whether base + update is, before it is rounded to that type.
    """
    if not base:
        return "holds NaN or infinity before anything is merged into it, so nothing is written. Fetch the base again."
    if not total:
        return "plus the erasers' update is NaN or infinity, so nothing is written. Merge at a lower strength."
    kind, end = str(dtype)[6:], torch.finfo(dtype).max
    return f"is stored as {kind}, which ends at {end:g}, and base + update goes beyond, so nothing is written. Merge at a" + (
        " lower strength, or into a float32 base."
    )
