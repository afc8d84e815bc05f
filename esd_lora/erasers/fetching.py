"""Erasers on the Hugging Face Hub: listed, fetched into the cache, and checked before anything reads them.

A repository may be anyone's. Only files of five kinds are taken, under names that stay below a directory; what arrives is held
against the size and hash that the Hub announced; nothing is unpickled, and no code of the repository is run.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from esd_lora.erasers.eraser import ERASER_FILES, WEIGHTS_NAME
from esd_lora.erasers.hub_errors import reporting_hub_errors
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.files import hash_file
from esd_lora.wording import HubId

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

ALLOWED = (".safetensors", ".json", ".yaml", ".md", ".png")
"""Kinds of files that are taken from a repository."""
_MAX_WEIGHTS, _MAX_OTHER = 4 * 2**30, 64 * 2**20  # bytes of the largest file that is taken
_MAX_FILES = 500  # an eraser has a dozen


class Snapshot(NamedTuple):
    """A repository at one commit, in the Hub's cache."""

    folder: Path
    commit: str
    files: list[str]
    """Names below the folder of the files that were fetched and checked."""
    left_out: list[str]
    """Names of files in the repository of kinds that are not taken."""


def locate(eraser: str | Path) -> Path:
    """Return where an eraser lies: its path as it is, or for a Hub id its folder in the Hub's cache, fetched if need be.

    Raises:
        EsdLoraError: If it has to be fetched and cannot be.
    """
    hub_id = HubId.read(eraser) if isinstance(eraser, str) else None
    if any(len(os.fsencode(part)) > 255 for part in Path(eraser).parts):  # which no file system takes
        raise EsdLoraError(f"no eraser at {str(eraser)[:80]}...: expected a path, or owner/name on the Hub.")
    return Path(eraser) if hub_id is None or Path(eraser).exists() else fetch(hub_id)


