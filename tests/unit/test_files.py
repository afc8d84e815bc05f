"""Outputs: whole or not at all, one run at a time, never over something unasked and never over what is read."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esd_lora import files
from esd_lora.errors import EsdLoraError
from esd_lora.files import (
    check_directory,
    lock_output,
    refuse_inputs,
    reserve_directory,
    reserve_file,
    staged_directory,
    write_atomically,
    write_files,
)


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones included."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def held_elsewhere(output: Path) -> Iterator[subprocess.Popen[str]]:
    """Have another process hold an output for the length of a `with` block."""
    code = "import sys, pathlib; from esd_lora.files import lock_output\n"
    code += "with lock_output(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_output_of_another_run_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with held_elsewhere(out) as process:
        with (
            pytest.raises(EsdLoraError, match=rf"is being written by process {process.pid} on \S+ since \d{{4}}-"),
            reserve_directory(out, False),
        ):
            pytest.fail("it was given away twice")
        with pytest.raises(EsdLoraError, match="is being written"):
            write_files(out, {"a": b"mine"})
        with reserve_file(out.with_name("another"), False):
            pass
    write_files(out, {"a": b"mine"})
    assert content(tmp_path) == {"new/out/a": b"mine"}


def test_lock_of_a_killed_run_holds_nobody_up(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "out") as process:
        process.kill()
        process.wait()
        assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
        with lock_output(tmp_path / "out"):
            assert str(os.getpid()) in next(tmp_path.iterdir()).read_text()
    assert not list(tmp_path.iterdir())


def test_lock_is_held_again_by_its_holder_and_under_every_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    with lock_output(tmp_path / "out"):
        with lock_output(tmp_path / "link"), lock_output(tmp_path / "out"):
            assert len(list(tmp_path.glob(".*.lock"))) == 1
        assert len(list(tmp_path.glob(".*.lock"))) == 1
    assert not list(tmp_path.glob(".*"))


def test_long_names_do_not_share_what_lies_beside_them(tmp_path: Path) -> None:
    """As they did when their first 80 characters were the same."""
    first, second = (tmp_path / ("é" * 100 + end) for end in "ab")
    with staged_directory(first, ()) as one, staged_directory(second, ()) as two:
        (one / "file").write_text("first")
        (two / "file").write_text("second")
    assert (first / "file").read_text() == "first"
    assert (second / "file").read_text() == "second"


def test_file_systems_without_locks_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks"):
        write_files(tmp_path / "out", {"a": b"new"})
    assert content(tmp_path) == {"out/a": b"new"}


def test_files_of_other_names_stay_and_old_ones_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "samples").mkdir(parents=True)
    (out / "empty").mkdir()
    for name in ("ours", "gone", "theirs", "samples/ours", "samples/theirs"):
        (out / name).write_text("old")
    (out / "link").symlink_to("nowhere")
    theirs = (out / "theirs").stat()
    (tmp_path / "copied").write_text("new")
    write_files(out, {"ours": b"new", "samples/ours": tmp_path / "copied"}, replaces=["gone", "samples/gone"])
    assert content(out) == {"ours": b"new", "theirs": b"old", "samples/ours": b"new", "samples/theirs": b"old"}
    assert (out / "link").readlink() == Path("nowhere")
    assert (out / "empty").is_dir()
    assert os.path.samestat(theirs, (out / "theirs").stat())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copied", "out"]


def test_what_a_killed_run_was_writing_goes_with_the_file(tmp_path: Path) -> None:
    """A run that writes file by file, as an evaluation does, and another that then replaces the whole."""
    out = tmp_path / "out"
    (out / "samples").mkdir(parents=True)
    code = (
        "import os, sys, pathlib; from esd_lora.files import replaced_file\n"
        "with replaced_file(pathlib.Path(sys.argv[1])) as partial: partial.write_text('half'); os._exit(9)"
    )
    for name in ("ours", "samples/ours", "theirs"):
        assert subprocess.run([sys.executable, "-c", code, str(out / name)], check=False).returncode == 9
    assert len(list(out.rglob("*.partial"))) == 3
    write_files(out, {"a": b"new"}, replaces=["ours", "samples/ours"])
    assert [path.parent for path in out.rglob("*.partial")] == [out]  # theirs may be being written still


def test_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "theirs").write_text("old")
    (tmp_path / "out").symlink_to("elsewhere")
    write_files(tmp_path / "out", {"ours": b"new"})
    assert (tmp_path / "out").readlink() == Path("elsewhere")
    assert content(tmp_path / "elsewhere") == {"ours": b"new", "theirs": b"old"}


def test_links_in_an_output_are_not_followed_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EsdLoraError, match="samples cannot be put there"):
        write_files(tmp_path / "out", {"samples/picture": b"new"})
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "out" / "samples").is_symlink()


@pytest.mark.parametrize("name", ["theirs/below", "folder"])
def test_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / "folder").mkdir(parents=True)
    (tmp_path / "out" / "folder" / "file").write_text("old")
    (tmp_path / "out" / "theirs").write_text("old")
    before = content(tmp_path)
    with pytest.raises(EsdLoraError, match="cannot be put there"):
        write_files(tmp_path / "out", {"ours": b"new", name: b"new"})
    assert content(tmp_path) == before


def test_modes_are_those_of_the_old_directory_and_the_umask(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir(mode=0o750)
    (tmp_path / "old" / "a").write_text("old")
    write_files(tmp_path / "old", {"b": b"new"})
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o750
    write_files(tmp_path / "new", {"b": b"new"})
    (tmp_path / "made").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "made").stat().st_mode


@pytest.mark.parametrize("without_exchange", [False, True], ids=["exchange", "two renames"])
@pytest.mark.parametrize("target", ["stage", "carry", "swap", "sync"])
def test_failed_write_leaves_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, without_exchange: bool
) -> None:
    out = tmp_path / "out"
    write_files(out, {"a": b"old", "b": b"old"})

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if without_exchange:
        monkeypatch.setattr(files, "_exchange_at_once", lambda *_: errno.ENOSYS)
    with monkeypatch.context() as patch:
        if target == "stage":
            patch.setattr(Path, "write_bytes", fail)
        elif target == "carry":
            patch.setattr(os, "link", fail)
            patch.setattr("shutil.copy2", fail)
        elif target == "sync":
            patch.setattr(os, "fsync", fail)
        elif without_exchange:
            rename, calls = Path.rename, iter(range(9))
            patch.setattr(Path, "rename", lambda *paths: fail() if next(calls) == 1 else rename(*paths))
        else:
            patch.setattr(files, "_exchange_at_once", lambda *_: errno.ENOSPC)
        with pytest.raises(EsdLoraError, match="cannot be written: No space left"):
            write_files(out, {"a": b"new"})
    assert content(tmp_path) == {"out/a": b"old", "out/b": b"old"}
    write_files(out, {"a": b"new"})
    assert content(tmp_path) == {"out/a": b"new", "out/b": b"old"}


def test_exchange_by_two_renames_is_mended_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two, the old directory lies under a third name."""
    out = tmp_path / "out"
    write_files(out, {"a": b"old"})
    monkeypatch.setattr(files, "_exchange_at_once", lambda *_: errno.ENOSYS)
    rename, calls = Path.rename, iter(range(9))

    def die(*paths: Path) -> object:
        if next(calls) > 0:
            raise KeyboardInterrupt
        return rename(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            write_files(out, {"a": b"new"})
    assert not out.exists()
    with lock_output(out):
        assert content(tmp_path)["out/a"] == b"old"
    write_files(out, {"a": b"new"})
    assert content(tmp_path) == {"out/a": b"new"}


def test_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    write_atomically(file, b"old")
    write_bytes = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(EsdLoraError, match="No space left"):
            write_atomically(file, b"new content")
    assert content(tmp_path) == {"weights": b"old"}
    with file.open("rb") as reader:
        write_atomically(file, b"new content")
        assert reader.read() == b"old"  # who reads meanwhile reads the old one to its end
    assert content(tmp_path) == {"weights": b"new content"}


def test_what_is_written_is_on_the_disk_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, exchange, rename = files.sync, files._exchange_at_once, Path.replace

    def synced(path: Path) -> None:
        calls.append(f"sync {path.name.rpartition('.')[2]}")
        sync(path)

    monkeypatch.setattr(files, "sync", synced)
    monkeypatch.setattr(files, "_exchange_at_once", lambda *paths: calls.append("exchange") or exchange(*paths))
    monkeypatch.setattr(Path, "replace", lambda *paths: calls.append("replace") or rename(*paths))
    write_files(tmp_path / "out", {"a": b"old"})
    write_files(tmp_path / "out", {"a": b"new"})
    write_atomically(tmp_path / "file", b"new")
    last = f"sync {tmp_path.name}"
    assert calls[:4] == ["sync a", "sync partial", "replace", last]
    assert calls[4:8] == ["sync a", "sync partial", "exchange", last]
    assert calls[8:] == ["sync partial", "replace", last]


def test_output_that_is_new_or_empty(tmp_path: Path) -> None:
    with reserve_directory(tmp_path / "a" / "b", False):
        pass
    (tmp_path / "a" / "b").mkdir(parents=True, exist_ok=True)
    with reserve_directory(tmp_path / "a" / "b", False):
        pass
    assert not content(tmp_path)


def test_output_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(EsdLoraError, match="--force"):
        check_directory(tmp_path / "out", False)
    with pytest.raises(EsdLoraError, match="--force"), reserve_file(tmp_path / "out" / "a", False):
        pass
    check_directory(tmp_path / "out", True)
    assert content(tmp_path) == {"out/a": b"old"}


def test_output_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(EsdLoraError, match="file"):
            check_directory(path, True)
    with pytest.raises(EsdLoraError, match="is a directory"), reserve_file(tmp_path, True):
        pass
    assert file.read_text() == "mine"


def test_working_directory_and_mount_points_are_no_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for place in (Path(), Path(".."), tmp_path):
        with pytest.raises(EsdLoraError, match="is the working directory, or holds it"):
            check_directory(place, True)
    with pytest.raises(EsdLoraError, match="is a mount point"):
        check_directory(Path("/"), True)


def test_inputs_are_never_written_over(tmp_path: Path) -> None:
    base, eraser = tmp_path / "out" / "base", tmp_path / "eraser"
    base.mkdir(parents=True)
    eraser.mkdir()
    (base / "weights").write_text("precious")
    (tmp_path / "here").mkdir()
    (tmp_path / "to-base").symlink_to(base)
    (eraser / "weights").symlink_to(base / "weights")
    (tmp_path / "same").hardlink_to(base / "weights")
    for given in (base, base / "weights", tmp_path / "out", tmp_path / "to-base", eraser, tmp_path / "here" / ".." / "out"):
        with pytest.raises(EsdLoraError, match="which is read"):
            refuse_inputs(tmp_path / "out", [given])
    with pytest.raises(EsdLoraError, match="which is read"):
        refuse_inputs(base / "weights", [tmp_path / "same"])
    refuse_inputs(base / "new", [base, eraser])  # beside what is read
    refuse_inputs(tmp_path / "out", ["owner/name", "emoji", tmp_path / "outer"])
