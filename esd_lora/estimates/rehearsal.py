"""A base to rehearse on: everything around it runs as it will, and nothing is waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.trajectory import Condition

_NOISE = 1e-2  # of made-up texts, so that no two are the same


class Rehearsed(Base):
    """A base whose texts are made up and whose denoiser predicts zeros: nothing is waited for."""

    texts = 0
    """Prompts that were asked for so far."""
    known: Condition
    """The condition of one prompt."""

    def encode(self, prompts: Sequence[str], guidance: float = 1.0) -> Condition:  # noqa: ARG002
        """Return as many made-up conditions as there are prompts."""
        self.texts += len(prompts)
        generator = torch.Generator().manual_seed(self.texts)
        made = {name: value.expand(len(prompts), *value.shape[1:]).clone() for name, value in self.known.items()}
        for name, value in made.items():
            if name.endswith("embeds"):
                value += _NOISE * float(value.std()) * torch.randn(value.shape, generator=generator).to(value)
        return made

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002
        """Return zeros."""
        return torch.zeros_like(x_t, dtype=torch.promote_types(x_t.dtype, torch.float32))
