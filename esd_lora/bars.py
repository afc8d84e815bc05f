"""Progress on a terminal: bars whose estimates mean something, and a clock where nothing can be counted."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

from tqdm.auto import tqdm

from esd_lora.progress import Advance, is_shown, shown_by
from esd_lora.wording import printable

_FEW = 3
"""Units beside the first after which the rest is estimated."""
_DELAY = 0.5  # seconds; what is done by then is not shown
_BEAT = 0.5  # seconds between two looks at what is on the screen
_GAP = 0.5  # seconds without a bar after which a clock is shown
_CLOCK = "{desc} ... {elapsed}"


class Bar(tqdm):
    """tqdm's bar, which estimates nothing before it can.

    The first unit pays for all that is done once, so time counts from its end; what is left is estimated from `_FEW` further
    ones on.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._first: tuple[float, float] | None = None
        self._latest = 0.0
        if Pulse.current:
            Pulse.current.hide()
        super().__init__(*args, **options)

    def update(self, n: float | None = 1) -> bool | None:
        """Count units, as tqdm does."""
        self._latest = time.monotonic()
        shown = super().update(n)
        if self._first is None:
            self._first = self.n, self._latest
        return shown

    @property
    def format_dict(self) -> Any:
        """What is shown, as tqdm has it."""
        return {**super().format_dict, "rate": self.rate()}

    def rate(self) -> float:
        """Return the units in a second since the first, 0 while there are too few to tell."""
        if self._first is None:
            return 0.0
        units, seconds = self.n - self._first[0], self._latest - self._first[1]
        return units / seconds if units >= _FEW and seconds > 0 else 0.0


def watchable() -> bool:
    """Return whether somebody looks: standard error is a terminal, and nobody asked for quiet."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TQDM_DISABLE", "0") in ("", "0")


def watched(progress: bool) -> AbstractContextManager[None]:
    """Show the stages inside a `with` block on a terminal, if there is one and nobody else shows them already.

    Args:
        progress: Whether to show anything at all.
    """
    if not progress:
        return shown_by(None)
    return shown_by(_on_terminal) if watchable() and not is_shown() else nullcontext()


@contextmanager
def _on_terminal(desc: str, total: float | None, unit: str) -> Generator[Advance]:
    """Show a stage, which is gone when it is over: a bar, or a clock where there is no total."""
    form = None if total else _CLOCK
    options: dict[str, Any] = {"unit_scale": unit == "B", "leave": False, "delay": _DELAY, "bar_format": form}
    with Bar(desc=printable(desc), total=total, unit=unit, **options) as bar:
        yield bar.update


def lines_between_bars() -> AbstractContextManager[None]:
    """Have bars make room for lines that are printed inside a `with` block."""
    return tqdm.external_write_mode(file=sys.stderr) if _open_bars() else nullcontext()


def _open_bars() -> list[Any]:
    """Return the bars that are shown, other libraries' among them."""
    return list(getattr(tqdm, "_instances", ()))


class Pulse:
    """Keeps a terminal alive for the length of a `with` block, in a thread.

    Bars are drawn anew, so that time is seen to pass however long a unit takes; and where there is none for a while, a clock
    stands in its place.

    Args:
        desc: What the clock stands beside.
    """

    current: ClassVar[Pulse | None] = None

    def __init__(self, desc: str) -> None:
        self._desc, self._clock = desc, None
        self._began = self._gap_began = time.time()
        self._over = threading.Event()
        self.paused = False
        """Whether nothing is drawn, for a person types."""
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        if watchable():
            Pulse.current = self
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self.hide()
        Pulse.current = None

    def _beat(self) -> None:
        while not self._over.wait(_BEAT):
            self.look(time.time())

    def look(self, now: float) -> None:
        """Draw what is to be seen.

        Args:
            now: On the system's clock.
        """
        with tqdm.get_lock():
            if self.paused:
                return
            if any(bar is not self._clock for bar in _open_bars()):
                self.hide()
                self._gap_began = now
            elif self._clock is None and now - self._gap_began >= _GAP:
                self._clock = tqdm(desc=printable(self._desc), bar_format=_CLOCK, leave=False, delay=_BEAT)
                self._clock.start_t = self._began  # which has passed long ago, so it is drawn now
            for bar in _open_bars():
                if now >= getattr(bar, "start_t", now + 1) + bar.delay:  # one that is just made has none yet
                    bar.refresh()
                    bar.last_print_t = now

    def hide(self) -> None:
        """Take the clock away, for it stands where the next bar will."""
        with tqdm.get_lock():
            if self._clock is not None:
                self._clock.close()
                self._clock = None
                self._gap_began = time.time()


@contextmanager
def undisturbed() -> Generator[None]:
    """Draw nothing inside a `with` block, in which a person types an answer."""
    pulse = Pulse.current
    if pulse is None:
        yield
        return
    pulse.paused = True
    pulse.hide()
    try:
        yield
    finally:
        pulse.paused = False
