"""Erasers on the Hugging Face Hub: found, fetched into the cache, and checked before anything reads them.

A repository may be anyone's. Only files of five kinds are taken, under names that stay below a directory; what arrives is held
against the size and hash that the Hub announced; nothing is unpickled, and no code of the repository is run.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from esd_lora.eraser import RUN_FILES, WEIGHTS_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.hub_answers import asked
from esd_lora.outputs import clear_output, hash_file, slug, told, write_whole
from esd_lora.tensor_files import read_header

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

MANIFEST_NAME = "stack.yaml"
ALLOWED = (".safetensors", ".json", ".yaml", ".md", ".png")
"""Kinds of files that are taken from a repository."""
_LARGEST = {".safetensors": 4 * 2**30}
_LARGE = 64 * 2**20  # bytes, of a document or a picture
_MOST = 500  # files; an eraser has a dozen


class HubId(NamedTuple):
    """`owner/name`, or `owner/name@revision`."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @classmethod
    def read(cls, text: str) -> HubId | None:
        """The id, or `None` if the text is none, but a path."""
        found = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?", text)
        if not found or found[1].lower().endswith((*ALLOWED, ".yml", ".pt", ".ckpt", ".bin")):
            return None
        return cls(found[1], found[2])


def located(eraser: str | Path) -> Path:
    """Where an eraser lies: its path as it is, or for a Hub id the place in the cache where it was put.

    Raises:
        EsdLoraError: If it has to be fetched and cannot be.
    """
    hub_id = None if Path(eraser).exists() else HubId.read(str(eraser))
    return fetch(hub_id) if hub_id else Path(eraser)


