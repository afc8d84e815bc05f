"""Pictures in folders: those that others made, and those that an evaluation painted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import Case
from esd_lora.files import hash_file
from esd_lora.pictures import SUFFIXES, open_picture, picture_paths
from esd_lora.wording import printable


def open_pictures(folder: Path) -> dict[Path, Image.Image]:
    """Return path to picture of every picture in a folder.

    Raises:
        EsdLoraError: If there is none, or one cannot be read.
    """
    paths = picture_paths(folder)
    if not paths:
        raise EsdLoraError(f"no pictures were found in {folder}. Expected a folder with {', '.join(SUFFIXES)} files.")
    return {path: open_picture(path) for path in paths}


def hash_by_name(files: Iterable[Path]) -> dict[str, str]:
    """Return file name to SHA-256 of some files, for a record."""
    return {printable(file.name): hash_file(file) for file in files}


def painted_file(folder: Path, variant: str, case: str) -> Path:
    """Return where the picture of a variant for a case lies in an evaluation's directory."""
    return folder / "images" / variant / f"{case}.png"


def open_painted(file: Path) -> Image.Image:
    """Return a picture of an evaluation.

    Raises:
        EsdLoraError: If it is missing or damaged.
    """
    if not file.exists():
        raise EsdLoraError(f"there is no picture {file}. Paint it, and run again.")
    try:
        return open_picture(file)
    except EsdLoraError as error:
        raise EsdLoraError(f"picture {file} is damaged. Delete it and run again; only it will be made anew.") from error


def match_pictures(folder: Path, cases: Sequence[Case]) -> dict[str, Path]:
    """Return case to picture of a folder that others filled: `CASE.png`, or a prompt file's own number, `12.png` or `12_0.png`.

    Raises:
        EsdLoraError: If pictures are missing; the message counts them.
    """
    by_name = {path.stem: path for path in picture_paths(folder)}
    files: dict[str, Path] = {}
    missing: list[str] = []
    for case in cases:
        number = case.id.partition("-")[2]
        file = next((by_name[name] for name in (case.id, number, f"{number}_0") if name in by_name), None)
        if file is None:
            missing.append(case.id)
        else:
            files[case.id] = file
    if missing:
        shown = ", ".join(f"{case}.png" for case in missing[:3])
        raise EsdLoraError(
            f"{folder} lacks {len(missing)} of {len(cases)} pictures ({shown}). Add them, or leave prompts out with --limit."
        )
    return files
