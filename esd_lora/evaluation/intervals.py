"""How sure a measured number is: an interval for a rate, and one for the difference of two on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A number and the interval that holds the true one in 95 of 100 such measurements, unless told otherwise."""

    value: float
    low: float
    high: float


def wilson(hits: int, of: int, level: float = 0.95) -> Interval:
    """A rate with Wilson's score interval, which stays within 0 and 1 and is right for few pictures and for rates near 0.

    Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, JASA 1927; Brown, Cai and DasGupta,
    *Interval Estimation for a Binomial Proportion*, 2001, for why.

    Args:
        hits: Pictures that count, 0 to `of`.
        of: Pictures looked at, 1 or more.
        level: Of confidence.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate = hits / of
    middle = (rate + z * z / (2 * of)) / (1 + z * z / of)
    reach = z / (1 + z * z / of) * (rate * (1 - rate) / of + z * z / (4 * of * of)) ** 0.5
    return Interval(rate, max(0.0, middle - reach) if hits else 0.0, min(1.0, middle + reach) if hits < of else 1.0)


def paired_difference(
    after: Sequence[float], before: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of `after - before`, pair by pair, with the percentile interval of a bootstrap over pairs.

    Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13. Pairs are drawn, not single pictures: a prompt
    that is hard for the base is hard for the erased model too, and that must not count as noise.

    Args:
        after: One number for each picture, such as 1 where the judge agrees, in the same order as `before`.
        before: The same prompts and seeds without erasers.
        level: Of confidence.
        resamples: Drawn with replacement.
        seed: Of the drawing, so that the same numbers give the same interval.
    """
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    for first in range(0, resamples, 1000):  # in parts: ten thousand times thousands of pictures would take gigabytes
        means[first : first + 1000] = differences[
            random.integers(len(differences), size=(min(1000, resamples - first), len(differences)))
        ].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(differences.mean()), float(low), float(high))
