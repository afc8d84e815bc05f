"""Files: one run at a time writes an output, which appears whole or not at all, and never over something unasked.

What is written lies beside its place until it is whole and on the disk; then it takes that place in one step. So whatever stops
a run, the old result or the new one is there.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import socket
import sys
import threading
import time
import warnings
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from esd_lora.errors import EsdLoraError
from esd_lora.progress import advance, stage

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of files that may run code when they are opened."""
_LONGEST = 80  # bytes of an output's name in the hidden names beside it; file systems take 255
_held: dict[Path, int] = {}  # output to the thread of this process that holds it
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_NO_EXCHANGE = (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def reserve_directory(output: Path, force: bool, inputs: Iterable[str | Path] = ()) -> Generator[None]:
    """Hold an output directory for the length of a `with` block, and refuse one that may not be written over.

    Args:
        output: Made by whatever is written into it; nothing in it is touched here.
        force: Whether it may hold something already.
        inputs: Files and directories that are read, as far as they are paths.

    Raises:
        EsdLoraError: If another run writes there, an input lies in it, it is a file or a mount point, or it is not empty and
            `force` is not set.
    """
    check_directory(output, force)
    refuse_inputs(output, inputs)
    with lock_output(output):
        check_directory(output, force)
        yield


@contextmanager
def reserve_file(output: Path, force: bool, inputs: Iterable[str | Path] = ()) -> Generator[None]:
    """Hold an output file for the length of a `with` block, and refuse one that may not be written over.

    Raises:
        EsdLoraError: If another run writes it, it is an input or a directory, or it exists and `force` is not set.
    """
    check_file(output, force)
    refuse_inputs(output, inputs)
    with lock_output(output):
        check_file(output, force)
        yield


def check_directory(output: Path, force: bool) -> None:
    """Refuse an output directory that cannot be made or may not be written over.

    Raises:
        EsdLoraError: With what is in the way.
    """
    with reporting_write_errors(output):
        for place in (output, *output.parents):
            if place.exists() and not place.is_dir():
                raise EsdLoraError(f"output {output}: {place} is a file, expected a directory. Choose another.")
        for what, holds in (
            ("a mount point", _real(output).is_mount()),
            ("the working directory, or holds it", _holds_here(output)),
        ):
            if holds:
                raise EsdLoraError(f"output {output} is {what}, and nothing can take its place. Choose a folder in it.")
        if not force and output.is_dir() and any(output.iterdir()):
            raise EsdLoraError(f"output {output} already exists and is not empty. Choose another, or add --force.")


def _holds_here(output: Path) -> bool:
    """Return whether the working directory is a directory or lies in it."""
    try:
        return output.is_dir() and Path.cwd().is_relative_to(_real(output))
    except FileNotFoundError:  # it is gone
        return False


def check_file(output: Path, force: bool) -> None:
    """Refuse an output file that may not be written over, or is a directory.

    Raises:
        EsdLoraError: With what is in the way.
    """
    with reporting_write_errors(output):
        if output.is_dir():
            raise EsdLoraError(f"output {output} is a directory, expected a file. Choose another.")
        if output.exists() and not force:
            raise EsdLoraError(f"output {output} already exists. Choose another, or add --force.")


def fresh_output(place: Path) -> Path:
    """Return a place, or the first with -2, -3 and so on behind its name, where nothing is and no other run writes."""
    return next(path for path in _numbered(place) if not os.path.lexists(path) and not _beside(_real(path), "lock").exists())


def last_output(place: Path) -> Path:
    """Return the last of the places that `fresh_output` has given where something is; the first where nothing is anywhere."""
    there = list(takewhile(os.path.lexists, _numbered(place)))
    return there[-1] if there else place


def _numbered(place: Path) -> Iterator[Path]:
    yield place
    suffix = ".safetensors" if place.suffix == ".safetensors" else ""  # other points belong to a name, such as v1.5
    yield from (place.with_name(f"{place.name.removesuffix(suffix)}-{number}{suffix}") for number in count(2))


def refuse_inputs(output: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output in whose place, or below it, something lies that is read.

    Args:
        output: File or directory.
        inputs: Files and directories; what does not exist is a name or a Hub id, and left to whoever reads it.

    Raises:
        EsdLoraError: With the input.
    """
    with reporting_write_errors(output):
        place = _real(output)
        for given in inputs:
            path = Path(given)
            if not os.path.lexists(path):
                continue
            parts = [path, *(part for part in path.rglob("*") if part.is_symlink())] if path.is_dir() else [path]
            same_file = place.is_file() and path.is_file() and place.samefile(path)
            if same_file or any(_real(part).is_relative_to(place) for part in parts):
                raise EsdLoraError(
                    f"output {output} holds {given}, which is read. An input is never written over; choose another."
                )


@contextmanager
def lock_output(output: Path) -> Generator[None]:
    """Hold an output for the length of a `with` block, so that no other run writes there; whoever holds it may hold it again.

    The lock is the system's own, on a file beside the output, so it ends with the process however that ends.

    Raises:
        EsdLoraError: If another run holds it, with process, host and start; or the system lets no file be made there.
    """
    with reporting_write_errors(output):
        place = _real(output)
        descriptor = None if _held.get(place) == threading.get_ident() else _acquire(_beside(place, "lock"), output)
    if descriptor is None:
        yield
        return
    _held[place] = threading.get_ident()
    try:
        with reporting_write_errors(output):
            _recover(place)
        yield
    finally:
        del _held[place]
        _beside(place, "lock").unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path, output: Path) -> int:
    """Return the descriptor of a lock file that is locked now, and says by whom."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock_descriptor(descriptor, output):
                owner = os.read(descriptor, 500).decode(errors="replace") or "another run"
                raise EsdLoraError(f"output {output} is being written by {owner}. Wait until it is done, or choose another.")
            if lock.exists() and os.path.samestat(lock.stat(), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                started = time.strftime("%Y-%m-%d %H:%M:%S")
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {started}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it removed the file between the two calls


def _lock_descriptor(descriptor: int, output: Path) -> bool:
    """Take the system's lock on an open file, and return whether nobody else has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 4096, os.SEEK_SET)  # what is locked cannot be read there
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            warnings.warn(f"the file system of {output} has no locks: have no other run write there.", stacklevel=5)
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


@contextmanager
def staged_directory(output: Path, replaces: Collection[str] | None) -> Generator[Path]:
    """Yield an empty folder that takes the place of an output directory in one step once the `with` block is done.

    Args:
        output: The directory. If the block raises, it stays as it was.
        replaces: Files and folders of the old directory, as names below it, that go with it; all others are in the new one
            too. `None`: all go.

    Raises:
        EsdLoraError: If another run writes there, something is in the way, or the system does not let it.
    """
    with lock_output(output):
        place = _real(output)
        stage = _beside(place, "partial")
        try:
            with reporting_write_errors(output):
                _remove(stage)
                stage.mkdir()
            yield stage
            replace_directory(output, stage, replaces)
        finally:
            _remove(stage)  # by now the old directory, or what did not become one


def write_files(directory: Path, files: Mapping[str, bytes | Path], replaces: Collection[str] = ()) -> None:
    """Write files into a directory, all of them or none; those of other names stay.

    Args:
        directory: Made when missing.
        files: Name below the directory, with `/` between folders, to content, or to a file that is copied.
        replaces: Further names that are not there afterwards.

    Raises:
        EsdLoraError: If another run writes there, something is in the way, or the system does not let it.
    """
    with staged_directory(directory, replaces) as stage, reporting_write_errors(directory):
        for name, content in files.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, stage / name)
            else:
                (stage / name).write_bytes(content)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that a reader sees the old one or the new one.

    Args:
        path: The file; whoever calls holds the output that it belongs to.
        content: All of it.

    Raises:
        EsdLoraError: If the system does not let it.
    """
    with replaced_file(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replaced_file(path: Path) -> Generator[Path]:
    """Yield a file beside a file's place that is moved there in one step once the `with` block is done.

    Args:
        path: The place; whoever calls holds the output that it belongs to.

    Raises:
        EsdLoraError: If the system does not let it.
    """
    partial = _beside(path, "partial")
    with reporting_write_errors(path):
        try:
            yield partial
            sync(partial)
            partial.replace(path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


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


def work_folder(output: Path) -> Path:
    """Return the folder beside an output where what will replace it may grow over several runs, for `replace_directory`."""
    return _beside(_real(output), "next")


def replace_directory(output: Path, new: Path, replaces: Collection[str] | None) -> None:
    """Have a folder take the place of an output directory, in one step.

    Args:
        output: Held by whoever calls.
        new: Folder beside it; afterwards, what was there before, if anything was.
        replaces: As in `staged_directory`.

    Raises:
        EsdLoraError: If something is in the way, or the system does not let it; then both are where they were.
    """
    with reporting_write_errors(output):
        place = _real(output)
        if place.is_dir():
            shutil.copymode(place, new)
            if replaces is not None:
                unfinished = (_beside(Path(name), "partial").as_posix() for name in replaces)  # a killed run left them
                _carry_over(place, new, place, {*replaces, *unfinished})
        with stage("putting it on the disk"):
            _sync_all(new)
        if place.is_dir() and any(place.iterdir()):
            _exchange(new, place)
        else:
            new.replace(place)
        sync(place.parent)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories: in one step where the system can, else by a third name, from which `_recover` brings back."""
    if failure := _exchange_at_once(new, old):
        if failure not in _NO_EXCHANGE:
            raise OSError(failure, os.strerror(failure), str(old))
        aside = _beside(old, "replaced")
        old.rename(aside)
        try:
            new.rename(old)
        except OSError:
            aside.rename(old)
            raise
        aside.rename(new)


def _exchange_at_once(first: Path, second: Path) -> int:
    """Swap two names by one call to the system, and return its error number, 0 where it did."""
    libc: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    here, swap, names = -100, 2, (os.fsencode(first), os.fsencode(second))  # AT_FDCWD; RENAME_EXCHANGE and RENAME_SWAP
    if hasattr(libc, "renameat2"):  # Linux
        done = libc.renameat2(here, names[0], here, names[1], swap) == 0
    elif hasattr(libc, "renamex_np"):  # macOS
        done = libc.renamex_np(*names, swap) == 0
    else:
        return errno.ENOSYS
    return 0 if done else ctypes.get_errno()


def _recover(place: Path) -> None:
    """Bring back an output that was moved aside by a run that was killed before the new one was there."""
    aside = _beside(place, "replaced")
    if aside.exists():
        _remove(aside) if place.exists() else aside.rename(place)


def _carry_over(old: Path, new: Path, whole: Path, replaces: Collection[str]) -> None:
    """Have everything in an old folder that is not replaced stand in the new one too, as further links to it.

    Args:
        old: The folder, `whole` or one below it.
        new: What stands for it in the new directory.
        whole: The old directory.
        replaces: Files and folders of it that are not carried over, as names below it.

    Raises:
        EsdLoraError: If a file is where a folder should be, or the other way round, or something is mounted there.
    """
    for path in old.iterdir():
        name, target = path.relative_to(whole).as_posix(), new / path.name
        folder = path.is_dir() and not path.is_symlink()
        if name in replaces:
            continue
        if folder and path.is_mount():
            raise EsdLoraError(f"output {whole}: something is mounted at {name}. Choose another.")
        if target.exists() and folder != target.is_dir():
            raise EsdLoraError(f"output {whole}: {name} cannot be put there, where a file or folder of that name is.")
        if folder:
            target.mkdir(exist_ok=True)
            _carry_over(path, target, whole, replaces)
        elif not target.exists():
            try:
                os.link(path, target, follow_symlinks=False)
            except OSError:  # not every file system has links
                shutil.copy2(path, target, follow_symlinks=False)


def _sync_all(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _sync_all(path)
        elif path.is_file() and not path.is_symlink():
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have the system put a file or the names in a folder on the disk, as far as it can."""
    if os.name == "posix" or path.is_file():  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            with suppress(InterruptedError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _real(path: Path) -> Path:
    """Return where a path leads, links resolved."""
    return Path(os.path.realpath(path))


def _beside(output: Path, kind: str) -> Path:
    """Return the hidden name beside an output for something of its own; no two outputs have the same."""
    name = os.fsencode(output.name)
    return output.with_name(f".{name[:_LONGEST].decode(errors='ignore')}.{hashlib.sha256(name).hexdigest()[:8]}.{kind}")


def read_bounded(file: Path, largest: int) -> bytes:
    """Return the content of a file that a stranger may have written, and of no more than so many bytes.

    Raises:
        EsdLoraError: If it has more.
        OSError: If it cannot be read.
    """
    with file.open("rb") as opened:
        content = opened.read(largest + 1)
    if len(content) > largest:
        raise EsdLoraError(f"{file} has more than {largest:,} bytes, too many for what it should be. Give another file.")
    return content


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hash_folder(folder: Path, leave_out: Collection[Path] = ()) -> dict[str, str]:
    """Return path to SHA-256 of every file below a folder, to any depth, but those in `leave_out`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in leave_out]
    hashes: dict[str, str] = {}
    with stage("hashing", sum(path.stat().st_size for path in files), "B"):
        for path in files:
            hashes[path.relative_to(folder).as_posix()] = hash_file(path)
            advance(path.stat().st_size)
    return hashes
