"""What an objective promises, whatever the model; its equation itself is held against golden/reference.py."""

from __future__ import annotations

import pytest
import torch

from esd_lora.errors import EsdLoraError
from esd_lora.objectives import (
    OBJECTIVES,
    Objective,
    Predictions,
    contrast,
    esd,
    find_objective,
    hinge,
    hinge_loss,
    mean_square,
)


def teacher(seed: int = 0) -> Predictions:
    return Predictions(*torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


ETA = torch.tensor([0.5, 2.0], dtype=torch.float64).view(2, 1, 1, 1)


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_coefficients_sum_to_one(name: str) -> None:
    """Then v = a noise - s x_0, with x_0 the same for all three, keeps its form, and so does flow: no family is named."""
    objective: Objective = OBJECTIVES.get(name)
    said = teacher()
    for moved in (torch.full_like(said.null, 3.0), teacher(1).null):
        shifted = objective(Predictions(*(prediction + moved for prediction in said)), ETA)
        torch.testing.assert_close(shifted, objective(said, ETA) + moved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_prompt_as_its_own_anchor_and_no_push_is_preserved(name: str) -> None:
    said = teacher()
    assert torch.equal(OBJECTIVES.get(name)(said, torch.zeros(2, 1, 1, 1)), said.anchor)


def test_eta_is_that_of_each_point() -> None:
    said = teacher()
    target = esd(said, ETA)
    assert torch.equal(target[0], esd(said, ETA[:1])[0])
    assert torch.equal(target[1], esd(said, ETA[1:])[1])


def test_contrast_pushes_along_the_difference_of_the_two_prompts() -> None:
    said = teacher()
    torch.testing.assert_close(contrast(said, ETA), (1 + ETA) * said.anchor - ETA * said.concept, rtol=1e-12, atol=1e-12)
    nulls = said._replace(anchor=said.null)
    torch.testing.assert_close(contrast(nulls, ETA), esd(nulls, ETA), rtol=1e-12, atol=1e-12)


def hinge_points() -> tuple[torch.Tensor, torch.Tensor]:
    """Targets and concept's predictions of two points; the second is of a preserved prompt, where both are one."""
    null, concept, anchor = teacher()
    concept[1] = anchor[1]
    return hinge(Predictions(null, concept, anchor), ETA), concept


def test_hinge_begins_as_the_mean_square_and_ends_half_way() -> None:
    (target, concept), eta = hinge_points(), torch.ones(2, dtype=torch.float64)
    loss = hinge_loss(concept, target, concept, eta)
    torch.testing.assert_close(loss, mean_square(concept, target, concept, eta), rtol=2e-3, atol=0)
    losses = [
        float(hinge_loss(concept + share * (target - concept), target, concept, eta)[0])
        for share in (0.0, 0.25, 0.49, 0.5, 0.75, 1.0)
    ]
    assert losses[0] > losses[1] > losses[2] > 0
    assert losses[3] == pytest.approx(0, abs=1e-15)
    assert losses[4:] == [0, 0]
    half = hinge_loss(concept + 0.6 * (target - concept), target, concept, 0.5 * eta)[0]
    assert half > 0  # with less eta a student goes on: to two thirds of the way


def test_hinge_holds_what_is_preserved() -> None:
    (target, concept), eta = hinge_points(), torch.tensor([1.0, 0.0], dtype=torch.float64)
    moved = target + 0.1
    assert float(hinge_loss(moved, target, concept, eta)[1]) == pytest.approx(0.01)


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_gradient_of_the_hinge_leads_to_the_anchor_where_a_student_begins(rounding: float) -> None:
    """There it is the concept's own prediction but for rounding, the direction of which is not to be followed."""
    target, concept = hinge_points()
    prediction = concept + rounding * teacher(1).null
    prediction[1] = concept[1]
    prediction.requires_grad_()
    hinge_loss(prediction, target, concept, torch.ones(2, dtype=torch.float64)).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    way = (target - concept)[0]
    towards = -(prediction.grad[0] * way).sum() / (prediction.grad[0].norm() * way.norm())
    assert towards == pytest.approx(1, abs=1e-6)
    assert not prediction.grad[1].any()


def test_own_objective_by_module_and_attribute() -> None:
    own = "esd_lora.objectives:esd"
    assert OBJECTIVES.get(own, [own]) is find_objective(own, [own]) is OBJECTIVES.get("esd") is esd


@pytest.mark.parametrize("name", ["essd", "nothing", "esd_lora.objectives:none", "no_such_module:esd"])
def test_unknown_objective(name: str) -> None:
    with pytest.raises(EsdLoraError) as caught:
        OBJECTIVES.get(name, [name])
    message = str(caught.value)
    assert name in message
    assert ("did you mean 'esd'?" in message) == (name == "essd")
    assert "' Known" not in message  # a full stop or a question mark stands between
