"""Intervals: how sure a rate is, and the difference of two numbers on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esd_lora.erasers.measured import Interval


def wilson(hits: int, of: int, level: float = 0.95) -> Interval:
    """Return a rate with Wilson's score interval, which stays within 0 and 1 and is right for few pictures and near 0.

    Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, JASA 1927; Brown, Cai and DasGupta,
    *Interval Estimation for a Binomial Proportion*, 2001, for why.

    Args:
        hits: Pictures that count, 0 to `of`.
        of: Pictures that were scored, 1 or more.
        level: Of confidence, 0 to 1.
    """
    from scipy.stats import binomtest

    low, high = binomtest(hits, of).proportion_ci(level, method="wilson")
    return Interval(value=hits / of, low=float(low), high=float(high))


def paired_difference(
    after: Sequence[float], before: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean of `after - before`, pair by pair, with the percentile interval of a bootstrap over pairs.

    Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13. Pairs are drawn, not single pictures: a prompt
    that is hard for the base is hard for the erased model too, and that must not count as noise.

    Args:
        after: One number for each picture, such as 1 where the judge agrees, in the same order as `before`.
        before: The same prompts and seeds without erasers.
        level: Of confidence, 0 to 1.
        resamples: Drawn with replacement.
        seed: Of the drawing, so that the same numbers give the same interval.
    """
    from scipy.stats import bootstrap

    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    mean = float(differences.mean())
    if len(differences) == 1:  # which scipy refuses
        return Interval(value=mean, low=mean, high=mean)
    # In batches: ten thousand times thousands of pictures would take gigabytes.
    options = {"n_resamples": resamples, "batch": 1000, "confidence_level": level, "method": "percentile"}
    low, high = bootstrap((differences,), np.mean, rng=np.random.default_rng(seed), **options).confidence_interval
    return Interval(value=mean, low=float(low), high=float(high))
