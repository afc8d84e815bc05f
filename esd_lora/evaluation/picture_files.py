"""Pictures that others made, in folders."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from esd_lora.errors import EsdLoraError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def picture_paths(folder: Path) -> list[Path]:
    """The pictures that lie in a folder, by name; none where there is no folder."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


def open_picture(file: Path) -> Image.Image:
    """A picture in RGB, turned as the camera was held.

    Raises:
        EsdLoraError: If it cannot be read.
    """
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow says it in all these ways
        raise EsdLoraError(f"{file} cannot be read as a picture ({error}). Mend or remove it.") from error


def pictures_in(folder: Path) -> dict[Path, Image.Image]:
    """Path to picture of every picture in a folder.

    Raises:
        EsdLoraError: If there is none, or one cannot be read.
    """
    paths = picture_paths(folder)
    if not paths:
        raise EsdLoraError(f"no pictures were found in {folder}. Expected a folder with {', '.join(SUFFIXES)} files.")
    return {path: open_picture(path) for path in paths}
