"""What an objective promises, whatever the model; its equation itself is held against golden/reference.py."""

from __future__ import annotations

import pytest
import torch

from esd_lora.errors import EsdLoraError
from esd_lora.objectives import OBJECTIVES, Objective, Predictions, contrast, esd, find_objective


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
