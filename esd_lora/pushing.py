"""Pushing an eraser to the Hugging Face Hub: what will be public is laid out and checked before a byte leaves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from esd_lora.bases import BUILT_IN
from esd_lora.cards import Publication, Sample
from esd_lora.describing import is_hub_id, measured
from esd_lora.eraser import WEIGHTS_NAME, Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.exporting import kohya_content
from esd_lora.header import HEADER_KEY, EraserHeader
from esd_lora.hub import HubId
from esd_lora.hub_answers import asked
from esd_lora.licences import Licence, licence_of
from esd_lora.manifests import load_eraser
from esd_lora.pictures import read_samples
from esd_lora.recipe_files import dump_recipe
from esd_lora.tensor_files import file_content

_OURS = re.compile(r"(samples/\d+_(base|erased)\.png|kohya/[^/]+\.safetensors)")
"""Files of an earlier push that a later one may no longer have."""


class Draft(NamedTuple):
    """What a push would make public."""

    repo: str
    private: bool
    licence: Licence
    header: EraserHeader
    """As it will stand in the file."""
    files: dict[str, bytes]
    """Place in the repository to content."""

    def lines(self) -> list[str]:
        """For reading before it is too late."""
        names = ", ".join(concept.name for concept in self.header.concepts)
        sizes = {place: f"{len(content):,}" for place, content in self.files.items()}
        width = max(map(len, sizes.values()))
        return [
            f"{self.repo}, {'private' if self.private else 'public: anyone can see and fetch it'}",
            f"  erases {names} from {self.header.base}; licence {self.licence.name}",
            f"  measured: {measured(self.header)}",
            *(f"  {size:>{width}} bytes  {place}" for place, size in sizes.items()),
            f"  {sum(map(len, self.files.values())):,} bytes in all; the weights' header and recipe.yaml name every prompt",
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
        eraser: Directory, safetensors file, or manifest of a stack.
        repo: `owner/name`; made if it is not there.
        private: Of a new repository: only its owner sees it.
        revision: Branch to push to, made if it is not there; `main` unless given.
        create_pr: Open a pull request instead.
        kohya: Put a file for A1111, Forge and ComfyUI beside it, as `kohya/NAME.safetensors`.
        licence: See `licences.licence_of`; that of the base unless given.
        base_model: Hub id of the base, where the eraser was trained on a local copy. It takes the path's place everywhere.
        sensitive: Mask the concepts' names in the card, leave the base's pictures out, and mark the page as not for all
            audiences.
        confirm: Is shown the draft; nothing is sent unless it says yes.

    Returns:
        Where it is; `None` if it was not sent.

    Raises:
        EsdLoraError: If the eraser cannot be read, its base or licence cannot be told, or the Hub refuses; what had arrived by
            then is not public unless all had.
    """
    draft = drafted(eraser, repo, private, kohya=kohya, licence=licence, base_model=base_model, sensitive=sensitive)
    if not confirm(draft):
        return None
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with asked(repo, "Run the same command again: what arrived is not sent twice."):
        if not create_pr:
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.model_info(repo, revision=revision)
        there = [sibling.rfilename for sibling in before.siblings or []]
        stale = [name for name in there if _OURS.fullmatch(name) and name not in draft.files]
        changes = [CommitOperationAdd(place, content) for place, content in draft.files.items()]
        names = ", ".join(concept.name for concept in draft.header.concepts) if not sensitive else "a concept"
        done = api.create_commit(
            repo,
            [*changes, *(CommitOperationDelete(name) for name in stale)],
            commit_message=f"Eraser of {names}"[:70],
            revision=revision,
            create_pr=create_pr,
        )
    return Pushed(done.pr_url or str(done.repo_url), done.oid, done.oid != before.sha)


def drafted(
    eraser: str | Path,
    repo: str,
    private: bool = False,
    *,
    kohya: bool = False,
    licence: str | None = None,
    base_model: str | None = None,
    sensitive: bool = False,
) -> Draft:
    """Lays out what a push would make public, and sends nothing: see `push` for arguments and errors."""
    asked_id = HubId.read(repo)
    if asked_id is None or asked_id.revision:
        raise EsdLoraError(f"{repo!r} is no name of a repository: expected owner/name, such as me/no-cat.")
    loaded = load_eraser(eraser)
    header = _published(loaded.header, base_model)
    published = Eraser(loaded.pairs, header)
    terms = licence_of(header.base, licence)
    files = {WEIGHTS_NAME: file_content(published.state_dict(), {"format": "pt", HEADER_KEY: header.model_dump_json()})}
    if header.recipes:
        files["recipe.yaml"] = "---\n".join(map(dump_recipe, header.recipes)).encode()
    samples: list[Sample] = []
    folder = Path(eraser) / "samples" if Path(eraser).is_dir() else Path(eraser).parent / "samples"
    for prompt, (erased, before) in read_samples(folder).items():
        shown = {f"samples/{erased.name}": erased} | ({f"samples/{before.name}": before} if before and not sensitive else {})
        files |= {place: path.read_bytes() for place, path in shown.items()}
        samples.append(Sample(prompt, *shown))
    name = f"kohya/{repo.partition('/')[2]}.safetensors" if kohya else None
    if name:
        files[name] = kohya_content(published)
    card = published.card(Publication(repo, terms, samples, name, sensitive))
    _check_card(card)
    return Draft(repo, private, terms, header, {"README.md": card.encode(), **files})


def _published(header: EraserHeader, base_model: str | None) -> EraserHeader:
    """The header without the name that the base has on this machine alone."""
    base, _, revision = (base_model or header.base).partition("@")
    if not is_hub_id(base) and base not in BUILT_IN:
        raise EsdLoraError(
            f"the eraser was made for base {header.base!r}, which nobody else has under that name. Say which model on the Hub"
            " it is with --base-model owner/name."
        )
    if base == header.base and not base_model:
        return header
    recipes = [recipe.model_copy(update={"base": base, "base_config": None}) for recipe in header.recipes]
    changes = {"base": base, "base_revision": revision or header.base_revision, "recipes": tuple(recipes)}
    if header.evaluation and header.evaluation.record.get("base", {}).get("id") == header.base:
        record = header.evaluation.record | {"base": header.evaluation.record["base"] | {"id": base}}
        changes["evaluation"] = header.evaluation.model_copy(update={"record": record})
    return header.model_copy(update=changes)


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
