"""A stack as a document: which erasers, how strongly, and what they looked like when it was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esd_lora.erasers.eraser import MANIFEST_NAME, WEIGHTS_NAME, Eraser
from esd_lora.erasers.fetching import located
from esd_lora.erasers.stacking import Strength, stack
from esd_lora.errors import EsdLoraError
from esd_lora.files import hash_file, write_atomically
from esd_lora.wording import HubId

_SUFFIXES = (".yaml", ".yml")
_LIMIT = 2**20  # bytes; a thousand members have a tenth of it
_MOST = 1000  # erasers that a manifest and those it names come to


class Member(BaseModel):
    """One eraser of a stack."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    file: str
    """Directory or safetensors file, relative to the manifest and below its directory."""
    weight: float = 1.0
    blocks: dict[str, float] = {}
    """Factors by part of the model, as in `stacking.Strength`."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Of the safetensors file, or of the manifest; checked when given."""


class Manifest(BaseModel):
    """The document: `stack:` and a list of members."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stack: tuple[Member, ...] = Field(min_length=1)


def load_eraser(path: str | Path) -> Eraser:
    """Loads an eraser: its directory, its file, the manifest of a stack (`.yaml`, or a directory with one), or a Hub id.

    A manifest stands for the exact stack that it describes; its members may be manifests too. `owner/name` and
    `owner/name@revision` are fetched from the Hub, unless there is a path of that name.

    Raises:
        EsdLoraError: As `Eraser.load` does, and if a manifest is damaged, names itself, a member outside its own directory, or
            one that has changed since.
    """
    return _load(located(path), (), [])


def _load(path: Path, within: tuple[Path, ...], read: list[Path]) -> Eraser:
    """An eraser, for the manifests in `within`; what was loaded for them before stands in `read`."""
    file = _file(path)
    read.append(file)
    if len(read) > _MOST:
        raise EsdLoraError(f"{within[0]} stands for more than {_MOST} erasers. Stack fewer.")
    return _read(file, within, read) if file.suffix.lower() in _SUFFIXES else Eraser.load(path)


def _file(path: Path) -> Path:
    """The file that says what an eraser is: its weights, or its manifest."""
    names = (name for name in (WEIGHTS_NAME, MANIFEST_NAME) if (path / name).is_file())
    return path / next(names, "")


def _read(file: Path, within: tuple[Path, ...], read: list[Path]) -> Eraser:
    """The stack of a manifest."""
    if file.resolve() in within:
        raise EsdLoraError(f"{file} is a member of itself. Take it out of the manifests that name it.")
    try:
        if file.stat().st_size > _LIMIT:
            raise EsdLoraError(f"{file} has more than {_LIMIT:,} bytes: it is no stack manifest.")
        manifest = Manifest.model_validate(yaml.safe_load(file.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise EsdLoraError(f"{file} is no stack manifest ({where}: {first['msg']}). Expected 'stack:' and members.") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise EsdLoraError(f"no stack manifest can be read from {file} ({str(error).splitlines()[0]}).") from error
    erasers = [_load(_checked(file, member), (*within, file.resolve()), read) for member in manifest.stack]
    return stack(erasers, [Strength(member.weight, member.blocks) for member in manifest.stack])


def _checked(file: Path, member: Member) -> Path:
    place = PurePosixPath(member.file)
    found = file.parent / place
    named = "\\" not in member.file and member.file.isprintable() and all(len(part) < 250 for part in place.parts)
    inside = named and not place.is_absolute() and ".." not in place.parts
    homes = file.parent.resolve(), file.resolve().parent  # apart in the Hub's cache, whose files are links to its blobs
    if not inside or not any(found.resolve().is_relative_to(home) for home in homes):
        raise EsdLoraError(f"{file} names {member.file!r}, which is outside its directory. Move the eraser below it.")
    if member.sha256 and _file(found).is_file() and hash_file(_file(found)) != member.sha256:
        raise EsdLoraError(f"{file}: {member.file} has changed since the manifest was written. Write the manifest again.")
    return found


def write_manifest(file: Path, members: Sequence[str | Path], strengths: Sequence[Strength]) -> Eraser:
    """Writes the manifest of a stack, once its members are seen to stack.

    Args:
        file: Where to; every member must lie in or below its directory.
        members: Directories or safetensors files of erasers, or manifests.
        strengths: One for each.

    Returns:
        The stack.

    Raises:
        EsdLoraError: If a member lies elsewhere, cannot be read, or they do not fit each other.
    """
    for member in members:
        if not Path(member).exists() and HubId.read(str(member)):
            raise EsdLoraError(
                f"a manifest names files beside it, and {member} is on the Hub. Pull it first, below {file.parent}."
            )
    whole = stack([load_eraser(member) for member in members], strengths)
    here = file.parent.resolve()
    entries: list[dict[str, object]] = []
    for member, strength in zip(members, strengths, strict=True):
        place = Path(member).resolve()
        if not place.is_relative_to(here):
            raise EsdLoraError(f"{member} is outside {file.parent}, where the manifest goes. Write the manifest above it.")
        entry: dict[str, object] = {"file": place.relative_to(here).as_posix(), "weight": strength.weight}
        blocks: dict[str, object] = {"blocks": dict(strength.blocks)} if strength.blocks else {}
        entries.append(entry | blocks | {"sha256": hash_file(_file(place))})
    write_atomically(file, yaml.safe_dump({"stack": entries}, sort_keys=False, allow_unicode=True).encode())
    return whole
