"""How long parts of some work take, while it runs as ever."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from threading import Lock
from typing import Any
from unittest.mock import patch

_ADDING = Lock()


def timed(
    spent: MutableMapping[str, float], part: str, owner: Any, name: str, clock: Callable[[], float] = time.perf_counter
) -> Any:
    """Return a context in which the time of every call of a function is added up; threads may call it at once.

    Args:
        spent: Part to seconds, with 0 for this one.
        part: Of the work.
        owner: Module, class or object that has the function.
        name: Of the function there.
        clock: Gives seconds.
    """
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            return real(*args, **kwargs)
        finally:
            with _ADDING:
                spent[part] += clock() - started

    return patch.object(owner, name, call)
