"""The one exception a user can cause, and the sentence it carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 2000  # characters of a line


class EsdLoraError(Exception):
    """A fault the user can mend. The message says what was found, what was expected, and what to do.

    The command line prints the message alone and exits with 1; any other exception is a bug and keeps its traceback. What a
    stranger's file says may stand in it, so a line that is too long to be read is cut in the middle, and half a character
    (a lone surrogate, which nothing can print) is written as its number.
    """

    def __init__(self, message: str) -> None:
        lines = message.encode("utf-8", "backslashreplace").decode("utf-8").split("\n")
        super().__init__("\n".join(line if len(line) <= _LONGEST else f"{line[:1300]} [...] {line[-400:]}" for line in lines))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known word nearest to `word`, or `""` when none is near."""
    near = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def how_to_install(extra: str) -> str:
    """Return what to run for a package that an extra of this project brings.

    The project is on no registry yet, so this is the form that works from a clone.

    Args:
        extra: A name in pyproject.toml's optional dependencies.
    """
    return f"run in your clone of esd-lora: pip install '.[{extra}]'"


def near_ones(word: str, known: Iterable[str], count: int = 5) -> list[str]:
    """Return the known words that are most like one that is not known, the nearest first."""
    return difflib.get_close_matches(word[:100], list(known), n=count, cutoff=0.0)


def shortened(text: str) -> str:
    """Return a stranger's text in one line of a length to be read."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:197]}..."
