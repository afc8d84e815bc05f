# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The esd-lora authors
"""How near a prompt comes to what an eraser removes, measured as esd-lora's `generate --gate` does, by ComfyUI's CLIP.

The similarity of a prompt and a concept is the highest cosine between the text encoder's outputs, each less its output for the
empty prompt, for one of the concept's names and for any run of as many words of the prompt; 1 if the prompt holds the name
itself, in singular or plural.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import EraserError


class Nearness(NamedTuple):
    """How near a prompt comes to some names."""

    similarity: float
    """Cosine, up to 1."""
    name: str
    """The name that is nearest."""
    words: str
    """The words of the prompt that are nearest to it."""
    named: bool = False
    """Whether they are the name itself, so that nothing had to be encoded."""


class Similarities:
    """Cosines of texts, as a text encoder sees them.

    Args:
        clip: ComfyUI's `CLIP`. Its last layer is taken as the model was made with it, whatever clip skip is set.
    """

    def __init__(self, clip: Any):
        self._clip = clip.clone()
        self._clip.clip_layer(None)
        self._nothing = self._encode("")
        self._directions: dict[str, Tensor] = {}

    def __call__(self, text: str, other: str) -> float:
        """Return the cosine of two texts, each less the empty one."""
        return min(1.0, float(self._direction(text) @ self._direction(other)))

    def _direction(self, text: str) -> Tensor:
        if text not in self._directions:
            embeds = self._encode(text)
            if embeds.shape != self._nothing.shape:
                raise EraserError(
                    f"the CLIP connected gives {text[:60]!r} {embeds.shape[0]} values and the empty prompt"
                    f" {self._nothing.shape[0]}, so they cannot be compared: gate on models whose texts have one length."
                )
            self._directions[text] = torch.nn.functional.normalize(embeds - self._nothing, dim=0)
        return self._directions[text]

    def _encode(self, text: str) -> Tensor:
        literal = re.sub(r"([()])", r"\\\1", text)  # round brackets are weights to ComfyUI
        return self._clip.encode_from_tokens(self._clip.tokenize(literal)).float().flatten()


def nearness(clip: Any, prompt: str, names: Sequence[str]) -> Nearness:
    """Return how near a prompt comes to names of concepts.

    Args:
        clip: ComfyUI's `CLIP`; where the prompt holds a name nothing is encoded.
        prompt: As written in ComfyUI: round brackets and weights, as in `(a cat:1.2)`, do not count.
        names: One or more.
    """
    prompt, names = without_weights(prompt), [re.sub(r"^(an?|the)\s+", "", name.strip(), flags=re.I) for name in names]
    for name in names:
        if match := re.search(rf"(?<!\w){re.escape(name)}(?:e?s)?(?!\w)", prompt, re.I):
            return Nearness(1.0, name, match[0], named=True)
    similarity, words = Similarities(clip), re.findall(r"\w[\w'-]*", prompt)
    pairs = [(name, run) for name in names for run in _runs(words, len(name.split()))]
    return max(Nearness(similarity(run, name), name, run) for name, run in pairs)


def factor(similarity: float, threshold: float) -> float:
    """Return how strongly an eraser is on: 0 up to the threshold, then evenly up to 1; at a threshold of 1, names alone.

    Args:
        similarity: From `nearness`.
        threshold: Above 0 and up to 1.
    """
    return float(similarity >= 1) if threshold >= 1 else max(0.0, (similarity - threshold) / (1 - threshold))


def without_weights(prompt: str) -> str:
    """Return a prompt without the round brackets that weigh parts of it in ComfyUI; escaped ones are text and stay."""
    bare = re.sub(r"(?<!\\):\s*[-+]?[\d.]+\s*(?=\))", "", prompt)
    return re.sub(r"\\([()])", r"\1", re.sub(r"(?<!\\)[()]", "", bare))


def _runs(words: Sequence[str], size: int) -> list[str]:
    """Return every run of so many words; all of them where there are fewer."""
    return list(dict.fromkeys(" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))))
