"""Intervals against published values, against the definition, and for how often they hold the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm, t

from esd_lora.erasers.measured import Interval
from esd_lora.evaluation.report.intervals import paired_difference, paired_rate_difference, tango, wilson


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
    result = wilson(hits, of)
    assert result.value == hits / of
    assert (round(result.low, 4), round(result.high, 4)) == (low, high)


@given(of=st.integers(1, 500), data=st.data(), level=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_solves_its_equation(of: int, data: st.DataObject, level: float) -> None:
    """An end p is where the score test just does not reject: (hits / of - p)^2 = z^2 p (1 - p) / of."""
    hits = data.draw(st.integers(0, of))
    result, other = wilson(hits, of, level), wilson(of - hits, of, level)
    z = {0.8: 1.2815515655446004, 0.95: 1.959963984540054, 0.99: 2.5758293035489004}[level]
    assert 0 <= result.low <= result.value <= result.high <= 1
    for end in (result.low, result.high):
        assert (result.value - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / of, abs=1e-12)
    assert (other.low, other.high) == pytest.approx((1 - result.high, 1 - result.low))


@pytest.mark.parametrize(
    ("gained", "lost", "of", "level", "low", "high"),
    [
        (9, 3, 32, 0.95, -0.027, 0.390),  # Tango, Statistics in Medicine 17 (1998), 6.2: sleeping difficulties
        (0, 1, 44, 0.90, -0.096, None),  # 6.1: soft contact lenses
        (1, 7, 21, 0.95, -0.517, -0.026),  # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014): Bentur's children
        (28, 25, 618, 0.90, -0.0148, 0.0247),  # PropCIs::scoreci.mp(25, 28, 618, 0.90), as RickPack's demo of matching pins it
    ],
)
def test_tango_as_published(gained: int, lost: int, of: int, level: float, low: float, high: float | None) -> None:
    result, digits = tango(gained, lost, of, level), 4 if of == 618 else 3
    assert result.value == (gained - lost) / of
    assert round(result.low, digits) == low
    assert high is None or round(result.high, digits) == high


@given(of=st.integers(1, 120), data=st.data(), level=st.sampled_from([0.8, 0.95, 0.99]))
def test_tango_holds_what_the_score_test_does_not_reject(of: int, data: st.DataObject, level: float) -> None:
    """The test is McNemar's at 0; its variance is that of the likeliest rates with the difference, result by search."""
    gained = data.draw(st.integers(0, of))
    lost = data.draw(st.integers(0, of - gained))
    result, other = tango(gained, lost, of, level), tango(lost, gained, of, level)
    assert -1 <= result.low <= result.value <= result.high <= 1
    assert result.high - result.low > 0
    assert (other.low, other.high) == pytest.approx((-result.high, -result.low))
    z = {0.8: 1.2815515655446004, 0.95: 1.959963984540054, 0.99: 2.5758293035489004}[level]
    if abs((gained - lost) ** 2 - z * z * (gained + lost)) > 1e-9:
        assert (result.low <= 0 <= result.high) == ((gained - lost) ** 2 < z * z * (gained + lost))

    def statistic(difference: float) -> float:
        def likelihood(share: float) -> float:  # of lost pairs; gained ones are as much more likely as the difference
            rates = (share + difference, share, 1 - 2 * share - difference)
            counts = (gained, lost, of - gained - lost)
            return sum(count * math.log(max(rate, 1e-300)) for rate, count in zip(rates, counts, strict=True))

        low, high = max(0.0, -difference), (1 - difference) / 2
        for _ in range(80):
            left, right = low + (high - low) / 3, high - (high - low) / 3
            low, high = (left, high) if likelihood(left) < likelihood(right) else (low, right)
        variance = of * (2 * low + difference - difference**2)
        return (gained - lost - of * difference) / math.sqrt(variance)

    for end in (result.low, result.high):
        if abs(end) < 0.99:
            assert abs(statistic(end)) == pytest.approx(z, rel=1e-3)


def test_width_where_no_pair_differs() -> None:
    z = 1.959963984540054
    end = z * z / (60 + z * z)
    assert (tango(0, 0, 60).low, tango(0, 0, 60).high) == pytest.approx((-end, end))
    result = paired_rate_difference([True] * 60, [True] * 60)
    assert (result.value, result.low, result.high) == pytest.approx((0, -end, end))
    assert paired_rate_difference([False], [True]).value == -1


@pytest.mark.parametrize(
    ("of", "lost", "gained", "least"),
    # For the same numbers a percentile bootstrap over pairs holds the truth in .70, .95, .92, .91 and .96.
    [(60, 0.02, 0.0, 0.99), (60, 0.05, 0.0, 0.99), (60, 0.05, 0.02, 0.95), (200, 0.02, 0.0, 0.93), (60, 0.3, 0.0, 0.93)],
)
def test_score_interval_holds_the_truth(of: int, lost: float, gained: float, least: float) -> None:
    """Summed over all that may be seen."""
    held = total = 0.0
    for less in range(of + 1):
        for more in range(of + 1 - less if gained else 1):
            share = binom.pmf(less, of, lost) * (binom.pmf(more, of - less, gained / (1 - lost)) if gained else 1)
            if share > 1e-7:
                result = tango(more, less, of)
                held, total = held + share * (result.low <= gained - lost <= result.high), total + share
    assert total > 1 - 1e-4
    assert held > least


