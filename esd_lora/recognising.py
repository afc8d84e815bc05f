"""Whether a base draws a concept at all: how far its words move predictions, beside those of prompts that it does draw.

A word that a base never read is spelt out in pieces, and moves predictions a little. On a trajectory walked under a prompt,

    effect = |prompted - null| / |null|

of all its points; what counts is the mean over a few trajectories, in units of the median of kept prompts. On the bases that
were measured (`benchmarks/unknown_words.py`) every object that they draw lies above `KNOWN` and most of what is made up below.
Styles move less than objects, on a base of SD 3's kind no more than made-up words do: so it is a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from esd_lora.trajectory import NoisySample

KNOWN = 0.45
"""Effect of a concept, in units of kept prompts', below which its words hardly matter."""
TRAJECTORIES = 4
"""Trajectories of each concept."""


def effects(visited: Sequence[NoisySample]) -> Tensor | None:
    """Return how far the words move predictions on each of N trajectories, [N]; `None` where they were walked unguided.

    Args:
        visited: From a guided walk.
    """
    if any(sample.null is None or sample.prompted is None for sample in visited):
        return None
    null, prompted = (torch.stack([getattr(sample, name).flatten(1) for sample in visited], 1) for name in ("null", "prompted"))
    return (prompted - null).square().sum((1, 2)).sqrt() / null.square().sum((1, 2)).sqrt().clamp_min(1e-12)


def warn_of_unknown(shares: Mapping[str, float], base: str) -> None:
    """Warn of concepts that a base hardly draws.

    Args:
        shares: Name of a concept to its effect, in units of kept prompts'.
        base: Name of the base.
    """
    for name, share in shares.items():
        if share < KNOWN:
            warnings.warn(
                f"base {base!r} hardly draws {name!r}: it moves predictions {share:.2f} times as far as a prompt that the base"
                f" draws (below {KNOWN:g}). Check the spelling, and look at a picture of it (esd-lora generate).",
                stacklevel=2,
            )
