"""What is at work and how much of it is done, for whoever shows it: a terminal (`bars`), a page, or nobody.

Work says itself what it does, and does not know who listens:

    with stage("walking trajectories", total=points, unit="point"):
        ...
        advance(len(latents))

Nobody listens unless `shown_by` names somebody, for this thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeAlias

Advance: TypeAlias = Callable[[float], object]
"""Takes how many further units are done."""


class Display(Protocol):
    """Shows a stage for the length of a `with` block."""

    def __call__(self, desc: str, total: float | None, unit: str) -> AbstractContextManager[Advance]:
        """Begin to show a stage.

        Args:
            desc: What is done, in words; strangers' text may be part of it.
            total: Number of units; `None` where they cannot be counted, and only time can be shown.
            unit: Name of one.
        """
        ...


_display: ContextVar[Display | None] = ContextVar("display", default=None)
_advance: ContextVar[Advance | None] = ContextVar("advance", default=None)


@contextmanager
def shown_by(display: Display | None) -> Generator[None]:
    """Have a display hear of every stage inside a `with` block, or nobody."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


def is_shown() -> bool:
    """Return whether a display hears of stages here."""
    return _display.get() is not None


@contextmanager
def stage(desc: str, total: float | None = None, unit: str = "it") -> Generator[None]:
    """Say what is done inside a `with` block; `advance` there counts for the innermost stage.

    Args:
        desc: What is done, in words.
        total: Number of units, if they are counted.
        unit: Name of one.
    """
    display = _display.get()
    if display is None:
        yield
        return
    with display(desc, total, unit) as further:
        token = _advance.set(further)
        try:
            yield
        finally:
            _advance.reset(token)


def advance(units: float = 1) -> None:
    """Say that further units of the innermost stage are done."""
    if further := _advance.get():
        further(units)
