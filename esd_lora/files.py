"""Files: a result never goes over something unasked, appears whole or not at all, and is told apart by its hash."""

from __future__ import annotations

import glob
import hashlib
import shutil
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from esd_lora.errors import EsdLoraError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of files that may run code when they are opened."""
_LONGEST = 80  # characters of a name in that of its partial file; file systems take 255 bytes


def prepare_directory(directory: Path, force: bool, names: Sequence[str]) -> None:
    """Make an output directory, and refuse one that holds something unless it may be written over.

    Args:
        directory: Made when missing.
        force: Remove files of `names` in it first; others stay.
        names: What the caller is about to write.

    Raises:
        EsdLoraError: If the directory is not empty and `force` is not set, it is a file, or it cannot be made.
    """
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise EsdLoraError(f"output {directory}: {place} is a file, expected a directory. Choose another.")
    with reporting_write_errors(directory):
        if directory.is_dir() and any(directory.iterdir()):
            if not force:
                raise EsdLoraError(f"output {directory} already exists and is not empty. Choose another, or add --force.")
            for name in names:
                (directory / name).unlink(missing_ok=True)
        directory.mkdir(parents=True, exist_ok=True)


def prepare_file(file: Path, force: bool) -> None:
    """Make the directory of an output file, and refuse a file that is there unless it may be written over.

    Raises:
        EsdLoraError: If the file exists and `force` is not set, it is a directory, or its directory cannot be made.
    """
    if file.is_dir():
        raise EsdLoraError(f"output {file} is a directory, expected a file. Choose another.")
    if file.exists() and not force:
        raise EsdLoraError(f"output {file} already exists. Choose another, or add --force.")
    with reporting_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that a reader sees the old one or the new one.

    Raises:
        EsdLoraError: If the system does not let it.
    """
    beside = path.with_name(f".{path.name[:_LONGEST]}.partial")
    with reporting_write_errors(path):
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def reporting_write_errors(output: Path) -> Generator[None]:
    """Turn what the system refuses inside a `with` block (a full disk, a read-only place) into one sentence.

    Raises:
        EsdLoraError: With the output and the reason.
    """
    try:
        yield
    except OSError as error:
        raise EsdLoraError(
            f"output {output} cannot be written: {error.strerror or error}. Nothing half-written was left; choose another."
        ) from error


def partial_name(output: Path) -> str:
    """Return how the name begins of what will become `output`, as long as it is not whole."""
    return f".{output.name[:_LONGEST]}.partial-"


def remove_partials(output: Path) -> None:
    """Remove what runs that were killed on their way to `output` left beside it, under `partial_name`."""
    for stale in output.parent.glob(f"{glob.escape(partial_name(output))}*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hash_folder(folder: Path, leave_out: Collection[Path] = ()) -> dict[str, str]:
    """Return path to SHA-256 of every file below a folder, to any depth, but those in `leave_out`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path not in leave_out)
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
