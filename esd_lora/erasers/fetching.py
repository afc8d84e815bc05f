"""Erasers on the Hugging Face Hub: found, fetched into the cache, and checked before anything reads them.

A repository may be anyone's. Only files of five kinds are taken, under names that stay below a directory; what arrives is held
against the size and hash that the Hub announced; nothing is unpickled, and no code of the repository is run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from esd_lora.erasers.eraser import MANIFEST_NAME, WEIGHTS_NAME
from esd_lora.erasers.hub_errors import reporting_hub_errors
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.files import hash_file
from esd_lora.wording import HubId

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

ALLOWED = (".safetensors", ".json", ".yaml", ".md", ".png")
"""Kinds of files that are taken from a repository."""
_WEIGHTS, _OTHERS = 4 * 2**30, 64 * 2**20  # bytes of the largest file that is taken
_MOST = 500  # files; an eraser has a dozen
_FIRST = (WEIGHTS_NAME, MANIFEST_NAME)  # one of these makes a repository an eraser's


def located(eraser: str | Path) -> Path:
    """Where an eraser lies: its path as it is, or for a Hub id the place in the cache where it was put.

    Raises:
        EsdLoraError: If it has to be fetched and cannot be.
    """
    hub_id = HubId.read(eraser) if isinstance(eraser, str) else None
    if any(len(part.encode()) > 255 for part in Path(eraser).parts):  # which no file system takes
        raise EsdLoraError(f"no eraser at {str(eraser)[:80]}...: expected a path, or owner/name on the Hub.")
    return Path(eraser) if hub_id is None or Path(eraser).exists() else fetch(hub_id)


def fetch(hub_id: HubId) -> Path:
    """Fetches what makes an eraser or a stack, and no pictures, into the Hub's cache.

    What is in the cache is used when the Hub cannot be reached, or has too much to do.

    Raises:
        EsdLoraError: If there is no such eraser, it may not be read, or it is not to be trusted.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    def needed(names: Collection[str]) -> list[str]:
        return [WEIGHTS_NAME] if WEIGHTS_NAME in names else [n for n in names if n.endswith((".safetensors", ".yaml"))]

    try:
        places = _take(hub_id, needed).places
        return places[next(name for name in _FIRST if name in places)].parent
    except EsdLoraError as error:
        cause = error.__cause__
        if isinstance(cause, RepositoryNotFoundError):
            raise EsdLoraError(f"there is no path {hub_id} here, and {error}") from cause
        if cause is None or isinstance(cause, HFValidationError):
            raise
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500 and cause.response.status_code != 429:
            raise
        for name in _FIRST:
            cached = try_to_load_from_cache(hub_id.repo, name, revision=hub_id.revision)
            if isinstance(cached, str):
                return Path(cached).parent
        raise


class _Taken(NamedTuple):
    commit: str
    places: dict[str, Path]
    left_out: list[str]


def _take(hub_id: HubId, choose: Callable[[Collection[str]], list[str]], again: bool = True) -> _Taken:
    """Lists a repository and puts what is chosen into the cache, all of one commit, each file as the Hub announced it.

    Args:
        hub_id: What to take.
        choose: From the names that may be taken those that are.
        again: Whether to list once more if something differs: it may have been changed between listing and fetching.

    Raises:
        EsdLoraError: If it holds no eraser, or something in it is not as it should be.
    """
    with reporting_hub_errors(str(hub_id)):
        commit, files, left_out = _listing(hub_id)
    if not files.keys() & set(_FIRST):
        there = ", ".join(sorted(files)[:5]) or "nothing that may be taken"
        raise EsdLoraError(f"{hub_id} on the Hub holds no eraser: expected {' or '.join(_FIRST)}, found {there}.")
    places = {name: _download(hub_id, files[name]) for name in choose(files)}
    wrong = [name for name, place in places.items() if not _is_as_announced(place, files[name])]
    for name in wrong:
        places[name].resolve().unlink(missing_ok=True)
        places[name].unlink(missing_ok=True)
    if wrong or len({place.parents[name.count("/")] for name, place in places.items()}) > 1:
        if again:
            return _take(hub_id, choose, again=False)
        what = wrong[0] if wrong else "what it holds"
        raise EsdLoraError(f"{what} of {hub_id} did not arrive as the Hub announced it. Do not trust it if it stays so.")
    for place in places.values():
        if place.suffix.lower() == ".safetensors":
            read_header(place)
    return _Taken(commit, places, left_out)


def _listing(hub_id: HubId) -> tuple[str, dict[str, RepoFile], list[str]]:
    """Commit, the files that may be taken by name, and the names of those that are left out.

    Raises:
        EsdLoraError: If a name leads elsewhere, or files are too many or too large.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = api.model_info(hub_id.repo, revision=hub_id.revision).sha or ""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise EsdLoraError(f"the Hub gave no commit for {hub_id}. Try again later.")
    files = [file for file in api.list_repo_tree(hub_id.repo, recursive=True, revision=commit) if isinstance(file, RepoFile)]
    if len(files) > _MOST:
        raise EsdLoraError(f"{hub_id} holds {len(files):,} files, more than {_MOST}: that is no eraser. Nothing was fetched.")
    taken: dict[str, RepoFile] = {}
    left_out: list[str] = []
    for file in files:
        parts = file.path.split("/")
        if any(re.fullmatch(r"[. ]*", p) or re.search(r"[\\:]|[. ]$", p) or not p.isprintable() or len(p) > 120 for p in parts):
            raise EsdLoraError(f"{hub_id} holds a file named {file.path!r}, which leads out of its directory. Do not trust it.")
        kind = PurePosixPath(file.path).suffix.lower()
        if kind not in ALLOWED or any(part.startswith(".") for part in parts):
            left_out += [file.path] if file.path != ".gitattributes" else []  # which every repository has
            continue
        if file.size > (_WEIGHTS if kind == ".safetensors" else _OTHERS):
            raise EsdLoraError(
                f"{hub_id} holds {file.path} of {file.size:,} bytes, too large for an eraser's. Nothing was fetched."
            )
        taken[file.path] = file
    if sum(file.size for file in taken.values()) > 2 * _WEIGHTS:
        raise EsdLoraError(f"{hub_id} is too large in all for an eraser. Nothing was fetched.")
    return commit, taken, left_out


def _download(hub_id: HubId, file: RepoFile) -> Path:
    """One file in the cache."""
    import huggingface_hub

    with reporting_hub_errors(str(hub_id)):
        # By the name that was asked for, so that the cache knows it when the Hub is away.
        half_typed = cast("Any", huggingface_hub)
        return Path(half_typed.hf_hub_download(hub_id.repo, file.path, revision=hub_id.revision))


def _is_as_announced(place: Path, file: RepoFile) -> bool:
    """Whether size and hash are: SHA-256 of a large file, git's of a small one."""
    return place.stat().st_size == file.size and (
        hash_file(place) == file.lfs.sha256 if file.lfs else _blob_id(place) == file.blob_id
    )


def _blob_id(file: Path) -> str:
    """What git calls a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()
