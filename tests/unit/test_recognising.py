"""Whether a base draws a concept: its words move predictions, or hardly."""

from __future__ import annotations

import warnings

import pytest
import torch

from esd_lora.recognising import KNOWN, effects, warn_of_unknown
from esd_lora.trajectory import NoisySample


def sample(null: list[float], prompted: list[float] | None) -> NoisySample:
    def rows(values: list[float]) -> torch.Tensor:
        return torch.tensor(values)[:, None, None, None]

    return NoisySample(torch.zeros(2, 1, 1, 1), torch.zeros(2), rows(null), None if prompted is None else rows(prompted))


def test_effect_is_the_share_by_which_words_move_predictions() -> None:
    visited = [sample([3.0, 1.0], [3.0, 2.0]), sample([4.0, 0.0], [9.0, 0.0])]
    measured = effects(visited)
    assert measured is not None
    assert measured.tolist() == pytest.approx([5 / 5, 1 / 1])
    assert effects([sample([3.0, 1.0], None)]) is None, "walked without guidance"


def test_what_is_hardly_drawn_is_warned_of_with_the_figure() -> None:
    with pytest.warns(
        UserWarning, match=r"base 'emoji' hardly draws 'zxqv blorp': it moves predictions 0\.41 times as far"
    ) as raised:
        warn_of_unknown({"a cat": 1.2, "zxqv blorp": 0.41}, "emoji")
    assert len(raised) == 1
    with warnings.catch_warnings(action="error"):
        warn_of_unknown({"a cat": KNOWN}, "emoji")
