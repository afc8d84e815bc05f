"""Notices of diffusers and transformers: kept off the terminal, and given in other words where people need them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from esd_lora.errors import shortened


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the loaders' own bars and notices (one for each component, one for torchvision) off the terminal."""
    import transformers.utils.logging as transformers_log
    from diffusers.utils import logging as diffusers_log

    logs = (transformers_log, diffusers_log)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def warn_of_cuts(tokenizers: Iterable[Any], prompts: Iterable[str]) -> None:
    """Warn once of prompts of which CLIP reads the beginning alone: its pipelines cut the rest off.

    Args:
        tokenizers: CLIP's.
        prompts: The empty one is passed over.
    """
    texts = list(dict.fromkeys(filter(None, prompts)))
    for tokenizer in tokenizers:
        most = tokenizer.model_max_length
        read = {text: tokenizer(text, truncation=True, max_length=most).input_ids for text in texts}
        cut = [text for text in texts if len(read[text]) == most != len(tokenizer(text, verbose=False).input_ids)]
        if cut:
            end = tokenizer.decode(read[cut[0]], skip_special_tokens=True)[-30:]
            warnings.warn(
                f"{len(cut)} of {len(texts)} prompts {'has' if len(cut) == 1 else 'have'} more than the {most - 2} tokens"
                f" that CLIP reads, and the rest is cut off: {shortened(repr(cut[0]))} is read up to {end!r}.",
                stacklevel=3,
            )
            return
