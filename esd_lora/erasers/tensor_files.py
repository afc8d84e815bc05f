"""Files of tensors: read with checks, as a stranger may have made them, and written to the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from esd_lora.errors import EsdLoraError, shortened
from esd_lora.files import PICKLES

_MAX_HEADER = 96 * 2**20  # safetensors reads 100 MB; a stack of ten thousand erasers has 60, others' files 4 at most
_MAX_TENSORS = 100_000  # of a file; Stable Diffusion XL has 2,515


class Header(NamedTuple):
    """The header of a safetensors file: what stands before the tensors."""

    tensors: dict[str, dict[str, Any]]
    """Name to `dtype`, `shape` and `data_offsets`, the first and last byte counted from `start`."""
    metadata: dict[str, str]
    start: int
    """Where the tensors' bytes begin in the file."""


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file, and none of its tensors.

    Raises:
        EsdLoraError: If there is no such file, or it is no safetensors file or damaged: no JSON, a header of unlikely length,
            tensors that overlap or leave gaps, a name given twice, or fewer or more bytes than announced.
    """
    with _open(file) as opened:  # the reader's own checks: lengths, offsets, types, UTF-8
        number = len(opened.keys())
    if number > _MAX_TENSORS:
        raise EsdLoraError(f"{file} holds {number:,} tensors, more than {_MAX_TENSORS:,}: it is no model's.")
    with file.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        pairs: list[tuple[str, Any]] = json.loads(source.read(length), object_pairs_hook=list)
    (name, count), *_ = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if count > 1:
        raise EsdLoraError(f"{file} is damaged: it names {name!r} twice. Fetch it again.")
    # The reader takes null for no metadata.
    entries: dict[str, dict[str, Any]] = {name: dict(entry or ()) for name, entry in pairs}
    return Header({n: e for n, e in entries.items() if n != "__metadata__"}, entries.get("__metadata__", {}), 8 + length)


@contextmanager
def _open(file: Path) -> Generator[Any]:
    """Open a file with safetensors' reader, whose complaints become one sentence."""
    if not file.is_file():
        raise EsdLoraError(f"no file {file}: expected a .safetensors file.")
    try:
        with file.open("rb") as source:
            head = source.read(8)
        length = int.from_bytes(head, "little")
        # A header of 19,280 bytes begins as a zip archive does, too; but then the file has as many.
        begins_otherwise = head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        if begins_otherwise and length + len(head) > file.stat().st_size:
            raise EsdLoraError(
                f"{file} is a pickle, not a safetensors file, and opening one runs whatever code was put into it. Take a"
                " .safetensors file, or convert it on a machine you can spare."
            )
        if length > _MAX_HEADER and len(head) == 8:
            raise EsdLoraError(
                f"{file} is no safetensors file, or damaged: it announces a header of {length:,} bytes, more than"
                f" {_MAX_HEADER:,}. Fetch it again."
            )
        with cast("Any", safe_open)(file, framework="pt") as opened:  # safetensors ships no types
            yield opened
    except (SafetensorError, OSError) as error:
        raise EsdLoraError(f"{file} is no safetensors file, or damaged ({error}). Fetch or make it again.") from error


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a file, on the CPU, and its metadata.

    Args:
        file: A safetensors file, or a pickle of tensors (`.pt`, `.ckpt`, `.bin`), which torch reads with `weights_only`: then
            nothing but tensors in containers can come out of it, and there is no metadata.

    Raises:
        EsdLoraError: If it is damaged or holds anything else.
    """
    if file.suffix.lower() not in PICKLES:
        header = read_header(file)
        with _open(file) as opened:
            return {name: opened.get_tensor(name) for name in header.tensors}, header.metadata
    if not file.is_file():
        raise EsdLoraError(f"no file {file}: expected a .safetensors or .pt file.")
    try:
        loaded = _load_pickle(file)
    except Exception as error:  # it raises whatever the pickle makes it stumble over
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise EsdLoraError(f"{file} cannot be read as tensors alone ({reason}). Take a .safetensors file instead.") from error
    state = _dictionary(loaded)
    for nested in ("state_dict", "unet", "model"):
        state = _dictionary(state.get(nested)) or state
    tensors = {name: value.detach() for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise EsdLoraError(f"{file} holds no tensors by name: expected a state dict.")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise EsdLoraError(f"{file}: {shortened(name)} is {_kind(tensor)}, expected plain real numbers. Save it as such.")
    size, most = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), file.stat().st_size
    if size > most:  # views of few numbers, which would take so much once they are laid out
        raise EsdLoraError(f"{file} has {most:,} bytes, and its tensors come to {size:,}. Save each with numbers of its own.")
    return tensors, {}


def _load_pickle(file: Path) -> Any:
    """Return what a file holds that torch saved, if that is tensors in containers.

    Tensors of today's archives are views of the mapped file: whatever the pickle says of their sizes, nothing beyond the file
    is read and nothing unpacked.
    """
    with file.open("rb") as source:
        archived = source.read(4) == b"PK\x03\x04"
    if archived:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
    with warnings.catch_warnings(action="ignore"):  # of kinds of tensors that are refused
        return cast("Any", torch).load(file, map_location="cpu", weights_only=True, mmap=archived)


def _kind(tensor: Tensor) -> str:
    """Return in a word or two what a tensor is that is not plain."""
    kinds = {"nested": tensor.is_nested, "quantised": tensor.is_quantized, "on no device (meta)": tensor.is_meta}
    return next((kind for kind, is_one in kinds.items() if is_one), "complex" if tensor.is_complex() else "sparse")


def _dictionary(value: object) -> dict[Any, Any]:
    return cast("dict[Any, Any]", value) if isinstance(value, dict) else {}


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of the types of tensors that can be added to; others are quantised."""