def fetch(hub_id: HubId) -> Path:
    """Fetch what makes an eraser or a stack, and no pictures, into the Hub's cache, and return its folder there.

    What is in the cache is used when the Hub cannot be reached, or has too much to do.

    Raises:
        EsdLoraError: If there is no such eraser, it may not be read, or it is not to be trusted.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return take_snapshot(hub_id, whole=False).folder
    except EsdLoraError as error:
        cause = error.__cause__
        if isinstance(cause, RepositoryNotFoundError):
            raise EsdLoraError(f"there is no path {hub_id} here, and {error}") from cause
        if cause is None or isinstance(cause, HFValidationError):
            raise
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500 and cause.response.status_code != 429:
            raise
        for name in ERASER_FILES:
            cached = try_to_load_from_cache(hub_id.repo, name, revision=hub_id.revision)
            if isinstance(cached, str):
                return Path(cached).parent
        raise


def take_snapshot(hub_id: HubId, *, whole: bool) -> Snapshot:
    """List a repository and fetch its files into the cache, all of one commit, each as the Hub announced it.

    Args:
        hub_id: The repository.
        whole: Whether to take the card, pictures and all else that may be taken, too; otherwise an eraser's weights alone, or
            the files of a stack.

    Raises:
        EsdLoraError: If it holds no eraser, or something in it is not as it should be.
    """
    wrong: list[str] = []
    for _ in range(2):  # it may be changed between listing and fetching
        with reporting_hub_errors(str(hub_id)):
            commit, files, left_out = _list_files(hub_id)
        names = list(files)
        if not {*names} & {*ERASER_FILES}:
            held = ", ".join(sorted(names)[:5]) or "nothing that may be taken"
            raise EsdLoraError(f"{hub_id} on the Hub holds no eraser: expected {' or '.join(ERASER_FILES)}, found {held}.")
        if not whole:
            stack = [name for name in names if name.endswith((".safetensors", ".yaml"))]
            names = [WEIGHTS_NAME] if WEIGHTS_NAME in names else stack
        with reporting_hub_errors(str(hub_id), largest=max(files[name].size for name in names)):
            newest = _download(hub_id, commit, names)
        folder = newest.parent / commit
        wrong = [name for name in names if not _is_as_announced(folder / name, files[name])]
        for name in wrong:
            (folder / name).resolve().unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
        if newest != folder:  # what came from there was not checked
            for name in ERASER_FILES:
                (newest / name).unlink(missing_ok=True)
        elif not wrong:
            for name in names:
                if name.lower().endswith(".safetensors"):
                    read_header(folder / name)
            return Snapshot(folder, commit, names, left_out)
    what = wrong[0] if wrong else "what it holds"
    raise EsdLoraError(f"{what} of {hub_id} did not arrive as the Hub announced it. Do not trust it if it stays so.")


def _list_files(hub_id: HubId) -> tuple[str, dict[str, RepoFile], list[str]]:
    """Return the commit that a revision stands for now, the files that may be taken by name, and the names of all others.

    Raises:
        EsdLoraError: If a name leads elsewhere, or files are too many or too large.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = str(api.model_info(hub_id.repo, revision=hub_id.revision).sha)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise EsdLoraError(f"the Hub gave no commit for {hub_id}. Try again later.")
    listed = api.list_repo_tree(hub_id.repo, recursive=True, revision=commit)
    files = list(islice((file for file in listed if isinstance(file, RepoFile)), _MAX_FILES + 1))
    if len(files) > _MAX_FILES:
        raise EsdLoraError(f"{hub_id} holds more than {_MAX_FILES} files: that is no eraser. Nothing was fetched.")
    if not all(map(_is_described, files)):
        raise TypeError("a file without name, size or hash is listed")
    allowed: dict[str, RepoFile] = {}
    left_out: list[str] = []
    for file in files:
        parts = file.path.split("/")
        if any(re.fullmatch(r"[. ]*", p) or re.search(r"[\\:]|[. ]$", p) or not p.isprintable() or len(p) > 120 for p in parts):
            raise EsdLoraError(f"{hub_id} holds a file named {file.path!r}, which leads out of its directory. Do not trust it.")
        kind = PurePosixPath(file.path).suffix.lower()
        if kind not in ALLOWED or any(part.startswith(".") for part in parts):
            left_out += [file.path] if file.path != ".gitattributes" else []  # which every repository has
            continue
        if file.size > (_MAX_WEIGHTS if kind == ".safetensors" else _MAX_OTHER):
            raise EsdLoraError(
                f"{hub_id} holds {file.path} of {file.size:,} bytes, too large for an eraser's. Nothing was fetched."
            )
        allowed[file.path] = file
    if sum(file.size for file in allowed.values()) > 2 * _MAX_WEIGHTS:
        raise EsdLoraError(f"{hub_id} is too large in all for an eraser. Nothing was fetched.")
    return commit, allowed, left_out


def _is_described(file: RepoFile) -> bool:
    """Return whether what the Hub says of a file is of the types that its client announces."""
    texts: list[object] = [file.path, file.blob_id, file.lfs.sha256 if file.lfs else ""]
    size = cast("object", file.size)
    return isinstance(size, int) and size >= 0 and all(isinstance(text, str) for text in texts)


def _download(hub_id: HubId, commit: str, names: list[str]) -> Path:
    """Fetch files of a commit into the cache; return the folder there of the commit that the revision stands for by then."""
    import huggingface_hub

    client = cast("Any", huggingface_hub)  # half typed
    if not all(isinstance(client.try_to_load_from_cache(hub_id.repo, name, revision=commit), str) for name in names):
        client.snapshot_download(hub_id.repo, revision=commit, allow_patterns=[glob.escape(name) for name in names])
    # By the name of the revision too, so that the cache knows its commit when the Hub is away.
    first = next(name for name in ERASER_FILES if name in names)
    return Path(client.hf_hub_download(hub_id.repo, first, revision=hub_id.revision)).parent


def _is_as_announced(path: Path, file: RepoFile) -> bool:
    """Return whether a file has the announced size and hash: SHA-256 of a large file, git's of a small one."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.lfs:
        return hash_file(path) == file.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest() == file.blob_id
