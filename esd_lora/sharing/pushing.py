"""Pushing an eraser to the Hugging Face Hub: what will be public is laid out, checked and shown before a byte leaves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from esd_lora.erasers.eraser import SAMPLES, WEIGHTS_NAME, Eraser
from esd_lora.erasers.header import EraserHeader
from esd_lora.erasers.hub_errors import reporting_hub_errors
from esd_lora.erasers.manifests import load_eraser
from esd_lora.erasers.privacy import without_paths
from esd_lora.errors import EsdLoraError
from esd_lora.formats.cards import CARD_NAME, Publication, Sample, measured_line, render_card
from esd_lora.formats.exporting import kohya_content
from esd_lora.formats.licenses import License, license_of
from esd_lora.pictures import clean_png, read_samples
from esd_lora.wording import HubId, is_hub_id, printable


class Draft(NamedTuple):
    """What a push would make public."""

    repo: str
    license: License
    header: EraserHeader
    """The header as it will stand in the file."""
    files: dict[str, bytes]
    """Place in the repository to content."""
    target: str = ""
    """Where it goes and who will see it, once the Hub said what is there."""
    removed: tuple[str, ...] = ()
    """Files of an earlier push that are taken out."""

    def lines(self) -> list[str]:
        """Return what will be public, for reading before it is too late."""
        names = ", ".join(concept.name for concept in self.header.concepts)
        sizes = {place: f"{len(content):,}" for place, content in self.files.items()}
        width = max(map(len, sizes.values()))
        return [
            printable(line)
            for line in (
                f"{self.repo}{self.target and ', '}{self.target}",
                f"  erases {names} from {self.header.base}; licence {self.license.name}",
                f"  measured: {measured_line(self.header.evaluation)}",
                *(f"  {size:>{width}} bytes  {place}" for place, size in sizes.items()),
                *(f"  taken out  {place}" for place in self.removed),
                f"  {sum(map(len, self.files.values())):,} bytes in all; the weights' header and recipe.yaml name every prompt",
            )
        ]


class Pushed(NamedTuple):
    """What a push did."""

    url: str
    """Address of the repository, or of the pull request."""
    commit: str
    changed: bool
    """Whether there was anything that the repository did not hold already."""


def push(
    eraser: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    kohya: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    sensitive: bool = False,
    confirm: Callable[[Draft], bool] = lambda _: True,
) -> Pushed | None:
    """Publish an eraser: weights, card, recipe, and the pictures that its training or evaluation left.

    Files that the repository holds already are not sent again, so a push that broke off goes on when it is repeated.

    Args:
        eraser: Directory, safetensors file, manifest of a stack, or Hub id.
        repo: `owner/name`; made if it is not there.
        private: Make a new repository one that only its owner sees.
        revision: Branch to push to, made if it is not there, or `refs/pr/1`; `main` unless given.
        create_pr: Open a pull request instead.
        kohya: Put a file for A1111, Forge and ComfyUI beside it, as `kohya/NAME.safetensors`.
        license: The Hub's name of a license, or `NAME=URL`: see `licenses.license_of`; that of the base unless given.
        base_model: Hub id of the base, where the eraser was trained on a local copy. It takes the path's place everywhere.
        sensitive: Mask the concepts' names in the card, leave the base's pictures out, and mark the page as not for all
            audiences.
        confirm: Called with the draft, once the Hub has said what is there; nothing is sent unless it returns `True`.

    Returns:
        Where it is; `None` if it was not sent.

    Raises:
        EsdLoraError: If the eraser cannot be read, its base or license is not known, or the Hub refuses.
    """
    if revision is not None and not re.fullmatch(r"[A-Za-z0-9][\w./-]*", revision):
        raise EsdLoraError(f"revision {revision!r} is no name of a branch. Expected letters, digits and . _ - / in it.")
    draft = drafted(eraser, repo, revision=revision, kohya=kohya, license=license, base_model=base_model, sensitive=sensitive)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api, existing, has_branch = HfApi(), None, True
    with reporting_hub_errors(repo):
        try:
            existing = api.model_info(repo)
            existing = api.model_info(repo, revision=revision) if revision else existing
        except RevisionNotFoundError:
            has_branch = False
        except RepositoryNotFoundError:
            if create_pr:
                raise
        held = [sibling.rfilename for sibling in existing.siblings or []] if existing and not create_pr else []
        removed = tuple(place for place in held if place in _writable(repo) - {*draft.files})
    if existing and private and not existing.private:
        raise EsdLoraError(f"{repo} is there and public. Make it private on its page, or push without --private.")
    audience = "private" if (existing.private if existing else private) else "public: anyone can see and fetch it"
    branch = "as a pull request" if create_pr else f"on branch {revision}" if revision else ""
    draft = draft._replace(target=", ".join(filter(None, (branch, "" if existing else "new", audience))), removed=removed)
    if not confirm(draft):
        return None
    names = "a concept" if sensitive else ", ".join(concept.name for concept in draft.header.concepts)
    with reporting_hub_errors(repo, "Run the same command again: what arrived is not sent twice."):
        if existing is None:
            api.create_repo(repo, private=private, exist_ok=True)
        if revision and not revision.startswith("refs/") and not (existing and has_branch):
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(place, content) for place, content in draft.files.items()),
                *map(CommitOperationDelete, removed),
            ],
            commit_message=printable(f"Eraser of {names}")[:70],
            revision=revision,
            create_pr=create_pr,
        )
    return Pushed(commit.pr_url or str(commit.repo_url), commit.oid, existing is None or commit.oid != existing.sha)


def drafted(
    eraser: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    kohya: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    sensitive: bool = False,
) -> Draft:
    """Lay out what a push would make public, without the Hub: see `push` for arguments and errors."""
    if not is_hub_id(repo):
        raise EsdLoraError(f"{repo!r} is no name of a repository: expected owner/name, such as me/no-cat.")
    loaded = load_eraser(eraser)
    public = Eraser(loaded.pairs, without_paths(loaded.header, base_model))
    terms = license_of(public.header.base, license)
    files = public.files()
    samples: list[Sample] = []
    is_directory = (Path(eraser) / WEIGHTS_NAME).is_file()  # beside a file or a manifest lie pictures of anything
    for prompt, *pictures in read_samples(Path(eraser) / "samples") if is_directory else []:
        paths = {f"samples/{path.name}": path for path in (pictures[:1] if sensitive else pictures) if path}
        files |= {place: clean_png(path, None if sensitive else prompt) for place, path in paths.items()}
        samples.append(Sample(prompt, *paths))
    kohya_place = _kohya_place(repo) if kohya else None
    if kohya_place:
        files[kohya_place] = kohya_content(public)
    branch = None if revision and revision.startswith("refs/") else revision  # a pull request's card is read once it is merged
    card = render_card(public, Publication(HubId(repo, branch), terms, samples, kohya_place, sensitive))
    _check_card(card)
    return Draft(repo, terms, public.header, {CARD_NAME: card.encode(), **files})


def _kohya_place(repo: str) -> str:
    return f"kohya/{repo.partition('/')[2]}.safetensors"


def _writable(repo: str) -> set[str]:
    """Return what a push may write into a repository beside weights and card."""
    pictures = {f"samples/{i}_{name}.png" for i in range(1, SAMPLES + 1) for name in ("base", "erased")}
    return {"recipe.yaml", _kohya_place(repo)} | pictures


def _check_card(card: str) -> None:
    """Have huggingface_hub read the card as the Hub will."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise EsdLoraError(f"the card is not what the Hub reads ({error}). Report this with the eraser's header.") from error
    missing = [key for key in ("license", "library_name", "pipeline_tag", "tags") if not data.get(key)]
    if missing:
        raise EsdLoraError(f"the card lacks {', '.join(missing)}. Report this with the eraser's header.")
