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
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from esd_lora.families import Base
from esd_lora.trajectory import Condition

Row: TypeAlias = tuple[int, ...]
"""Tokens of a prompt."""
LEAN = 0.5
"""Highest share of an erased word in a pseudo-word."""


class PseudoWords:
    """Encodes prompts with a pseudo-word in the place of their rarest token.

    What nobody listed may lie near what is erased, and an eraser takes it along: so a pseudo-word leans towards a word that an
    erased prompt has in its place, by a share between none and `LEAN` of its length. In "a dog in ink style" that is a cat,
    where cats are erased, and not another style.

    Args:
        base: The loaded base; each of its text encoders gets pseudo-words of its own.
        prompts: Among which a token is rare or not: a keep list.
        erased: Prompts for what is erased.
    """

    def __init__(self, base: Base, prompts: Sequence[str], erased: Sequence[str] = ()):
        self.base = base
        encoders = [getattr(base.pipe, name) for name in base.pipe.components if name.startswith("text_encoder")]
        # T5 asks another module than `get_input_embeddings` names, with the same weight.
        tables = [
            module
            for encoder in encoders
            if encoder is not None
            for module in encoder.modules()
            if isinstance(module, nn.Embedding) and module.weight is encoder.get_input_embeddings().weight
        ]
        self._spread = {table: (table.weight.float().mean(0), table.weight.float().std(0)) for table in tables}
        kept = self._tokens(tables, prompts)
        self._counts = {table: Counter(token for row in rows for token in row) for table, rows in kept.items()}
        self._fitting: dict[nn.Embedding, dict[Row, set[int]]] = {table: {} for table in tables}
        """A prompt's tokens without one of them to what erased prompts have there."""
        for table, rows in self._tokens(tables, erased).items():
            for row in rows:
                for place, token in enumerate(row):
                    if token not in self._counts[table]:
                        self._fitting[table].setdefault((*row[:place], *row[place + 1 :]), set()).add(token)

    def _tokens(self, tables: Sequence[nn.Embedding], prompts: Sequence[str]) -> dict[nn.Embedding, list[Row]]:
        """The tokens of prompts, as each text encoder is asked about them."""
        found: dict[nn.Embedding, list[Row]] = {table: [] for table in tables}

        def note(table: Any, args: tuple[Tensor, ...]) -> None:
            found[table] += [tuple(row) for row in args[0].tolist()]

        with ExitStack() as hooks:
            for table in tables:
                hooks.callback(table.register_forward_pre_hook(note).remove)
            if prompts:
                self.base.encode(prompts)
        return found

    def encode(self, prompts: Sequence[str], generator: torch.Generator) -> Condition:
        """The condition of N prompts, each with a pseudo-word of its own.

        Args:
            prompts: Of the list.
            generator: Source of the words, on the CPU so that they do not depend on the device.
        """
        with ExitStack() as hooks:
            for table in self._counts:
                hooks.callback(table.register_forward_hook(partial(self._replace, generator)).remove)
            return self.base.encode(prompts)

    def _replace(self, generator: torch.Generator, table: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The embeddings [N, tokens, width] with those of every prompt's rarest token replaced."""
        (ids,), (mean, std), count, fitting = args, self._spread[table], self._counts[table], self._fitting[table]
        words = torch.randn(len(ids), len(mean), generator=generator).to(mean)
        shares = LEAN * torch.rand(len(ids), 1, generator=generator).to(mean)
        chances = torch.rand(len(ids), generator=generator).tolist()
        rarest: list[int] = []
        for i, row in enumerate(ids.tolist()):
            rarest.append(min(row, key=lambda token: (count[token], token)))
            place = row.index(rarest[-1])
            near = sorted(fitting.get((*row[:place], *row[place + 1 :]), ()))
            if near:
                erased = (table.weight[near[int(chances[i] * len(near))]].float() - mean) / std
                words[i] = shares[i] * erased + (1 - shares[i] ** 2).sqrt() * words[i]
        there = ids == torch.tensor(rarest).to(ids)[:, None]
        return torch.where(there[..., None], (mean + std * words)[:, None].to(out), out)
