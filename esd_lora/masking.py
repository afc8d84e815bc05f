"""Masking names that not everybody wants to read: the first letter stays, the rest is dots."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from esd_lora.header import EraserHeader
from esd_lora.recipe import without_article

_DOT = "\u2022"


def mask_of(names: Iterable[str]) -> Callable[[str], str]:
    """What masks names in a text: each as a whole, and every word of theirs that says something, singular or plural."""
    words: set[str] = set()
    for name in names:
        said = {word for word in re.findall(r"\w+", name) if len(word) > 2 or not word.isascii()}
        words |= said | {without_article(name)} - {""}
    longest = sorted(words, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?:e?s)?(?!\w)" for word in longest), re.IGNORECASE)

    def hidden(text: str) -> str:
        return text[0] + _DOT * (len(text) - 1) if len(text) > 1 else _DOT

    def masked(text: str) -> str:
        return pattern.sub(lambda found: " ".join(map(hidden, found[0].split())), text) if longest else text

    return masked


def masked_header(header: EraserHeader, mask: Callable[[str], str]) -> EraserHeader:
    """A header for showing: concepts and their prompts masked, and synonyms left out."""
    concepts = [
        concept.model_copy(
            update={
                "name": mask(concept.name),
                "synonyms": (),
                "pairs": tuple((mask(prompt), mask(anchor)) for prompt, anchor in concept.pairs),
            }
        )
        for concept in header.concepts
    ]
    origins = [o.model_copy(update={"files": {mask(name): digest for name, digest in o.files.items()}}) for o in header.origins]
    return header.model_copy(update={"concepts": tuple(concepts), "origins": tuple(origins)})
