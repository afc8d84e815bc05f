"""A stack as a document: which erasers, how strongly, and what they looked like when it was written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esd_lora.erasers.eraser import ERASER_FILES, Eraser
from esd_lora.erasers.fetching import locate
from esd_lora.erasers.stacking import Strength, stack
from esd_lora.errors import EsdLoraError, shortened
from esd_lora.files import hash_file, lock_output, write_atomically
from esd_lora.wording import HubId
from esd_lora.yaml_files import dump_yaml, read_yaml

_LOG = logging.getLogger(__name__)
_SUFFIXES = (".yaml", ".yml")
_MAX_ERASERS = 1000  # that a manifest and those it names come to


class Member(BaseModel):
    """One eraser of a stack."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    file: str
    """Directory, safetensors file or manifest, relative to this manifest and below its directory."""
    weight: float = 1.0
    """Strength of the eraser in the stack."""
    blocks: dict[str, float] = {}
    """Factors by part of the model: see `stacking.Strength`."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the safetensors file or of the manifest; checked when given."""

    @property
    def strength(self) -> Strength:
        """How strongly the eraser is applied."""
        return Strength(self.weight, self.blocks)


class Manifest(BaseModel):
    """The document: `stack:` and a list of members."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stack: tuple[Member, ...] = Field(min_length=1)


def load_eraser(path: str | Path) -> Eraser:
    """Load an eraser: its directory, its file, the manifest of a stack (`.yaml`, or a directory with one), or a Hub id.

    A manifest stands for the exact stack that it describes; its members may be manifests too. `owner/name` and
    `owner/name@revision` are fetched from the Hub, unless there is a path of that name.

    Raises:
        EsdLoraError: If it cannot be fetched, `Eraser.load` refuses it, or a manifest is damaged, or names itself, a member
            outside its own directory, or one that has changed since.
    """
    return _load(locate(path), (), [])


def _load(path: Path, within: tuple[Path, ...], loaded: list[Path]) -> Eraser:
    """Load an eraser for the manifests in `within`, and add its file to all that were `loaded` for them."""
    file = _main_file(path)
    loaded.append(file)
    if len(loaded) > _MAX_ERASERS:
        raise EsdLoraError(f"{within[0]} stands for more than {_MAX_ERASERS} erasers. Stack fewer.")
    if file.suffix.lower() not in _SUFFIXES:
        eraser = Eraser.load(path)
        _LOG.debug("eraser %s: %s, %d layers", file, ", ".join(eraser.names), len(eraser.pairs))
        return eraser
    if file.resolve() in within:
        raise EsdLoraError(f"{file} is a member of itself. Take it out of the manifests that name it.")
    members = _read_manifest(file).stack
    erasers = [_load(_member_path(file, member), (*within, file.resolve()), loaded) for member in members]
    return stack(erasers, [member.strength for member in members])


def _main_file(path: Path) -> Path:
    """Return the file that says what an eraser is, its weights or its manifest, or the path itself if it is no directory."""
    names = (name for name in ERASER_FILES if (path / name).is_file())
    return path / next(names, "")


def _read_manifest(file: Path) -> Manifest:
    try:
        return Manifest.model_validate(read_yaml(file, "stack manifest", "stack: [{file: no-cat}]").values)
    except EsdLoraError as error:
        raise EsdLoraError(f"no stack manifest can be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = shortened(".".join(str(part) for part in first["loc"]))
        raise EsdLoraError(f"{file} is no stack manifest ({where}: {first['msg']}). Expected 'stack:' and members.") from error


def _member_path(manifest: Path, member: Member) -> Path:
    """Return where a member lies, once it is seen to be below the manifest's directory and unchanged."""
    relative = PurePosixPath(member.file)
    path = manifest.parent / relative
    inside = _is_plain(member.file) and not relative.is_absolute() and ".." not in relative.parts
    # The two differ in the Hub's cache, whose files are links to its blobs.
    homes = manifest.parent.resolve(), manifest.resolve().parent
    if not inside or not any(path.resolve().is_relative_to(home) for home in homes):
        raise EsdLoraError(f"{manifest} names {member.file!r}, which is outside its directory. Move the eraser below it.")
    if member.sha256 and _main_file(path).is_file() and hash_file(_main_file(path)) != member.sha256:
        raise EsdLoraError(f"{manifest}: {member.file} has changed since the manifest was written. Write the manifest again.")
    return path


def _is_plain(name: str) -> bool:
    """Return whether the relative path of a member may stand in a manifest."""
    return "\\" not in name and name.isprintable() and all(len(part) < 250 for part in name.split("/"))


def write_manifest(file: Path, members: Sequence[str | Path], strengths: Sequence[Strength]) -> Eraser:
    """Write the manifest of a stack, once its members are seen to stack, and return the stack.

    Args:
        file: Where to write; every member must lie in or below its directory.
        members: Directories or safetensors files of erasers, or manifests.
        strengths: One for each member.

    Raises:
        EsdLoraError: If a member lies elsewhere, cannot be read, or they do not fit each other.
    """
    for member in members:
        if not Path(member).exists() and HubId.read(str(member)):
            raise EsdLoraError(
                f"a manifest names files beside it, and {member} is on the Hub. Pull it first, below {file.parent}."
            )
    stacked = stack([load_eraser(member) for member in members], strengths)
    home = file.parent.resolve()
    entries: list[dict[str, object]] = []
    for member, strength in zip(members, strengths, strict=True):
        path = Path(member).resolve()
        if not path.is_relative_to(home):
            raise EsdLoraError(f"{member} is outside {file.parent}, where the manifest goes. Write the manifest above it.")
        name = path.relative_to(home).as_posix()
        if not _is_plain(name):
            raise EsdLoraError(
                f"a manifest cannot name {name!r}: a part is too long, or holds what is not printable. Rename it."
            )
        entry: dict[str, object] = {"file": name, "weight": strength.weight}
        if strength.blocks:
            entry["blocks"] = dict(strength.blocks)
        entries.append(entry | {"sha256": hash_file(_main_file(path))})
    with lock_output(file):
        write_atomically(file, dump_yaml({"stack": entries}).encode())
    return stacked
