"""What is attacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.erasers.stacking import Strength
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.variants import Variant


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
