"""Pulling an eraser from the Hub into a directory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from esd_lora.erasers.eraser import ERASER_FILES
from esd_lora.erasers.fetching import take_snapshot
from esd_lora.erasers.manifests import load_eraser
from esd_lora.errors import EsdLoraError
from esd_lora.files import reserve_directory, write_files
from esd_lora.wording import HubId


class Pulled(NamedTuple):
    """What was taken from the Hub."""

    directory: Path
    commit: str
    files: list[str]
    left_out: list[str]
    """Names of files of kinds that are not taken."""


def pull(repo: str, out: str | Path, *, force: bool = False) -> Pulled:
    """Fetch an eraser or a stack with its card and pictures into a directory.

    Everything is checked before the first file is put there: names, kinds, sizes, hashes, and that the eraser loads.

    Args:
        repo: `owner/name`, or `owner/name@revision` with a branch, a tag, a commit or `refs/pr/1`.
        out: Directory, new or empty.
        force: Write over what is there; files of other names stay.

    Raises:
        EsdLoraError: If there is no such repository, it may not be read, the Hub cannot be reached, or something in it is not
            as it should be; then what was there is as it was.
    """
    hub_id, out = HubId.read(repo), Path(out)
    if hub_id is None:
        raise EsdLoraError(f"{repo!r} is no repository on the Hub: expected owner/name, or owner/name@revision.")
    with reserve_directory(out, force):
        folder, commit, names, left_out = take_snapshot(hub_id, whole=True)
        load_eraser(folder)
        write_files(out, {name: folder / name for name in names}, replaces=ERASER_FILES)
    return Pulled(out, commit, names, left_out)
