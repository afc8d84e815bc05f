"""Files: results go never over something unasked, each whole or not there; what is there is told by its hash."""

from __future__ import annotations

import glob
import hashlib
import re
import shutil
import unicodedata
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from esd_lora.errors import EsdLoraError

_LONGEST = 80  # of a name made from a concept, in characters; file systems take 255 bytes


def clear_output(directory: Path, force: bool, names: Sequence[str]) -> None:
    """Makes an output directory, and refuses one that holds something unless told to write over it.

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
    with told(directory):
        if directory.is_dir() and any(directory.iterdir()):
            if not force:
                raise EsdLoraError(f"output {directory} already exists and is not empty. Choose another, or add --force.")
            for name in names:
                (directory / name).unlink(missing_ok=True)
        directory.mkdir(parents=True, exist_ok=True)


def clear_file(file: Path, force: bool) -> None:
    """Makes the directory of an output file, and refuses a file that is there unless told to write over it.

    Raises:
        EsdLoraError: If the file exists and `force` is not set, it is a directory, or its directory cannot be made.
    """
    if file.is_dir():
        raise EsdLoraError(f"output {file} is a directory, expected a file. Choose another.")
    if file.exists() and not force:
        raise EsdLoraError(f"output {file} already exists. Choose another, or add --force.")
    with told(file):
        file.parent.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside its place and moves it there, so that a reader sees the old one or the new one.

    Raises:
        EsdLoraError: If the system does not let it.
    """
    beside = path.with_name(f".{path.name[:_LONGEST]}.partial")
    with told(path):
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def told(output: Path) -> Generator[None]:
    """Has what the system refuses (a full disk, a read-only place) end in one sentence about `output`."""
    try:
        yield
    except OSError as error:
        raise EsdLoraError(
            f"output {output} cannot be written: {error.strerror or error}. Nothing half-written was left; choose another."
        ) from error


def clear_partials(output: Path) -> None:
    """Removes what runs that were killed on their way to `output` left beside it, under `partial_name`."""
    for stale in output.parent.glob(f"{glob.escape(partial_name(output))}*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def partial_name(output: Path) -> str:
    """How the name begins of what will become `output`, as long as it is not whole."""
    return f".{output.name[:_LONGEST]}.partial-"


def printable(text: str) -> str:
    """A stranger's text as a terminal may have it: control characters, line breaks among them, are shown and not obeyed."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def slug(text: str) -> str:
    """A concept's name as part of a file name: letters and digits of any script, the rest as `-`, cut to a sane length."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text))
    name = "-".join(words)[:_LONGEST].encode()[: 2 * _LONGEST].decode(errors="ignore").strip("-")
    return name or "eraser"


def hash_folder(folder: Path, leave_out: Collection[Path] = ()) -> dict[str, str]:
    """Path to SHA-256 of every file below a folder, to any depth, but those in `leave_out`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path not in leave_out)
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def hash_file(file: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
