"""One merged safetensors file: written in pieces that stay in the processor's cache, several tensors at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from esd_lora.eraser import Eraser, LoraPair
from esd_lora.families.stored import EMA, StoredFile
from esd_lora.naming import Place
from esd_lora.tensor_files import DTYPES, Header

MERGED_KEY = "esd_lora_merged"
"""Metadata of a merged file: a JSON list of what was merged into it, the latest last."""
_PIECE = 2**20  # bytes; four times as many made copying four times as slow, once they fell out of the cache
_NOT_BY_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # two file systems, or one that cannot
_RUN = 64 * 2**20  # bytes of untouched tensors that one thread copies in a go


class Bar(Protocol):
    """What is told about progress."""

    def update(self, n: float) -> object: ...


def write_merged(file: StoredFile, stacked: Eraser, target: Path, provenance: Mapping[str, Any], bar: Bar) -> dict[str, str]:
    """Writes a merged safetensors file: the old one's tensors at the old offsets, the stack's updates added.

    A safetensors file is an 8-byte little-endian length, a JSON header of that length, then the tensors' bytes at the
    offsets the header gives. Shapes and dtypes stay, so offsets stay too; only the metadata grows.

    Args:
        file: Of the base.
        stacked: Whose layers fit the file's.
        target: To write; whatever it holds is lost.
        provenance: Added to the metadata.
        bar: Told of every byte of the tensors.

    Returns:
        Module path to `eraser.hash_weight` of the weight that was found there, for every layer of the stack in the file.

    Raises:
        OSError: If the system does not let it.
    """
    metadata = {**file.header.metadata, MERGED_KEY: json.dumps([*merged_before(file.header), provenance])}
    text = json.dumps({"__metadata__": metadata, **file.header.tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with target.open("wb") as sink:
        sink.write(struct.pack("<Q", len(text)) + text)
        sink.truncate(start + max((end for _, _, end in _tensors(file)), default=0))

    def write(part: tuple[str, int, int]) -> dict[str, str]:
        name, begin, end = part
        found: dict[str, str] = {}
        with file.path.open("rb", buffering=0) as source, target.open("r+b", buffering=0) as sink:
            source.seek(file.header.start + begin)
            sink.seek(start + begin)
            if name:
                found = _add(file, name, stacked, source, sink)
            else:
                _copy(source, sink, end - begin)
        bar.update(end - begin)
        return found

    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        for found in threads.map(write, _parts(file, stacked)):
            hashes |= found
    return hashes


def merged_before(header: Header) -> list[dict[str, Any]]:
    """What was merged into a file before, as it says itself."""
    try:
        found = json.loads(header.metadata.get(MERGED_KEY, "[]"))
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def _tensors(file: StoredFile) -> list[tuple[str, int, int]]:
    """Name, first and last byte of every tensor, in their order in the file."""
    found = [(name, *entry["data_offsets"]) for name, entry in file.header.tensors.items()]
    return sorted(found, key=lambda part: part[1])


def _parts(file: StoredFile, stacked: Eraser) -> Iterator[tuple[str, int, int]]:
    """Touched tensors one by one, the others joined to runs without a name."""
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


def _copy(source: BinaryIO, sink: BinaryIO, length: int) -> None:
    """Copies from where one file stands to where the other does, inside the kernel where it can."""
    while length and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source.fileno(), sink.fileno(), length)
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
        _write(sink, piece)
        length -= len(piece)


def _read(source: BinaryIO, piece: memoryview) -> None:
    """Fills the piece; the system may give less at a time."""
    at = 0
    while at < len(piece):
        count: int = source.readinto(piece[at:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{source.name} became shorter while it was read")
        at += count


def _write(sink: BinaryIO, piece: memoryview) -> None:
    at = 0
    while at < len(piece):
        at += sink.write(piece[at:])


class _Addition:
    """An update that goes onto some rows of a stored tensor, and the hash of what it goes onto."""

    def __init__(self, pair: LoraPair, place: Place, inputs: int, dtype: torch.dtype):
        self.first = place.rows(inputs).start or 0
        self.up = place.reordered(pair.up.flatten(1), inputs).to(dtype)
        self.down = pair.down.flatten(1).to(dtype)
        # Where the halves stand the other way round, the hash, which is of diffusers' order, has to wait for the first.
        self._middle = len(self.up) // 2 if place.swaps and len(self.up) == 2 * inputs else 0
        self._digest = hashlib.sha256()
        self._waiting: list[bytes] = []

    def apply(self, block: Tensor, first: int) -> None:
        """Adds to a block of the tensor's rows, from row `first` on, as far as the update reaches there."""
        a, b = max(first, self.first), min(first + len(block), self.first + len(self.up))
        if a < b:
            part = block[a - first : b - first]
            values, early = part.half().numpy(), max(0, self._middle - (a - self.first))
            self._waiting += [values[:early].tobytes()] * bool(early)
            self._digest.update(values[early:].data)
            part.addmm_(self.up[a - self.first : b - self.first], self.down)

    def hash(self) -> str:
        """`eraser.hash_weight` of the rows as they were."""
        for part in self._waiting:
            self._digest.update(part)
        return self._digest.hexdigest()[:16]


def _add(file: StoredFile, name: str, stacked: Eraser, source: BinaryIO, sink: BinaryIO) -> dict[str, str]:
    """Writes one touched tensor, some rows at a time: summed in float32 or better, rounded once."""
    entry = file.header.tensors[name]
    dtype, rows, inputs = DTYPES[entry["dtype"]], *entry["shape"][:2]
    width = torch.Size(entry["shape"][1:]).numel()
    precise = torch.promote_types(dtype, torch.float32)
    pairs = {module: (pair, place) for module, place in file.layers[name] if (pair := stacked.pairs.get(module))}
    additions = {module: _Addition(pair, place, inputs, precise) for module, (pair, place) in pairs.items()}
    step = min(rows, max(1, _PIECE // (width * dtype.itemsize)))
    buffer = bytearray(step * width * dtype.itemsize)
    stored = torch.frombuffer(buffer, dtype=dtype).reshape(step, width)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        piece = memoryview(buffer)[: count * width * dtype.itemsize]
        _read(source, piece)
        block = stored[:count].to(precise)  # the stored one itself if that is its dtype
        for addition in additions.values():
            addition.apply(block, first)
        if block.dtype != dtype:
            stored[:count].copy_(block)
        _write(sink, piece)
    return {} if name.startswith(EMA) else {module: addition.hash() for module, addition in additions.items()}
