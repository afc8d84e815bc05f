"""The erasers that there are: in folders and the Hub's cache on this machine, and on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.erasers.header import HEADER_KEY, EraserHeader, parse_header
from esd_lora.erasers.hub_errors import reporting_hub_errors
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.formats.cards import concept_tag, measured_line
from esd_lora.wording import HubId

_SKIPPED = {"venv", "node_modules", "__pycache__"}


class LocalEraser(NamedTuple):
    """An eraser on this machine; its tensors were not read."""

    place: str
    """Directory, or Hub id of one in the cache."""
    header: EraserHeader
    layers: int
    """Number of layers it changes."""
    size: int
    """Size of the file in bytes."""

    COLUMNS = ("where", "erases", "base", "scope", "layers", "size", "measured")

    def row(self) -> list[str]:
        """Return a row of a table under `COLUMNS`."""
        header = self.header
        names = ", ".join(c.name if c.weight == 1 else f"{c.name} x {c.weight:g}" for c in header.concepts)
        measured = measured_line(header.evaluation).partition(":")[0]
        return [self.place, names, header.base, header.scope, str(self.layers), f"{self.size / 1000:,.0f} kB", measured]

    def as_json(self) -> dict[str, Any]:
        """Return everything, for other programs."""
        return self._asdict() | {"header": self.header.model_dump(mode="json")}


class HubEraser(NamedTuple):
    """An eraser on the Hub, as its page says."""

    repo: str
    erases: list[str]
    base: str
    downloads: int
    likes: int
    updated: str

    COLUMNS = ("repository", "erases", "base", "downloads", "likes", "updated")

    def row(self) -> list[str]:
        """Return a row of a table under `COLUMNS`."""
        return [self.repo, ", ".join(self.erases), self.base, str(self.downloads), str(self.likes), self.updated]

    def as_json(self) -> dict[str, Any]:
        """Return everything, for other programs."""
        return self._asdict()


def catalog(folders: Sequence[str | Path] = (".",), *, cache: bool = True) -> list[LocalEraser]:
    """List the erasers below some folders, and those that were fetched from the Hub.

    Args:
        folders: Looked through to any depth, but for environments, links to folders, caches, and what starts with a dot.
        cache: Whether to look into the Hub's cache, too.

    Raises:
        EsdLoraError: If a folder is not there.
    """
    places: list[tuple[str, Path]] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise EsdLoraError(f"there is no folder {folder} to look for erasers in.")
        places += [(str(directory), directory) for directory in _directories(folder)]
    if cache:
        places += _cached()
    return [eraser for place, directory in places if (eraser := _read(place, directory / WEIGHTS_NAME))]


def _directories(folder: Path) -> Iterator[Path]:
    """Yield the directories at or below a folder that hold weights."""
    for directory, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if name not in _SKIPPED and not name.startswith((".", "models--")))
        if WEIGHTS_NAME in names:
            yield Path(directory)


def _cached() -> Iterator[tuple[str, Path]]:
    """Yield Hub id and directory of every commit of a model in the Hub's cache that holds weights."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, ValueError):  # there is none, or a file where it should be
        return
    for repo in sorted((repo for repo in repos if repo.repo_type == "model"), key=lambda repo: repo.repo_id):
        for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
            if (revision.snapshot_path / WEIGHTS_NAME).is_file():
                name = min(revision.refs, default=revision.commit_hash)
                yield str(HubId(repo.repo_id, name)), revision.snapshot_path


def _read(place: str, file: Path) -> LocalEraser | None:
    """Return what a file says; `None` where it is no eraser of ours, or damaged: a list is no place to stop at."""
    try:
        tensors, metadata, _ = read_header(file)
        if HEADER_KEY not in metadata:
            return None
        return LocalEraser(place, parse_header(metadata[HEADER_KEY], file), len(tensors) // 2, file.stat().st_size)
    except EsdLoraError:
        return None


def search(
    text: str | None = None, *, concept: str | None = None, base: str | None = None, tags: tuple[str, ...] = (), limit: int = 20
) -> list[HubEraser]:
    """Search the Hub for erasers; those downloaded most come first.

    Args:
        text: Words of a repository's name.
        concept: What is to be erased; a card of this toolkit has a tag for each concept.
        base: Hub id of the base it was made for.
        tags: Further tags that it must have.
        limit: Largest number of erasers to return.

    Raises:
        EsdLoraError: If the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    filters = ["esd-lora", *tags]
    filters += [concept_tag(concept)] if concept else []
    filters += [f"base_model:{base}"] if base else []
    with reporting_hub_errors("the list of models"):
        return [
            _describe(model)
            for model in HfApi().list_models(filter=filters, search=text, sort="downloads", limit=limit, full=True)
        ]


def _describe(model: Any) -> HubEraser:
    """Return an eraser as the Hub lists it.

    Raises:
        TypeError: If something in the list is of another type than it should be.
    """
    tags, downloads, likes = model.tags or [], model.downloads or 0, model.likes or 0
    if not all(isinstance(text, str) for text in (model.id, *tags)) or not all(isinstance(n, int) for n in (downloads, likes)):
        raise TypeError("a model without name, tags or counts is listed")
    bases = [tag.rpartition(":")[2] for tag in tags if re.fullmatch(r"base_model:[^:]+", tag)]
    names = [tag.removeprefix("erases:").replace("-", " ") for tag in tags if tag.startswith("erases:")]
    day = model.last_modified.date().isoformat() if model.last_modified else ""
    return HubEraser(model.id, names, ", ".join(bases), downloads, likes, day)