def read_rows(source: BinaryIO, header: Header, name: str, rows: slice = slice(None)) -> Tensor:
    """Read rows of one tensor into memory of their own.

    Args:
        source: The open file.
        header: Its header.
        name: Name of the tensor, whose type must be one of `DTYPES`.
        rows: Slice of the first dimension; all of it unless given.

    Raises:
        OSError: If the file ends before them.
    """
    entry = header.tensors[name]
    dtype, shape = DTYPES[entry["dtype"]], list(entry["shape"])
    start, stop, _ = rows.indices(shape[0])
    width = math.prod(shape[1:]) * dtype.itemsize
    buffer = bytearray((stop - start) * width)
    source.seek(header.start + entry["data_offsets"][0] + start * width)
    if source.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise OSError(f"{source.name} became shorter while it was read")
    return torch.frombuffer(buffer, dtype=dtype).reshape(stop - start, *shape[1:])


@contextmanager
def writing_tensors(
    file: Path, shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> Generator[Callable[[str, Tensor], None]]:
    """Write a safetensors file one tensor at a time, in any order: they need not be in memory together.

    Args:
        file: Where to write; whoever calls sees that nobody reads it before it is whole.
        shapes: Name to type and shape of every tensor, each of which is to be written once.
        metadata: Strings that go along.

    Yields:
        A function that writes a tensor by its name.
    """
    kinds = {dtype: kind for kind, dtype in {**DTYPES, "U8": torch.uint8}.items()}
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in sorted(shapes, key=lambda name: -shapes[name][0].itemsize):  # the widest first, so that all are aligned
        dtype, shape = shapes[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as target:
        target.write(struct.pack("<Q", len(header)) + header)
        start = target.tell()
        target.truncate(start + end)

        def write(name: str, tensor: Tensor) -> None:
            dtype, shape = shapes[name]
            assert tuple(tensor.shape) == tuple(shape), name
            target.seek(start + entries[name]["data_offsets"][0])
            # As bytes, for numpy has no bfloat16.
            target.write(tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().data)

        yield write


def all_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinity; the sum tells as much in a tenth of the time, unless it overflows itself."""
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def file_content(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file, the same bytes every time: safetensors itself writes metadata in an order that changes.

    Args:
        tensors: Name to tensor.
        metadata: Strings that go along.

    Raises:
        EsdLoraError: If a tensor holds NaN or infinity: such a file erases nothing and breaks what loads it.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise EsdLoraError(
                f"{name} would hold NaN or infinity, so nothing is written: a learning rate, a strength or an alpha is too"
                f" large for {str(tensor.dtype)[6:]}, which ends at {torch.finfo(tensor.dtype).max:.3g}. Lower it."
            )
    content = save(tensors)
    length = int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(content[8 : 8 + length])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes in a safetensors file, whatever its metadata: kohya's `sshs_model_hash`."""
    content = save(tensors)
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