def drawn(generator: np.random.Generator, prompts: int, seeds: int, lost: float, alike: float) -> np.ndarray:
    """Whether each picture is lost, by prompt and seed: prompts' shares are a beta's, `alike` the intraclass correlation."""
    shares = generator.beta(lost * (1 / alike - 1), (1 - lost) * (1 / alike - 1), prompts)
    return generator.random((prompts, seeds)) < shares[:, None]


def coverage(
    interval: Callable[[np.ndarray, list[int]], Interval], prompts: int, seeds: int, lost: float, alike: float
) -> float:
    generator, held = np.random.default_rng(0), 0
    group = [i for i in range(prompts) for _ in range(seeds)]
    for _ in range(400):
        result = interval(drawn(generator, prompts, seeds, lost, alike).flatten(), group)
        held += result.low <= -lost <= result.high
    return held / 400


@pytest.mark.parametrize(
    ("prompts", "seeds", "lost", "alike"), [(12, 5, 0.2, 0.2), (24, 5, 0.2, 0.5), (10, 50, 0.2, 0.2), (6, 10, 0.5, 0.3)]
)
def test_seeds_of_a_prompt_are_no_further_prompts(prompts: int, seeds: int, lost: float, alike: float) -> None:
    def by_prompt(gone: np.ndarray, group: list[int]) -> Interval:
        return paired_rate_difference(~gone, np.ones_like(gone), group)  # type: ignore[arg-type]

    def alone(gone: np.ndarray, _group: list[int]) -> Interval:
        return paired_rate_difference(~gone, np.ones_like(gone))  # type: ignore[arg-type]

    def of_means(gone: np.ndarray, group: list[int]) -> Interval:
        return paired_difference((-gone.astype(float)).tolist(), [0.0] * len(gone), group)

    assert coverage(by_prompt, prompts, seeds, lost, alike) > 0.94
    assert coverage(of_means, prompts, seeds, lost, alike) > 0.91  # symmetric, which a beta's mean of few prompts is not
    assert coverage(alone, prompts, seeds, lost, alike) < 0.9


def test_pictures_of_a_prompt_that_differ_count_as_no_more_than_they_are() -> None:
    """A design effect below 1 is taken for 1; few prompts still cost (z / t)^2."""
    after, prompts = [True, False] * 8, [number // 2 for number in range(16)]
    share = (norm.ppf(0.975) / t.ppf(0.975, 7)) ** 2
    interval, expected = paired_rate_difference(after, [False] * 16, prompts), tango(8 * share, 0, 16 * share)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_groups_of_one_or_one_group_change_nothing() -> None:
    generator = np.random.default_rng(3)
    gone, numbers = (generator.random(40) < 0.2).tolist(), generator.normal(size=40).tolist()
    for prompts in (list(range(40)), ["a cat"] * 40, []):
        kept, zeros = [not each for each in gone], [0.0] * 40
        assert paired_rate_difference(kept, [True] * 40, prompts) == paired_rate_difference(kept, [True] * 40)
        assert paired_difference(numbers, zeros, prompts) == paired_difference(numbers, zeros)


def test_variance_between_prompts_as_by_hand() -> None:
    result = paired_difference([1.0, 2.0, 3.0, 6.0, 5.0], [0.0] * 5, ["a", "a", "b", "b", "c"])
    # Sums less their share of the mean 3.4: 3 - 6.8, 9 - 6.8, 5 - 3.4; t of 2 degrees of freedom is 4.303.
    half = 4.302652729911275 * math.sqrt(1.5 * (3.8**2 + 2.2**2 + 1.6**2)) / 5
    assert (result.value, result.low, result.high) == pytest.approx((3.4, 3.4 - half, 3.4 + half))


def test_no_difference_of_means_is_none() -> None:
    assert paired_difference([1, 0, 1], [1, 0, 1]) == Interval(value=0, low=0, high=0)
    assert paired_difference([0.5], [0.25]) == Interval(value=0.25, low=0.25, high=0.25)


def test_pairs_are_kept_together() -> None:
    """What is hard for both is no noise: a constant loss under any spread is known exactly."""
    before = np.random.default_rng(1).normal(size=200)
    result = paired_difference((before - 0.1).tolist(), before.tolist())
    assert (result.value, result.low, result.high) == pytest.approx((-0.1, -0.1, -0.1))


def test_bootstrap_is_as_wide_as_theory_and_repeats() -> None:
    random = np.random.default_rng(2)
    after, before = random.normal(0.3, 1, 400), random.normal(0, 1, 400)
    result = paired_difference(after.tolist(), before.tolist())
    half = 1.96 * float((after - before).std()) / 400**0.5
    assert result.value == pytest.approx(float((after - before).mean()))
    assert (result.low, result.high) == pytest.approx((result.value - half, result.value + half), abs=0.05 * half)
    assert result == paired_difference(after.tolist(), before.tolist())
    assert result != paired_difference(after.tolist(), before.tolist(), seed=1)
    narrow = paired_difference(after.tolist(), before.tolist(), level=0.5)
    assert result.low < narrow.low < narrow.high < result.high
