"""Pushing an eraser to the Hugging Face Hub: what will be public is laid out, checked and shown before a byte leaves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from esd_lora.erasers.cards import Publication, Sample
from esd_lora.erasers.describing import measured
from esd_lora.erasers.eraser import SAMPLES, WEIGHTS_NAME, Eraser
from esd_lora.erasers.header import HEADER_KEY, EraserHeader
from esd_lora.erasers.hub_errors import reporting_hub_errors
from esd_lora.erasers.licences import Licence, licence_of
from esd_lora.erasers.manifests import load_eraser
from esd_lora.erasers.tensor_files import file_content
from esd_lora.errors import EsdLoraError
from esd_lora.formats.exporting import kohya_content
from esd_lora.pictures import clean_png, read_samples
from esd_lora.recipe_files import dump_recipe
from esd_lora.sharing.privacy import without_paths
from esd_lora.wording import is_hub_id, printable


class Draft(NamedTuple):
    """What a push would make public."""

    repo: str
    licence: Licence
    header: EraserHeader
    """As it will stand in the file."""
    files: dict[str, bytes]
    """Place in the repository to content."""
    target: str = ""
    """Where it goes and who will see it, once the Hub was asked."""
    removed: tuple[str, ...] = ()
    """Files of an earlier push that are taken out."""

    def lines(self) -> list[str]:
        """For reading before it is too late."""
        names = ", ".join(concept.name for concept in self.header.concepts)
        sizes = {place: f"{len(content):,}" for place, content in self.files.items()}
        width = max(map(len, sizes.values()))
        return [
            printable(line)
            for line in (
                f"{self.repo}{self.target and ', '}{self.target}",
                f"  erases {names} from {self.header.base}; licence {self.licence.name}",
                f"  measured: {measured(self.header)}",
                *(f"  {size:>{width}} bytes  {place}" for place, size in sizes.items()),
                *(f"  taken out  {place}" for place in self.removed),
                f"  {sum(map(len, self.files.values())):,} bytes in all; the weights' header and recipe.yaml name every prompt",
            )
        ]


class Pushed(NamedTuple):
    """What a push did."""

    url: str
    """Of the repository, or of the pull request."""
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
    licence: str | None = None,
    base_model: str | None = None,
    sensitive: bool = False,
    confirm: Callable[[Draft], bool] = lambda _: True,
) -> Pushed | None:
    """Publishes an eraser: weights, card, recipe, and the pictures that its training or evaluation left.

    Files that the repository holds already are not sent again, so a push that broke off goes on when it is repeated.

    Args:
        eraser: Directory, safetensors file, manifest of a stack, or Hub id.
        repo: `owner/name`; made if it is not there.
        private: Of a new repository: only its owner sees it.
        revision: Branch to push to, made if it is not there, or `refs/pr/1`; `main` unless given.
        create_pr: Open a pull request instead.
        kohya: Put a file for A1111, Forge and ComfyUI beside it, as `kohya/NAME.safetensors`.
        licence: See `licences.licence_of`; that of the base unless given.
        base_model: Hub id of the base, where the eraser was trained on a local copy. It takes the path's place everywhere.
        sensitive: Mask the concepts' names in the card, leave the base's pictures out, and mark the page as not for all
            audiences.
        confirm: Is shown the draft, once the Hub has said what is there; nothing is sent unless it says yes.

    Returns:
        Where it is; `None` if it was not sent.

    Raises:
        EsdLoraError: If the eraser cannot be read, its base or licence cannot be told, or the Hub refuses.
    """
    if revision is not None and not re.fullmatch(r"[A-Za-z0-9][\w./-]*", revision):
        raise EsdLoraError(f"revision {revision!r} is no name of a branch. Expected letters, digits and . _ - / in it.")
    draft = drafted(eraser, repo, revision=revision, kohya=kohya, licence=licence, base_model=base_model, sensitive=sensitive)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api, there, branch = HfApi(), None, True
    with reporting_hub_errors(repo):
        try:
            there = api.model_info(repo)
            there = api.model_info(repo, revision=revision) if revision else there
        except RevisionNotFoundError:
            branch = False
        except RepositoryNotFoundError:
            if create_pr:
                raise
    if there and private and not there.private:
        raise EsdLoraError(f"{repo} is there and public. Make it private on its page, or push without --private.")
    seen = "private" if (there.private if there else private) else "public: anyone can see and fetch it"
    where = "as a pull request" if create_pr else f"on branch {revision}" if revision else ""
    held = [sibling.rfilename for sibling in there.siblings or []] if there and not create_pr else []
    removed = tuple(place for place in held if place in _written(repo) - {*draft.files})
    draft = draft._replace(target=", ".join(filter(None, (where, "new" * (there is None), seen))), removed=removed)
    if not confirm(draft):
        return None
    names = "a concept" if sensitive else ", ".join(concept.name for concept in draft.header.concepts)
    with reporting_hub_errors(repo, "Run the same command again: what arrived is not sent twice."):
        if there is None:
            api.create_repo(repo, private=private, exist_ok=True)
        if revision and not revision.startswith("refs/") and not (there and branch):
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(place, content) for place, content in draft.files.items()),
                *map(CommitOperationDelete, removed),
            ],
            commit_message=printable(f"Eraser of {names}")[:70],
            revision=revision,
            create_pr=create_pr,
        )
    return Pushed(done.pr_url or str(done.repo_url), done.oid, there is None or done.oid != there.sha)


def drafted(
    eraser: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    kohya: bool = False,
    licence: str | None = None,
    base_model: str | None = None,
    sensitive: bool = False,
) -> Draft:
    """Lays out what a push would make public, and does not ask the Hub: see `push` for arguments and errors."""
    if not is_hub_id(repo):
        raise EsdLoraError(f"{repo!r} is no name of a repository: expected owner/name, such as me/no-cat.")
    loaded = load_eraser(eraser)
    header = without_paths(loaded.header, base_model)
    published = Eraser(loaded.pairs, header)
    terms = licence_of(header.base, licence)
    files = {WEIGHTS_NAME: file_content(published.state_dict(), {"format": "pt", HEADER_KEY: header.model_dump_json()})}
    if header.recipes:
        files["recipe.yaml"] = "---\n".join(map(dump_recipe, header.recipes)).encode()
    samples: list[Sample] = []
    of_this = (Path(eraser) / WEIGHTS_NAME).is_file()  # beside a file or a manifest lie pictures of anything
    for prompt, *pair in read_samples(Path(eraser) / "samples") if of_this else []:
        shown = {f"samples/{path.name}": path for path in (pair[:1] if sensitive else pair) if path}
        files |= {place: clean_png(path, None if sensitive else prompt) for place, path in shown.items()}
        samples.append(Sample(prompt, *shown))
    name = f"kohya/{repo.partition('/')[2]}.safetensors" if kohya else None
    if name:
        files[name] = kohya_content(published)
    branch = None if revision and revision.startswith("refs/") else revision  # a pull request's card is read once it is merged
    card = published.card(Publication(repo, terms, branch, samples, name, sensitive))
    _check_card(card)
    return Draft(repo, terms, header, {"README.md": card.encode(), **files})


def _written(repo: str) -> set[str]:
    """What a push may write into a repository beside weights and card."""
    pictures = {f"samples/{i}_{name}.png" for i in range(1, SAMPLES + 1) for name in ("base", "erased")}
    return {"recipe.yaml", f"kohya/{repo.partition('/')[2]}.safetensors"} | pictures


def _check_card(card: str) -> None:
    """Has huggingface_hub read the card as the Hub will."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise EsdLoraError(f"the card is not what the Hub reads ({error}). Report this with the eraser's header.") from error
    missing = [key for key in ("license", "library_name", "pipeline_tag", "tags") if not data.get(key)]
    if missing:
        raise EsdLoraError(f"the card lacks {', '.join(missing)}. Report this with the eraser's header.")
