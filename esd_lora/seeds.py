"""Seeds: everything random is drawn from a user's seed, a named stream and a counter, never from a running generator.

So every draw can be repeated without replaying those before it, and a training that is resumed draws what an unbroken one does.
"""

from __future__ import annotations

import random
from enum import IntEnum

import torch


class Stream(IntEnum):
    """What a training draws at random, apart from the start of the LoRA."""

    BATCHES = 1
    """Points of the replay buffer that a step trains on."""
    ORDER = 2
    """Order in which the lessons take turns."""
    NOISE = 3
    """Noise that trajectories start from, and where they stop."""
    DROPOUT = 4
    """Inputs of the LoRA that a step leaves out."""
    CHOICE = 5
    """Preserved prompts that are walked, where there are more than walks."""
    WORDS = 6
    """Noise, times and starts of words that are learnt from pictures."""


def stream_seed(seed: int, stream: Stream, *counters: int) -> int:
    """Return the 63-bit seed of one draw of a stream, by a linear congruential generator (Knuth's MMIX).

    Args:
        seed: The recipe's.
        stream: What is drawn.
        counters: Which draw of the stream it is: the step, the number of the refresh.
    """
    mixed = 0
    for part in (seed, stream, *counters):
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return mixed


def stream_generator(seed: int, stream: Stream, *counters: int) -> torch.Generator:
    """Return a fresh generator for one draw of a stream, on the CPU so that results do not depend on the device."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, *counters))


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return a fresh generator on the CPU for one step of something that has a single stream."""
    return torch.Generator().manual_seed(seed * 100_003 + step)


def probe_seed(seed: int) -> int:
    """Return the seed of the trajectories that an erasure probe looks at and no step trains on."""
    return seed + 2**40


def text_seed(*parts: object) -> int:
    """Return a 32-bit seed that depends on the text of all parts and on nothing else."""
    return random.Random(" ".join(map(str, parts))).getrandbits(32)
