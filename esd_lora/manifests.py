"""A stack as a document: which erasers, how strongly, and what they looked like when it was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esd_lora.eraser import WEIGHTS_NAME, Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.outputs import hash_file, write_whole
from esd_lora.stacking import Strength, stack

MANIFEST_NAME = "stack.yaml"
_SUFFIXES = (".yaml", ".yml")
_LIMIT = 2**20  # bytes; a thousand members have a tenth of it


class Member(BaseModel):
    """One eraser of a stack."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    file: str
    """Directory or safetensors file, relative to the manifest and below its directory."""
    weight: float = 1.0
    blocks: dict[str, float] = {}
    """Factors by part of the model, as in `stacking.Strength`."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Of the safetensors file; checked when given."""


class Manifest(BaseModel):
    """The document: `stack:` and a list of members."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stack: tuple[Member, ...] = Field(min_length=1)


def load_eraser(path: str | Path) -> Eraser:
    """Loads an eraser: its directory, its safetensors file, or the manifest of a stack (`.yaml`, or a directory with one).

    Raises:
        EsdLoraError: As `Eraser.load` and `read_manifest` do.
    """
    path = Path(path)
    if path.suffix.lower() in _SUFFIXES and not path.is_dir():
        return read_manifest(path)
    if (path / MANIFEST_NAME).is_file() and not (path / WEIGHTS_NAME).is_file():
        return read_manifest(path / MANIFEST_NAME)
    return Eraser.load(path)


def read_manifest(file: Path) -> Eraser:
    """The exact stack that a manifest describes.

    Raises:
        EsdLoraError: If it is missing, damaged, names a member outside its own directory, or one that has changed since.
    """
    try:
        if file.stat().st_size > _LIMIT:
            raise EsdLoraError(f"{file} has more than {_LIMIT:,} bytes: it is no stack manifest.")
        manifest = Manifest.model_validate(yaml.safe_load(file.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise EsdLoraError(f"{file} is no stack manifest ({where}: {first['msg']}). Expected 'stack:' and members.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise EsdLoraError(f"no stack manifest can be read from {file} ({str(error).splitlines()[0]}).") from error
    erasers = [Eraser.load(_checked(file, member)) for member in manifest.stack]
    return stack(erasers, [Strength(member.weight, member.blocks) for member in manifest.stack])


def _checked(file: Path, member: Member) -> Path:
    place = PurePosixPath(member.file)
    found = file.parent / place
    inside = not place.is_absolute() and ".." not in place.parts and "\\" not in member.file
    if not inside or not found.resolve().is_relative_to(file.parent.resolve()):
        raise EsdLoraError(f"{file} names {member.file!r}, which is outside its directory. Move the eraser below it.")
    weights = found / WEIGHTS_NAME if found.is_dir() else found
    if member.sha256 and weights.is_file() and hash_file(weights) != member.sha256:
        raise EsdLoraError(f"{file}: {member.file} has changed since the manifest was written. Write the manifest again.")
    return found


def write_manifest(file: Path, members: Sequence[str | Path], strengths: Sequence[Strength]) -> Eraser:
    """Writes the manifest of a stack, once its members are seen to stack.

    Args:
        file: Where to; every member must lie in or below its directory.
        members: Directories or safetensors files of erasers.
        strengths: One for each.

    Returns:
        The stack.

    Raises:
        EsdLoraError: If a member lies elsewhere, cannot be read, or they do not fit each other.
    """
    whole = stack([Eraser.load(member) for member in members], strengths)
    here = file.parent.resolve()
    entries: list[dict[str, object]] = []
    for member, strength in zip(members, strengths, strict=True):
        place = Path(member).resolve()
        if not place.is_relative_to(here):
            raise EsdLoraError(f"{member} is outside {file.parent}, where the manifest goes. Write the manifest above it.")
        weights = place / WEIGHTS_NAME if place.is_dir() else place
        entry: dict[str, object] = {"file": place.relative_to(here).as_posix(), "weight": strength.weight}
        entries.append(entry | ({"blocks": dict(strength.blocks)} if strength.blocks else {}) | {"sha256": hash_file(weights)})
    write_whole(file, yaml.safe_dump({"stack": entries}, sort_keys=False, allow_unicode=True).encode())
    return whole