def fetch(hub_id: HubId) -> Path:
    """Fetches what makes an eraser or a stack, and no pictures, into the Hub's cache.

    What is in the cache is used when the Hub cannot be reached.

    Raises:
        EsdLoraError: If there is no such eraser, it may not be read, or it is not to be trusted.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with asked(str(hub_id)):
            _, files, _ = _listing(hub_id)
    except EsdLoraError as error:
        if error.__cause__ is None or isinstance(error.__cause__, HfHubHTTPError):  # it was reached
            raise
        for name in (WEIGHTS_NAME, MANIFEST_NAME):
            cached = try_to_load_from_cache(hub_id.repo, name, revision=hub_id.revision)
            if isinstance(cached, str):
                return Path(cached).parent
        raise
    wanted = [file for file in files if file.path == WEIGHTS_NAME]
    if not wanted:
        wanted = [file for file in files if file.path.endswith((".safetensors", ".yaml"))]
        if MANIFEST_NAME not in (file.path for file in wanted):
            there = ", ".join(sorted(file.path for file in wanted)[:5]) or "no safetensors file"
            raise EsdLoraError(
                f"{hub_id} on the Hub holds no eraser: expected {WEIGHTS_NAME} or {MANIFEST_NAME}, found {there}."
            )
    places = {file.path: _download(hub_id, file) for file in wanted}
    return next(places[name] for name in (WEIGHTS_NAME, MANIFEST_NAME) if name in places).parent


class Pulled(NamedTuple):
    """What was taken from the Hub."""

    directory: Path
    commit: str
    files: list[str]
    left_out: list[str]
    """Files of kinds that are not taken."""


def pull(repo: str, out: str | Path, *, force: bool = False) -> Pulled:
    """Fetches an eraser or a stack with its card and pictures into a directory.

    Everything is checked before the first file is put there: names, kinds, sizes, hashes, and that the eraser loads.

    Args:
        repo: `owner/name`, or `owner/name@revision` with a branch, a tag, a commit or `refs/pr/1`.
        out: Directory, new or empty.
        force: Write over what is there.

    Raises:
        EsdLoraError: If there is no such repository, it may not be read, the Hub cannot be reached, or something in it is not
            as it should be; then nothing was written.
    """
    from esd_lora.manifests import load_eraser

    hub_id, out = HubId.read(repo), Path(out)
    if hub_id is None:
        raise EsdLoraError(f"{repo!r} is no repository on the Hub: expected owner/name, or owner/name@revision.")
    clear_output(out, force, ())
    with asked(str(hub_id)):
        commit, files, left_out = _listing(hub_id)
    names = [file.path for file in files]
    if not {WEIGHTS_NAME, MANIFEST_NAME} & set(names):
        there = ", ".join(names[:5]) or "none that may be taken"
        raise EsdLoraError(f"{hub_id} on the Hub holds no eraser: expected {WEIGHTS_NAME} or {MANIFEST_NAME}, found {there}.")
    places = {file.path: _download(hub_id, file) for file in files}
    first = WEIGHTS_NAME if WEIGHTS_NAME in places else MANIFEST_NAME
    load_eraser(places[first].parent)
    clear_output(out, force, RUN_FILES)
    for name, place in places.items():
        with told(out):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out / name, place.read_bytes())
    return Pulled(out, commit, names, left_out)


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

    filters = ["esd-lora", *([f"erases:{slug(concept)}"] if concept else []), *([f"base_model:{base}"] if base else []), *tags]
    with asked("the list of models"):
        models = list(HfApi().list_models(filter=filters, search=text, sort="downloads", limit=limit, full=True))
    found: list[Found] = []
    for model in models:
        said = model.tags or []
        bases = [tag.rpartition(":")[2] for tag in said if re.fullmatch(r"base_model:[^:]+", tag)]
        erases = [tag.removeprefix("erases:").replace("-", " ") for tag in said if tag.startswith("erases:")]
        day = model.last_modified.date().isoformat() if model.last_modified else ""
        found.append(Found(model.id, erases, ", ".join(bases), model.downloads or 0, model.likes or 0, day))
    return found


def _listing(hub_id: HubId) -> tuple[str, list[RepoFile], list[str]]:
    """Commit, the files that may be taken, and the names of those that are left out.

    Raises:
        EsdLoraError: If a name leads elsewhere, or files are too many or too large.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = api.model_info(hub_id.repo, revision=hub_id.revision).sha
    if not re.fullmatch("[0-9a-f]{40}", commit or ""):
        raise EsdLoraError(f"the Hub gave no commit for {hub_id}. Try again later.")
    assert commit is not None
    entries = list(api.list_repo_tree(hub_id.repo, recursive=True, revision=commit))
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    if len(files) > _MOST:
        raise EsdLoraError(f"{hub_id} holds {len(files):,} files, more than {_MOST}: that is no eraser. Nothing was fetched.")
    taken: list[RepoFile] = []
    left_out: list[str] = []
    for file in files:
        parts = file.path.split("/")
        if any(re.fullmatch(r"\.*", part) or re.search(r"[\\:\x00-\x1f\x7f]", part) or len(part) > 200 for part in parts):
            raise EsdLoraError(f"{hub_id} holds a file named {file.path!r}, which leads out of its directory. Do not trust it.")
        kind = PurePosixPath(file.path).suffix.lower()
        if kind not in ALLOWED or any(part.startswith(".") for part in parts):
            left_out.append(file.path)
            continue
        if file.size > _LARGEST.get(kind, _LARGE):
            raise EsdLoraError(
                f"{hub_id} holds {file.path} of {file.size:,} bytes, too large for an eraser's. Nothing was fetched."
            )
        taken.append(file)
    return commit, taken, left_out


def _download(hub_id: HubId, file: RepoFile) -> Path:
    """One file in the cache, once it is seen to be what the Hub announced; another one is thrown out of the cache."""
    import huggingface_hub

    try:
        with asked(str(hub_id)):
            # By the name that was asked for, so that the cache knows it when the Hub is away; the hash tells if it moved.
            half_typed = cast("Any", huggingface_hub)
            place = Path(half_typed.hf_hub_download(hub_id.repo, file.path, revision=hub_id.revision))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise EsdLoraError(f"{file.path} of {hub_id} could not be fetched ({reason}). Try again.") from error
    announced = file.lfs.sha256 if file.lfs else file.blob_id
    if place.stat().st_size != file.size or (hash_file(place) if file.lfs else _blob_id(place)) != announced:
        blob = place.resolve()
        place.unlink()
        blob.unlink(missing_ok=True)
        raise EsdLoraError(
            f"{file.path} of {hub_id} did not arrive as the Hub announced it. Fetch it again; if it stays so, do not trust it."
        )
    if place.suffix.lower() == ".safetensors":
        read_header(place)
    return place


def _blob_id(file: Path) -> str:
    """What git calls a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()
