"""What a worker keeps from one request to the next: the text of prompts that all of them preserve."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from esd_lora.bases.base import Base
from esd_lora.trajectory import Condition, concatenate, move, pick

MOST_REMEMBERED = 2**31
"""Bytes of text that are kept in the computer's memory; a prompt takes 0.2 MB in SD 1.5 and 4 MB where T5 encodes it."""


class RememberingBase(Base):
    """A base that knows the text of the prompts that every request keeps.

    They are encoded once, all together, so that what a request's training reads does not depend on those before it.
    """

    known: dict[str, Condition]

    @classmethod
    def of(cls, base: Base, prompts: Sequence[str]) -> RememberingBase:
        """Return a base that remembers prompts, the first ones if all would take more than `MOST_REMEMBERED`."""
        remembering = cls(**vars(base))
        remembering.known = {}
        size = sum(value.nbytes for value in base.encode([""]).values())
        first = list(dict.fromkeys(prompts))[: MOST_REMEMBERED // size]
        if first:
            condition = move(base.encode(first), torch.device("cpu"))
            remembering.known = {prompt: pick(condition, slice(i, i + 1)) for i, prompt in enumerate(first)}
        return remembering

    def encode(self, prompts: Sequence[str], guidance: float = 1.0) -> Condition:
        """Return the condition of prompts, as `Base.encode` does."""
        if self.family.takes_guidance(self.pipe):  # the condition depends on it
            return super().encode(prompts, guidance)
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.known))
        encoded = super().encode(new) if new else {}
        places = {prompt: slice(i, i + 1) for i, prompt in enumerate(new)}
        rows = (pick(encoded, places[p]) if p in places else move(self.known[p], self.device) for p in prompts)
        return concatenate(*rows)
