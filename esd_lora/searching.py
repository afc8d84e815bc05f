"""Finding erasers on the Hugging Face Hub."""

from __future__ import annotations

import re
from typing import NamedTuple

from esd_lora.cards import erases
from esd_lora.hub_answers import asked


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
    with asked("the list of models"):
        models = list(HfApi().list_models(filter=filters, search=text, sort="downloads", limit=limit, full=True))
    found: list[Found] = []
    for model in models:
        said = model.tags or []
        bases = [tag.rpartition(":")[2] for tag in said if re.fullmatch(r"base_model:[^:]+", tag)]
        names = [tag.removeprefix("erases:").replace("-", " ") for tag in said if tag.startswith("erases:")]
        day = model.last_modified.date().isoformat() if model.last_modified else ""
        found.append(Found(model.id, names, ", ".join(bases), model.downloads or 0, model.likes or 0, day))
    return found
