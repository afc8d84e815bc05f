"""What is kept of a release, and what is published beside it: its record, its card, a manifest of hashes, a signature."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from esd_lora.errors import EsdLoraError, shortened
from esd_lora.faults import first_fault
from esd_lora.files import hash_folder, read_bounded, replaced_file, write_atomically
from esd_lora.json_files import read_json
from esd_lora.wording import printable

CARD_NAME, MANIFEST_NAME, SIGNATURE_NAME = "README.md", "manifest.json", "manifest.json.asc"
RECORDS = "releases"
"""Folder with a record of every release, `1.json` and on."""
LARGEST_RECORD = 2**26
"""Bytes of a record: 200,000 requests."""


class Entry(BaseModel):
    """What a release says of one request."""

    model_config = ConfigDict(frozen=True)

    kind: str
    name: str
    """The concept; of a private one its id."""
    key: str
    """Key of its eraser's job: see `jobs.Job`."""
    figures: dict[str, float]
    """What was measured with its eraser alone."""


class Record(BaseModel):
    """A release, as `releases/NUMBER.json` keeps it."""

    model_config = ConfigDict(frozen=True)

    number: int
    created: str
    version: str
    """Version of this package."""
    base: str
    digest: str
    """What `jobs.base_digest` says of the base."""
    requests: dict[str, Entry]
    figures: dict[str, dict[str, float]]
    """Kind of request to what was measured with all erasers together: see `working.figures_of`."""
    gates: dict[str, bool]
    """Condition to whether it holds, and so speaks against the release."""
    manifest: str
    """SHA-256 of the manifest."""


class Changes(NamedTuple):
    """What differs from the release before, by id."""

    added: tuple[str, ...]
    withdrawn: tuple[str, ...]
    changed: tuple[str, ...]

    @classmethod
    def between(cls, before: dict[str, Entry], after: dict[str, Entry]) -> Changes:
        """Return what differs between two releases."""
        both = before.keys() & after.keys()
        return cls(
            tuple(sorted(after.keys() - before.keys())),
            tuple(sorted(before.keys() - after.keys())),
            tuple(sorted(name for name in both if before[name].key != after[name].key)),
        )


def last_record(out: Path) -> Record | None:
    """Return the record of the newest release in a folder.

    Raises:
        EsdLoraError: If it is damaged.
    """
    numbers = [int(file.stem) for file in (out / RECORDS).glob("*.json") if file.stem.isdecimal()]
    if not numbers:
        return None
    file = out / RECORDS / f"{max(numbers)}.json"
    try:
        return Record.model_validate_json(read_bounded(file, LARGEST_RECORD))
    except ValidationError as error:
        raise EsdLoraError(f"{file} is damaged ({first_fault(error)}). Restore it.") from error
    except OSError as error:
        raise EsdLoraError(f"{file} cannot be read ({error.strerror or error}). Restore it.") from error


def same_content(before: Record, after: Record) -> bool:
    """Return whether nothing of a release would differ but its number and date."""
    aside = {"number", "created", "manifest"}
    return before.model_dump(exclude=aside) == after.model_dump(exclude=aside)


def render_card(record: Record, changes: Changes) -> str:
    """Return the card: what was erased and measured, and what has changed, in Markdown."""

    def cell(text: object) -> str:
        return printable(str(text)).replace("|", "\\|")

    def share(figures: dict[str, float], name: str) -> str:
        return f"{figures[name]:.1%}" if name in figures else ""

    def listed(ids: Sequence[str]) -> str:
        return ", ".join(map(cell, ids)) or "none"

    lines = [
        f"# Release {record.number}",
        "",
        f"Made from {cell(record.base)} by esd-lora {record.version}, {record.created[:10]}: {len(record.requests)} requests"
        " erased. *Left* is the share of pictures on which what was erased is still seen, *kept* that of everything else,"
        " relative to the base.",
        "",
        "| kind, all together | requests | left | kept |",
        "|---|---|---|---|",
    ]
    for kind in dict.fromkeys(entry.kind for entry in record.requests.values()):
        count = sum(entry.kind == kind for entry in record.requests.values())
        figures = record.figures.get(kind, {})
        lines.append(f"| {kind} | {count} | {share(figures, 'left')} | {share(figures, 'kept')} |")
    lines += [
        "",
        f"Since the release before: added {listed(changes.added)}; withdrawn {listed(changes.withdrawn)}; made anew"
        f" {listed(changes.changed)}.",
        "",
        "| request | erases | kind | left, alone | kept, alone |",
        "|---|---|---|---|---|",
    ]
    for name, entry in sorted(record.requests.items()):
        figures = entry.figures
        lines.append(
            f"| {cell(name)} | {cell(entry.name)} | {entry.kind} | {share(figures, 'left')} | {share(figures, 'kept')} |"
        )
    lines += [
        "",
        "Erasing is no proof: other words, or further training, may bring back some of it. `manifest.json` has the SHA-256 of"
        " every file here.",
        "",
    ]
    return "\n".join(lines)


def write_manifest(folder: Path, number: int, content: str, signed_by: str | None) -> str:
    """Write the SHA-256 of every file in a folder into its manifest, sign that with GnuPG if asked to, and return its own.

    Args:
        folder: What is published.
        number: Number of the release.
        content: Hash of what the stack was made from: see `published_content`.
        signed_by: GnuPG's name of the key; not signed unless given.

    Raises:
        EsdLoraError: If GnuPG is not there, or refuses.
    """
    manifest, signature = folder / MANIFEST_NAME, folder / SIGNATURE_NAME
    hashes = hash_folder(folder, (manifest, signature))
    document = {"release": number, "content": content, "sha256": hashes}
    text = json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n"
    signature.unlink(missing_ok=True)
    write_atomically(manifest, text)
    if signed_by is not None:
        with replaced_file(signature) as file:
            sign(manifest, file, signed_by)
    return hashlib.sha256(text).hexdigest()


def published_content(folder: Path) -> str:
    """Return the hash of what a published stack was made from; empty where nothing is published.

    Raises:
        EsdLoraError: If its manifest is damaged.
    """
    manifest = folder / MANIFEST_NAME
    return str(read_json(manifest).get("content", "")) if manifest.is_file() else ""


def sign(file: Path, signature: Path, signed_by: str) -> None:
    """Write GnuPG's detached signature of a file, in ASCII.

    Raises:
        EsdLoraError: If GnuPG is not there, or refuses.
    """
    program = shutil.which("gpg")
    if program is None:
        raise EsdLoraError("a signature needs GnuPG, which is not installed: install gpg, or leave --sign out.")
    command = [program, "--batch", "--yes", "--armor", "--local-user", signed_by, "--output", str(signature)]
    done = subprocess.run([*command, "--detach-sign", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EsdLoraError(f"GnuPG does not sign as {signed_by!r}: {shortened(done.stderr)}. Check --sign.")
