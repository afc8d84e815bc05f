"""Gating: erasers that are on for the prompts that name what they erase or come near it, and off for all others.

Where weights need not be final, this costs nothing elsewhere: a prompt that comes near no concept gets the base's own picture,
bit for bit. It protects nothing against someone who holds the files, and nothing against words that the text encoder does not
see near the concept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.errors import EsdLoraError
from esd_lora.families import family_of
from esd_lora.formats.opening import open_eraser
from esd_lora.wording import without_article

if TYPE_CHECKING:
    from collections.abc import Callable

THRESHOLD = 0.95
"""Similarity below which an eraser is off."""


class Gate:
    """Scales erasers by how near a prompt comes to their concepts.

    The similarity of a prompt and a concept is the highest cosine between the text encoder's outputs, each less its output
    for the empty prompt, for one of the concept's names and for any run of as many words of the prompt; 1 if the prompt
    holds the name itself, in singular or plural.

    Args:
        base: The loaded base, whose text encoder compares.
        erasers: The erasers to scale.
        threshold: Similarity at which an eraser begins to be on; at 1 it is fully. A threshold of 1 lets names alone pass.

    Raises:
        EsdLoraError: If the threshold is not above 0 and up to 1.
    """

    def __init__(self, base: Base, erasers: Sequence[Eraser], *, threshold: float = THRESHOLD):
        if not 0 < threshold <= 1:
            raise EsdLoraError(
                f"gate threshold {threshold:g}: expected a similarity above 0 and up to 1, such as {THRESHOLD:g}."
            )
        base.know_words_of(erasers)
        self.base, self.threshold = base, threshold
        self.concepts = [eraser.header.concepts for eraser in erasers]
        self._directions: dict[str, Tensor] = {}
        self._encode([name for concepts in self.concepts for concept in concepts for name in _names(concept)])

    def similarities(self, prompt: str) -> list[float]:
        """Return how near the prompt comes to each eraser's concepts, up to 1."""
        words = re.findall(r"\w[\w'-]*", prompt)
        return [
            max((self._similarity(prompt, words, concept) for concept in concepts), default=0.0) for concepts in self.concepts
        ]

    def __call__(self, prompt: str) -> list[float]:
        """Return the factor of each eraser: 0 up to the threshold, then evenly up to 1."""
        if self.threshold == 1:
            return [float(s >= 1) for s in self.similarities(prompt)]
        return [max(0.0, (s - self.threshold) / (1 - self.threshold)) for s in self.similarities(prompt)]

    def record(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return threshold and names, and every prompt's similarities and factors, for JSON."""
        names = [[name for concept in concepts for name in _names(concept)] for concepts in self.concepts]
        gated = [{"prompt": p, "similarities": self.similarities(p), "factors": self(p)} for p in prompts]
        return {"threshold": self.threshold, "erasers": names, "prompts": gated}

    def _similarity(self, prompt: str, words: Sequence[str], concept: ErasedConcept) -> float:
        if concept.named_in(prompt):
            return 1.0
        best = 0.0
        for name in _names(concept):
            size = len(name.split())
            runs = [" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]
            self._encode(runs)
            best = max(best, *(float(self._directions[run] @ self._directions[name]) for run in runs))
        return min(best, 1.0)

    def _encode(self, texts: Sequence[str]) -> None:
        """Fill `_directions` for texts that are not in it."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._directions]
        if unknown:
            self._directions |= dict(zip(unknown, self.base.directions(unknown), strict=True))


def _names(concept: ErasedConcept) -> list[str]:
    return [without_article(name) for name in concept.called]


def gated(pipe: Any, erasers: Sequence[str | Path], *, threshold: float = THRESHOLD) -> Callable[..., Any]:
    """Load erasers into a diffusers pipeline, and return what to call instead of it: with one prompt, it applies them by that.

    Args:
        pipe: A pipeline of a known family; the erasers are loaded into it as adapters.
        erasers: Paths of erasers.
        threshold: As in `Gate`.
    """
    base = Base(pipe, family_of(type(pipe).__name__), getattr(pipe.config, "_name_or_path", "") or "the pipeline")
    loaded = [open_eraser(path, base.family.name) for path in erasers]
    if not base.family.pipelines_load_loras:
        raise EsdLoraError(
            f"a {type(pipe).__name__} in diffusers takes no erasers off and on again: paint with esd-lora generate --gate, or"
            " merge them."
        )
    if changing := [eraser for eraser in loaded if eraser.changes_text]:
        raise EsdLoraError(
            f"eraser of {changing[0].names} changes the text encoder, and erasers are switched by what bare text encoders make"
            " of a prompt: paint with esd-lora generate --gate."
        )
    gate = Gate(base, loaded, threshold=threshold)
    for number, eraser in enumerate(loaded):
        pipe.load_lora_weights(eraser.state_dict(), adapter_name=f"esd_{number}")

    def call(prompt: str, **kwargs: Any) -> Any:
        factors = {f"esd_{number}": factor for number, factor in enumerate(gate(prompt)) if factor}
        if not factors:
            pipe.disable_lora()
            return pipe(prompt, **kwargs)
        pipe.enable_lora()
        pipe.set_adapters(list(factors), list(factors.values()))
        return pipe(prompt, **kwargs)

    return call
