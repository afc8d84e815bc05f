"""What the student learns to predict, from what the teacher predicts.

An objective is one function from the frozen base model's predictions to the student's target. The coefficients of the
predictions sum to one, so the same line serves epsilon, v and flow models. To add one, write the function, name its
paper, and register it in `OBJECTIVES`. The loss is the mean square of what is missing to the target, or, where the student is
to be driven from the concept as well, an entry of `LOSSES`.
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


def hinge(teacher: Predictions, eta: Tensor) -> Tensor:  # noqa: ARG001
    """Return the anchor: how the student is driven to it, and from the concept, is `hinge_loss`."""
    return teacher.anchor


OBJECTIVES: Registry[Objective] = Registry(
    "objective", {name: f"esd_lora.objectives:{name}" for name in ("esd", "contrast", "hinge")}
)

Loss: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]"
"""From the student's predictions, their targets, the teacher's predictions for the concept, each [N, ...], and eta [N], to a
loss of each point [N]."""


def mean_square(prediction: Tensor, target: Tensor, concept: Tensor, eta: Tensor) -> Tensor:  # noqa: ARG001
    """Return the mean square of what each prediction is from its target, [N].

    Args:
        prediction: Of the student, [N, ...].
        target: Of the objective, [N, ...].
        concept: Already in the targets.
        eta: Already in the targets.
    """
    return (prediction - target).square().flatten(1).mean(1)


_ROUNDING = 1e-3  # of the way from the concept to the anchor
_LEAST = 1e-30  # square of a distance that is none: of a root of 0 there is no gradient


def hinge_loss(prediction: Tensor, target: Tensor, concept: Tensor, eta: Tensor) -> Tensor:
    """Return a loss that is zero once the student is nearer to the anchor than to the concept, [N].

        loss = |concept - anchor| * max(0, |student - anchor| - eta * |student - concept|)

    GEM's loss for flow models (multimodal-ai-lab/GEM, gem/operators/erasure/erasure_gem.py: a hinge of the two distances, eta
    1). There it is scaled by a constant; here by the distance there was to go, so that it is in the unit of `mean_square`, as
    which it begins (to a thousandth), and both can be weighed against each other. With eta 1 a student stops half-way, with
    less nearer to the anchor; distances are root mean squares.

    Args:
        prediction: Of the student, [N, ...].
        target: The anchor's predictions, [N, ...].
        concept: The concept's, [N, ...]; where they are the anchor's too, as on preserved points, the loss is `mean_square`.
        eta: How much the distance from the concept counts, typically 0.5 to 1, [N].
    """

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return ((one - other).square().flatten(1).mean(1) + _LEAST).sqrt()

    way = distance(concept, target)
    # The first student is the concept's own prediction up to rounding, whose direction is no way to be driven.
    left_behind = (distance(prediction, concept).square() + (_ROUNDING * way).square()).sqrt()
    closer = distance(prediction, target) - eta * left_behind
    return (way * closer.relu()).where(way > 2 * _LEAST**0.5, mean_square(prediction, target, concept, eta))


LOSSES: dict[str, Loss] = {"hinge": hinge_loss}
"""Losses of objectives that are trained otherwise than by `mean_square`."""


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
