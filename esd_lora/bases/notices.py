"""What diffusers and transformers say of themselves, kept off the terminal where it is said in other words, or of no use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the loaders' own bars and notices (one for each component, one for torchvision) off the terminal."""
    import transformers.utils.logging as transformers_log
    from diffusers.utils import logging as diffusers_log

    before = transformers_log.get_verbosity(), diffusers_log.get_verbosity()
    for log in (transformers_log, diffusers_log):
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        transformers_log.set_verbosity(before[0])
        diffusers_log.set_verbosity(before[1])
        for log in (transformers_log, diffusers_log):
            log.enable_progress_bar()
