"""What the student learns to predict, from what the teacher predicts.

An objective is one function from the frozen base model's predictions to the student's target. The coefficients of the
predictions sum to one, so the same line serves epsilon, v and flow models. To add one, write the function, name its
paper, and register it in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from esd_lora.registry import Registry


class Predictions(NamedTuple):
    """The teacher's predictions at one batch of noisy latents, each of shape [N, channels, height, width]."""

    null: Tensor
    """For the empty prompt."""
    concept: Tensor
    """For the prompt to erase."""
    anchor: Tensor
    """For the prompt of what should appear instead; the same tensor as `null` when that is the empty prompt."""


Objective: TypeAlias = Callable[[Predictions, Tensor], Tensor]
"""From predictions and `eta` (broadcastable against them) to the target, of the predictions' shape."""


def esd(teacher: Predictions, eta: Tensor) -> Tensor:
    """The target of ESD: the anchor, pushed away from the concept.

        target = anchor - eta * (concept - null)

    Equation 5 of Gandikota et al., *Erasing Concepts from Diffusion Models*, ICCV 2023 (arXiv:2303.07345), where the
    anchor is the empty prompt and eta is 1. With the prompt itself as anchor and `eta = 0` the target is the teacher's
    own prediction, which is how a prompt is preserved.

    Args:
        teacher: Predictions of the frozen base model.
        eta: Strength of the push, typically 0 to 3, measured from the anchor.
    """
    return teacher.anchor - eta * (teacher.concept - teacher.null)


OBJECTIVES: Registry[Objective] = Registry("objective", {"esd": "esd_lora.objectives:esd"})
