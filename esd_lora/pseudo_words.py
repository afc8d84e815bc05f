"""Prompts with words that mean nothing, which stand for everything that no list of prompts names.

A text encoder first turns every token into an embedding. Where the one token that tells a prompt from others ("dog" in "a dog
in the rain") gets a random embedding instead, of the spread that the encoder's table has, what comes out is the condition of
a prompt like it about something that nobody listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esd_lora.bases.base import Base
from esd_lora.trajectory import Condition


class PseudoWords:
    """Encodes prompts with a pseudo-word in the place of their rarest token.

    Args:
        base: The loaded base; each of its text encoders gets pseudo-words of its own.
        prompts: The prompts among which a token is rare or not: a keep list.
    """

    def __init__(self, base: Base, prompts: Sequence[str]):
        self.base = base
        encoders = [getattr(base.pipe, name) for name in base.pipe.components if name.startswith("text_encoder")]
        # T5 runs another module than `get_input_embeddings` returns, with the same weight.
        tables = [
            module
            for encoder in encoders
            if encoder is not None
            for module in encoder.modules()
            if isinstance(module, nn.Embedding) and module.weight is encoder.get_input_embeddings().weight
        ]
        self._counts: dict[nn.Embedding, Counter[int]] = {table: Counter() for table in tables}
        weights = {table: table.weight.cpu().float() for table in tables}  # T5's would take half a gigabyte of a card
        self._spread = {table: (weight.mean(0), weight.std(0)) for table, weight in weights.items()}
        with ExitStack() as hooks:
            for table in tables:
                hooks.callback(table.register_forward_pre_hook(self._count).remove)
            base.encode(prompts)

    def encode(self, prompts: Sequence[str], generator: torch.Generator) -> Condition:
        """Return the condition of N prompts, each with a pseudo-word of its own.

        Args:
            prompts: Prompts of the list.
            generator: Source of the words, on the CPU so that they do not depend on the device.
        """
        with ExitStack() as hooks:
            for table in self._counts:
                hooks.callback(table.register_forward_hook(partial(self._replace, generator)).remove)
            return self.base.encode(prompts)

    def _count(self, table: Any, args: tuple[Tensor, ...]) -> None:
        self._counts[table].update(args[0].flatten().tolist())

    def _replace(self, generator: torch.Generator, table: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Return the embeddings [N, tokens, width] with those of every prompt's rarest token replaced."""
        (ids,), (mean, std), count = args, self._spread[table], self._counts[table]
        rarest = torch.tensor([min(row, key=lambda token: (count[token], token)) for row in ids.tolist()])
        words = mean + std * torch.randn(len(ids), len(mean), generator=generator).to(mean)
        return torch.where((ids == rarest.to(ids)[:, None])[..., None], words[:, None].to(out), out)
