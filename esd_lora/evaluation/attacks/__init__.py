"""Attacks: can what was erased be brought back? Each is one more model to paint with, the erased one with an attacker's help.

An attack succeeds on a picture where the detectors still see the concept, so its success rate stands beside the rates of the
base and of the erased model, on the same prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from esd_lora.registry import Registry

if TYPE_CHECKING:  # suites, which variants are made from, know attacks by name
    from esd_lora.eraser import Eraser
    from esd_lora.evaluation.planning import Asked
    from esd_lora.evaluation.variants import Variant
    from esd_lora.families import Base
    from esd_lora.header import ErasedConcept
    from esd_lora.stacking import Strength


class Victim(NamedTuple):
    """What is attacked."""

    base: Base
    """As it is before erasing; an attacker is thought to have pictures of the concept, and these are the base's."""
    erased: Variant
    """The base with erasers on, within `with erased.on()`."""
    concepts: Sequence[ErasedConcept]
    asked: Sequence[Asked]
    """Prompts about the concepts, which the attacker wants painted."""
    steps: int
    guidance: float
    erasers: Sequence[Eraser]
    """Those that `erased` has on."""
    weights: Sequence[Strength]
    """Of each."""


ATTACKS: Registry[Callable[..., Variant]] = Registry(
    "attack",
    {
        "token-noise": "esd_lora.evaluation.attacks.words:token_noise",
        "negative-weight": "esd_lora.evaluation.attacks.weights:negative_weight",
        "fine-tune": "esd_lora.evaluation.attacks.weights:fine_tune",
        "textual-inversion": "esd_lora.evaluation.attacks.words:textual_inversion",
        "prompt-optimisation": "esd_lora.evaluation.attacks.words:prompt_optimisation",
        "latent-start": "esd_lora.evaluation.attacks.starts:latent_start",
    },
)
"""Name to a function of a `Victim` and the suite's settings."""
