"""The one exception a user can cause, and the sentence it carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EsdLoraError(Exception):
    """A fault the user can mend. The message says what was found, what was expected, and what to do.

    The command line prints the message alone and exits with 1; any other exception is a bug and keeps its traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known word nearest to `word`, or `""` when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
