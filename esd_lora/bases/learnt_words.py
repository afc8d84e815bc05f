"""Words that a text encoder never read: embeddings of their own, which prompts name by a placeholder, `<thing-3fa9c1d2>`.

A word is learnt on pictures (`from_pictures`) and travels in the header of an eraser. Where a prompt has its placeholder, an
unused token is encoded in its place, and that token's embedding is replaced on the way; neither the tokenizer nor the table of
embeddings changes. A placeholder ends in a hash of its embeddings, so the words of several erasers never clash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from esd_lora.errors import EsdLoraError

Embeddings: TypeAlias = Mapping[str, Tensor]
"""Name of each text encoder of a pipeline (`text_encoder`, `text_encoder_2`) to a word's embedding there, [width], float32."""


def text_encoders(pipe: Any) -> dict[str, Any]:
    """Return the text encoders of a pipeline that are loaded, by name."""
    named = {name: getattr(pipe, name) for name in pipe.components if name.startswith("text_encoder")}
    return {name: encoder for name, encoder in named.items() if encoder is not None}


def tables_of(encoder: Any) -> list[nn.Embedding]:
    """Return the modules through which a text encoder looks its tokens up; T5 runs another than it says, of one weight."""
    weight = encoder.get_input_embeddings().weight
    return [module for module in encoder.modules() if isinstance(module, nn.Embedding) and module.weight is weight]


def numbers_of(tokenizer: Any, text: str) -> list[int]:
    """Return the numbers of a text's tokens, all of them, and none that stand for its beginning or end.

    Args:
        tokenizer: Of a pipeline; a processor of pictures and text has one inside.
        text: Of any length.
    """
    return list(getattr(tokenizer, "tokenizer", tokenizer)(text, add_special_tokens=False, verbose=False).input_ids)


def placeholder_of(embeddings: Embeddings) -> str:
    """Return the placeholder of a word, which depends on its embeddings alone."""
    digest = hashlib.sha256(b"".join(embeddings[name].numpy().tobytes() for name in sorted(embeddings)))
    return f"<thing-{digest.hexdigest()[:8]}>"


def pack(embeddings: Embeddings) -> dict[str, str]:
    """Return a word as it stands in a header: text encoder to base64 of its embedding, float32, little-endian."""
    return {
        name: base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() for name, vector in sorted(embeddings.items())
    }


def unpack(word: Mapping[str, str]) -> dict[str, Tensor]:
    """Return what `pack` was given."""
    return {
        name: torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32))
        for name, text in word.items()
    }


@contextmanager
def spelt_out(pipe: Any, words: Mapping[str, Embeddings], prompts: Sequence[str]) -> Generator[list[str]]:
    """Give prompts in which each learnt word is a token that means it for the length of a `with` block.

    Args:
        pipe: The pipeline, with its text encoders.
        words: Placeholder to embeddings.
        prompts: That are encoded together.

    Raises:
        EsdLoraError: If a word was learnt with other text encoders, or the tokenizers leave no token free.
    """
    used = [placeholder for placeholder in words if any(placeholder in prompt for prompt in prompts)]
    with ExitStack() as hooks:
        texts, encoders = list(prompts), text_encoders(pipe) if used else {}
        for placeholder in used:
            _require_fitting(placeholder, words[placeholder], encoders)
            token, numbers = _free_token(pipe, encoders, placeholder, texts)
            texts = [text.replace(placeholder, token) for text in texts]
            for name, encoder in encoders.items():
                replace = partial(replace_tokens, numbers[name], words[placeholder][name])
                for table in tables_of(encoder):
                    hooks.callback(table.register_forward_hook(replace).remove)
        yield texts


def replace_tokens(numbers: Tensor, vector: Tensor, table: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:  # noqa: ARG001
    """Return the embeddings [N, tokens, width] of a table with those of some tokens replaced, as its forward hook.

    Args:
        numbers: Of the tokens, [K].
        vector: What they mean, [width].
        table: That is run.
        args: Numbers of the tokens that it is run on, [N, tokens].
        out: What it returns.
    """
    same = torch.isin(args[0], numbers.to(args[0].device))
    return torch.where(same[..., None], vector.to(out), out)


def _require_fitting(placeholder: str, word: Embeddings, encoders: Mapping[str, Any]) -> None:
    """Refuse a word that was learnt with text encoders of another kind."""
    own = {name: encoder.get_input_embeddings().weight.shape[1] for name, encoder in encoders.items()}
    learnt = {name: len(vector) for name, vector in word.items()}
    if own != learnt:
        raise EsdLoraError(
            f"the word {placeholder} was learnt with text encoders of widths {learnt}, and this base has"
            f" {own or 'none loaded'}. Use the base that the eraser was trained on."
        )


def _free_token(
    pipe: Any, encoders: Mapping[str, Any], placeholder: str, texts: Sequence[str]
) -> tuple[str, dict[str, Tensor]]:
    """Return a text that each tokenizer makes one token of in the place of a placeholder, and its numbers by text encoder.

    Nothing else in the texts has that token.
    """
    tokenizers = {name: getattr(pipe, name.replace("text_encoder", "tokenizer")) for name in encoders}
    around = [text for text in texts if placeholder in text]
    others = {
        name: set(numbers_of(tokenizer, " ".join(texts).replace(placeholder, ""))) for name, tokenizer in tokenizers.items()
    }
    for token in _candidates(next(iter(tokenizers.values()))):
        numbers = {name: _one_token(tokenizer, token) for name, tokenizer in tokenizers.items()}
        if all(numbers[name] and not numbers[name] & others[name] for name in tokenizers) and all(
            sum(number in numbers[name] for number in numbers_of(tokenizer, text.replace(placeholder, token)))
            == text.count(placeholder)
            for name, tokenizer in tokenizers.items()
            for text in around
        ):
            return token, {name: torch.tensor(sorted(own)) for name, own in numbers.items()}
    raise EsdLoraError(f"no token is left that could stand for {placeholder}: its tokenizers have no word that no prompt has.")


@lru_cache(maxsize=4)
def _candidates(tokenizer: Any) -> list[str]:
    """Return plain words and signs of a tokenizer's vocabulary, the rarest first; a large one takes a while to look through."""
    vocabulary = getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token], reverse=True)
    words = (re.sub(r"</w>$|^[\u0120\u2581]", "", token) for token in tokens)
    return [word for word in words if word.isascii() and (word.isalpha() or (len(word) == 1 and word.isprintable()))]


def _one_token(tokenizer: Any, word: str) -> set[int]:
    """Return the numbers of the one token that a word is, alone, behind another and before a comma; none where it is more."""
    alone, behind, before = (numbers_of(tokenizer, text) for text in (word, f"a {word}", f"{word},"))
    if len(alone) != 1 or len(behind) != len(numbers_of(tokenizer, "a b")) or len(before) != 2:
        return set()
    return {alone[0], behind[-1], before[0]}
