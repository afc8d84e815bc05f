"""The erasers on this machine: in folders and in the Hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from esd_lora.erasers.cards import erases
from esd_lora.erasers.describing import measured
from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.erasers.header import HEADER_KEY, EraserHeader, parse_header
from esd_lora.erasers.hub_errors import reporting_hub_errors
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError

_SKIPPED = {"venv", "node_modules", "__pycache__"}


class Entry(NamedTuple):
    """An eraser that lies here; its tensors were not read."""

    place: str
    """Path, or for one in the cache its Hub id."""
    header: EraserHeader
    layers: int
    size: int
    """Of the file, bytes."""

    def row(self) -> list[str]:
        """Place, what it erases, base, scope, layers, size, and whether it was measured."""
        header = self.header
        names = ", ".join(c.name if c.weight == 1 else f"{c.name} x {c.weight:g}" for c in header.concepts)
        told = [self.place, names, header.base, header.scope, str(self.layers), f"{self.size / 1000:,.0f} kB"]
        return [*told, measured(header).partition(":")[0]]

    def as_json(self) -> dict[str, Any]:
        """Everything, for other programs."""
        return self._asdict() | {"header": self.header.model_dump(mode="json")}


HEAD = ("where", "erases", "base", "scope", "layers", "size", "measured")
"""Of a table of `Entry.row`."""


def catalog(folders: Sequence[str | Path] = (".",), *, cache: bool = True) -> list[Entry]:
    """Lists the erasers below some folders, and those that were fetched from the Hub.

    Args:
        folders: Looked through to any depth, but for environments, links to folders, caches, and what starts with a dot.
        cache: Whether to look into the Hub's cache, too.

    Raises:
        EsdLoraError: If a folder is not there.
    """
    found: list[Entry] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise EsdLoraError(f"there is no folder {folder} to look for erasers in.")
        found += [entry for file in _files(folder) if (entry := _entry(file, str(file.parent)))]
    return found + (_cached() if cache else [])


def _files(folder: Path) -> Iterator[Path]:
    for here, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if name not in _SKIPPED and not name.startswith((".", "models--")))
        if WEIGHTS_NAME in names:
            yield Path(here, WEIGHTS_NAME)


def _cached() -> list[Entry]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, ValueError):  # there is none, or a file where it should be
        return []
    found: list[Entry] = []
    for repo in sorted((repo for repo in repos if repo.repo_type == "model"), key=lambda repo: repo.repo_id):
        for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
            name = f"{repo.repo_id}@{next(iter(sorted(revision.refs)), revision.commit_hash)}"
            file = revision.snapshot_path / WEIGHTS_NAME
            found += [entry] if file.is_file() and (entry := _entry(file, name)) else []
    return found


def _entry(file: Path, place: str) -> Entry | None:
    """What a file says; `None` of one that is no eraser of ours, or is damaged: a list is no place to stop at."""
    try:
        head = read_header(file)
        text = head.metadata.get(HEADER_KEY)
        if text is None:
            return None
        return Entry(place, parse_header(text, file), len(head.tensors) // 2, file.stat().st_size)
    except EsdLoraError:
        return None


class Found(NamedTuple):
    """An eraser on the Hub."""

    repo: str
    erases: list[str]
    base: str
    downloads: int
    likes: int
    updated: str


def search(
    text: str | None = None, *, concept: str | None = None, base: str | None = None, tags: tuple[str, ...] = (), limit: int = 20
) -> list[Found]:
    """Finds erasers on the Hub, those downloaded most first.

    Args:
        text: Words of a repository's name.
        concept: What is to be erased; a card of this toolkit has a tag for each concept.
        base: Hub id of the base it was made for.
        tags: Further tags that it must have.
        limit: Most to find.

    Raises:
        EsdLoraError: If the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    filters = ["esd-lora", *tags]
    filters += [erases(concept)] if concept else []
    filters += [f"base_model:{base}"] if base else []
    with reporting_hub_errors("the list of models"):
        models = list(HfApi().list_models(filter=filters, search=text, sort="downloads", limit=limit, full=True))
    found: list[Found] = []
    for model in models:
        said = model.tags or []
        bases = [tag.rpartition(":")[2] for tag in said if re.fullmatch(r"base_model:[^:]+", tag)]
        names = [tag.removeprefix("erases:").replace("-", " ") for tag in said if tag.startswith("erases:")]
        day = model.last_modified.date().isoformat() if model.last_modified else ""
        found.append(Found(model.id, names, ", ".join(bases), model.downloads or 0, model.likes or 0, day))
    return found
