"""The vocabulary of Stable Diffusion's text encoders: which words it has, and giving some of them another meaning."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from esd_lora.bases.base import Base
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks.victim import Victim
from esd_lora.trajectory import Condition


class Table(NamedTuple):
    """A text encoder's table of embeddings, in units of its spread, and the tokens that are given another meaning."""

    layer: nn.Embedding
    tokenizer: Any
    spread: Tensor
    """Standard deviation of all its numbers."""
    spare: Tensor
    """[K], ids of the words that are free to mean something else."""

    def embeddings(self, words: Sequence[str]) -> Tensor:
        """Return embeddings [N, width] of words of one token each."""
        return self.layer.weight[_ids(self.tokenizer, words).to(self.spare)].float() / self.spread

    def mean_embedding(self, text: str) -> Tensor:
        """Return the mean embedding [width] of a text's tokens."""
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids).to(self.spare)
        return self.layer.weight[ids].float().mean(0) / self.spread


def tables_of(base: Base, spare: Sequence[str]) -> list[Table]:
    """Return a table for each text encoder of Stable Diffusion or SDXL."""
    tables: list[Table] = []
    for name in ("", "_2"):
        if (encoder := getattr(base.pipe, f"text_encoder{name}", None)) is not None:
            layer, tokenizer = encoder.get_input_embeddings(), getattr(base.pipe, f"tokenizer{name}")
            spare_ids = _ids(tokenizer, spare).to(layer.weight.device)
            tables.append(Table(layer, tokenizer, layer.weight.float().std(), spare_ids))
    return tables


@contextmanager
def spare_words_meaning(tables: Sequence[Table], vectors: Sequence[Tensor]) -> Generator[None]:
    """Make the spare words mean vectors [K, width], of each table, for the length of a `with` block.

    The table itself stays as it is: its output is changed on the way.
    """
    with ExitStack() as hooks:
        for table, own in zip(tables, vectors, strict=True):
            hooks.callback(table.layer.register_forward_hook(partial(_replace_spare, table, own)).remove)
        yield


def _replace_spare(table: Table, vectors: Tensor, layer: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:  # noqa: ARG001
    """Return the embeddings [N, tokens, width] with those of the spare words replaced."""
    same = args[0][..., None] == table.spare
    return torch.where(same.any(-1, keepdim=True), same.to(out.dtype) @ (vectors * table.spread).to(out.dtype), out)


def encode_with_gradient(base: Base, prompts: Sequence[str]) -> Condition:
    """Return the condition of prompts as `Base.encode` gives it, with a gradient."""
    return {name: value.to(base.model.dtype) for name, value in base.family.encode(base.pipe, prompts).items()}


def readable_words(base: Base) -> list[str]:
    """Return words of plain letters that are one token to each CLIP tokenizer of a base, the most frequent first.

    Raises:
        EsdLoraError: If it has no such tokenizer.
    """
    parts = [part for name, part in sorted(base.pipe.components.items()) if name.startswith("tokenizer")]
    tokenizers = [part for part in parts if isinstance(part, CLIPTokenizer)]
    if not tokenizers:
        kinds = ", ".join(type(part).__name__ for part in parts) or "no tokenizer"
        raise EsdLoraError(
            f"base {base.id!r} has {kinds}, and words are drawn from CLIP's. Leave this attack out of the suite."
        )
    vocabulary = sorted(tokenizers[0].get_vocab().items(), key=lambda entry: entry[1])
    words = [token.removesuffix("</w>") for token, _ in vocabulary if token.endswith("</w>")]
    words = [word for word in words if word.isascii() and word.isalpha()]
    for tokenizer in tokenizers:
        tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(words, add_special_tokens=False).input_ids]
        words = [word for word, own in zip(words, tokens, strict=True) if own == [f"{word}</w>"]]
    return words


def spare_words(victim: Victim, count: int) -> list[str]:
    """Return the rarest words that stand in no prompt of the victim, to be given another meaning.

    Raises:
        EsdLoraError: If there are not so many.
    """
    texts = [*(case.prompt for case in victim.cases), *(concept.name for concept in victim.concepts)]
    used = {word for text in texts for word in re.findall(r"\w+", text.lower())}
    free = [word for word in readable_words(victim.base) if word not in used]
    if len(free) < count:
        raise EsdLoraError(f"this attack needs {count} words that no prompt has, and {len(free)} are left. Ask for less.")
    return free[-count:]


def _ids(tokenizer: Any, words: Sequence[str]) -> Tensor:
    return torch.tensor(tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in words]))
