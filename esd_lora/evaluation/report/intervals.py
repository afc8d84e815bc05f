"""Intervals: how sure a rate is, and the difference of two numbers on the same prompts and seeds.

A rate or a mean is of the prompts that were painted. A difference should hold for prompts like them, so where a prompt has
several seeds, pictures of one prompt count as one group: what an eraser does to a prompt it does to most of its pictures.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

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


def tango(gained: float, lost: float, of: float, level: float = 0.95) -> Interval:
    """Return the difference of two rates on the same pairs with Tango's score interval, (gained - lost) / of.

    Tango, *Equivalence Test and Confidence Interval for the Difference in Proportions for the Paired-Sample Design*,
    Statistics in Medicine 17 (1998), 891-908. It holds every difference that the score test does not reject, stays within
    -1 and 1, and has a width also where no pair differs: between n pairs without one there may lie z^2 / (n + z^2).

    Args:
        gained: Pairs that count after and not before, 0 or more; any real number, as effective sizes are.
        lost: Pairs that count before and not after.
        of: All pairs, `gained + lost` or more.
        level: Of confidence, 0 to 1.
    """
    from scipy.stats import norm

    z, value = float(norm.ppf((1 + level) / 2)), (gained - lost) / of

    def rejected(difference: float) -> bool:
        # The likeliest share of lost pairs if the difference were this one solves 2 of q^2 + a q + b = 0.
        a = (2 * of - gained + lost) * difference - (gained + lost)
        b = -lost * difference * (1 - difference)
        share = (math.sqrt(max(a * a - 8 * of * b, 0)) - a) / (4 * of)
        variance = of * (2 * share + difference * (1 - difference))
        return (gained - lost - of * difference) ** 2 > z * z * variance

    def end(outside: float) -> float:
        inside = value
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    return Interval(value=value, low=end(-1.0), high=end(1.0))


def paired_rate_difference(
    after: Sequence[bool], before: Sequence[bool], prompts: Sequence[Hashable] = (), level: float = 0.95
) -> Interval:
    """Return how much higher a rate is after than before, pair by pair, with Tango's interval.

    Where prompts have several seeds, the pairs count as the fewer independent ones that would tell as much: their number
    over the design effect, and less by (z / t)^2 for few prompts (Korn and Graubard, *Confidence Intervals for Proportions with
    Small Expected Number of Positive Counts Estimated from Survey Data*, Survey Methodology 24 (1998), 193-201). That keeps a
    width where no pair differs, which a bootstrap over prompts does not.

    Args:
        after: Whether each picture counts, in the same order as `before`.
        before: The same prompts and seeds without erasers.
        prompts: The prompt of each pair; without it every pair is on its own.
        level: Of confidence, 0 to 1.
    """
    from scipy.stats import norm, t

    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    count = of = float(len(differences))
    if groups := _group(differences, prompts):
        alone = float(differences.var(ddof=1)) / count
        if alone > 0:  # where no pair differs, nothing tells how alike the pictures of a prompt are
            of /= max(1.0, groups.variance / alone)
        of *= float(norm.ppf((1 + level) / 2) / t.ppf((1 + level) / 2, groups.number - 1)) ** 2
    gained, lost = (float((differences == sign).sum()) for sign in (1, -1))
    interval = tango(gained * of / count, lost * of / count, of, level)
    return interval.model_copy(update={"value": (gained - lost) / count})


def paired_difference(
    after: Sequence[float],
    before: Sequence[float],
    prompts: Sequence[Hashable] = (),
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean of `after - before`, pair by pair, with the percentile interval of a bootstrap over pairs.

    Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13. Pairs are drawn, not single pictures: a prompt
    that is hard for the base is hard for the erased model too, and that must not count as noise. Where prompts have several
    seeds, the interval is that of a variance between prompts, with as many degrees of freedom as there are prompts less one
    (Cameron and Miller, *A Practitioner's Guide to Cluster-Robust Inference*, Journal of Human Resources 50 (2015), 317-372):
    a bootstrap over few prompts is too narrow. Yes and no are better served by `paired_rate_difference`.

    Args:
        after: One number for each picture, such as its CLIP score, in the same order as `before`.
        before: The same prompts and seeds without erasers.
        prompts: The prompt of each pair; without it every pair is on its own.
        level: Of confidence, 0 to 1.
        resamples: Drawn with replacement.
        seed: Of the drawing, so that the same numbers give the same interval.
    """
    from scipy.stats import bootstrap, t

    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    mean = float(differences.mean())
    if len(differences) == 1:  # which scipy refuses
        return Interval(value=mean, low=mean, high=mean)
    if groups := _group(differences, prompts):
        half = float(t.ppf((1 + level) / 2, groups.number - 1)) * math.sqrt(groups.variance)
        return Interval(value=mean, low=mean - half, high=mean + half)
    # In batches: ten thousand times thousands of pictures would take gigabytes.
    options = {"n_resamples": resamples, "batch": 1000, "confidence_level": level, "method": "percentile"}
    low, high = bootstrap((differences,), np.mean, rng=np.random.default_rng(seed), **options).confidence_interval
    return Interval(value=mean, low=float(low), high=float(high))


class _Groups(NamedTuple):
    """Pairs by prompt."""

    number: int
    """Number of prompts."""
    variance: float
    """Variance of the mean of all differences, as prompts differ from each other."""


def _group(differences: np.ndarray, prompts: Sequence[Hashable]) -> _Groups | None:
    """Return how sure a mean is by what differs between prompts; `None` where each has one pair, or there is one alone.

    With one prompt nothing tells how prompts differ, and the interval is of that prompt over its seeds.
    """
    numbers: dict[Hashable, int] = {}
    group = np.asarray([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=np.intp)
    number, count = len(numbers), len(differences)
    if not 1 < number < count:
        return None
    sums = np.bincount(group, differences, number) - differences.mean() * np.bincount(group, minlength=number)
    return _Groups(number, float(number / (number - 1) * np.square(sums).sum()) / count**2)
