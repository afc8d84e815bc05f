"""Intervals against published values, against the definition, and for how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esd_lora.erasers.measured import Interval
from esd_lora.evaluation.report.intervals import paired_difference, wilson


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: the score interval without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(hits: int, of: int, low: float, high: float) -> None:
    found = wilson(hits, of)
    assert found.value == hits / of
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(of=st.integers(1, 500), data=st.data(), level=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_solves_its_equation(of: int, data: st.DataObject, level: float) -> None:
    """An end p is where the score test just does not reject: (hits / of - p)^2 = z^2 p (1 - p) / of."""
    hits = data.draw(st.integers(0, of))
    found, other = wilson(hits, of, level), wilson(of - hits, of, level)
    z = {0.8: 1.2815515655446004, 0.95: 1.959963984540054, 0.99: 2.5758293035489004}[level]
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):
        assert (found.value - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / of, abs=1e-12)
    assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_no_difference_is_none() -> None:
    assert paired_difference([1, 0, 1], [1, 0, 1]) == Interval(value=0, low=0, high=0)
    assert paired_difference([0.5], [0.25]) == Interval(value=0.25, low=0.25, high=0.25)


def test_pairs_are_kept_together() -> None:
    """What is hard for both is no noise: a constant loss under any spread is known exactly."""
    before = np.random.default_rng(1).normal(size=200)
    found = paired_difference((before - 0.1).tolist(), before.tolist())
    assert (found.value, found.low, found.high) == pytest.approx((-0.1, -0.1, -0.1))


def test_bootstrap_is_as_wide_as_theory_and_repeats() -> None:
    random = np.random.default_rng(2)
    after, before = random.normal(0.3, 1, 400), random.normal(0, 1, 400)
    found = paired_difference(after.tolist(), before.tolist())
    half = 1.96 * float((after - before).std()) / 400**0.5
    assert found.value == pytest.approx(float((after - before).mean()))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.05 * half)
    assert found == paired_difference(after.tolist(), before.tolist())
    assert found != paired_difference(after.tolist(), before.tolist(), seed=1)
    narrow = paired_difference(after.tolist(), before.tolist(), level=0.5)
    assert found.low < narrow.low < narrow.high < found.high
