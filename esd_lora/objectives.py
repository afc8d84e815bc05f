"""What the student learns to predict, from what the teacher predicts.

An objective is one function from the frozen base model's predictions to the student's target. The coefficients of the
predictions sum to one, so the same line serves epsilon, v and flow models. To add one, write the function, name its
paper, and register it in `OBJECTIVES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from esd_lora.errors import EsdLoraError
from esd_lora.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


class Predictions(NamedTuple):
    """The teacher's predictions at one batch of noisy latents, each of shape [N, channels, height, width]."""

    null: Tensor
    """For the empty prompt."""
    concept: Tensor
    """For the prompt to erase."""
    anchor: Tensor
    """For the prompt of what should appear instead; the same tensor as `null` when that is the empty prompt."""


Objective: TypeAlias = "Callable[[Predictions, Tensor], Tensor]"
"""From predictions and `eta` (broadcastable against them) to the target, of the predictions' shape."""


def esd(teacher: Predictions, eta: Tensor) -> Tensor:
    """Return the target of ESD: the anchor, pushed away from the concept.

        target = anchor - eta * (concept - null)

    Equation 5 of Gandikota et al., *Erasing Concepts from Diffusion Models*, ICCV 2023 (arXiv:2303.07345), where the
    anchor is the empty prompt and eta is 1. With the prompt itself as anchor and `eta = 0` the target is the teacher's
    own prediction, which is how a prompt is preserved.

    Args:
        teacher: Predictions of the frozen base model.
        eta: Strength of the push, typically 0 to 3, measured from the anchor.
    """
    return teacher.anchor - eta * (teacher.concept - teacher.null)


def contrast(teacher: Predictions, eta: Tensor) -> Tensor:
    """Return the anchor, pushed away from what sets the concept apart from its anchor, and from nothing else.

        target = anchor - eta * (concept - anchor)

    For a style, where concept is "a cat in ink style" and anchor "a cat", the direction `concept - null` of `esd` holds the
    cat as well as the style; the difference of the two prompts holds the style alone. It is the disentangled direction of
    Gandikota et al., *Concept Sliders*, ECCV 2024 (arXiv:2311.12092), walked backwards from the anchor. With the empty
    prompt as anchor it is `esd`.

    Args:
        teacher: Predictions of the frozen base model; `null` is not used.
        eta: Strength of the push, typically 0.5 to 2.
    """
    return teacher.anchor - eta * (teacher.concept - teacher.anchor)


OBJECTIVES: Registry[Objective] = Registry(
    "objective", {"esd": "esd_lora.objectives:esd", "contrast": "esd_lora.objectives:contrast"}
)


def find_objective(name: str, allow_code: Collection[str] = ()) -> Objective:
    """Return an objective by its name.

    Args:
        name: One of `OBJECTIVES`, or `module:function`.
        allow_code: Every `module:attribute` that may be imported.

    Raises:
        EsdLoraError: If it is unknown, not allowed, or no function of predictions and eta.
    """
    objective = OBJECTIVES.get(name, allow_code)
    if isinstance(objective, type):
        raise EsdLoraError(f"objective {name!r} is a class, and no function of predictions and eta.")
    try:
        inspect.signature(objective).bind(None, None)
    except (TypeError, ValueError) as error:  # other arguments; a builtin of which nothing is known
        raise EsdLoraError(f"objective {name!r} is no function of predictions and eta: {error}.") from error
    return objective
