"""Ctrl-C in a training: at once where nothing would be lost, else after the step in hand; a checkpoint is left either way."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Protocol, runtime_checkable

from esd_lora.bars import watchable
from esd_lora.ranks import count
from esd_lora.teacher import Teacher
from esd_lora.train_state import TrainState
from esd_lora.watching import StepReport, Watcher


@runtime_checkable
class Closing(Protocol):
    """A watcher that has something to write or to close when a training is interrupted between two steps."""

    def leave(self, report: StepReport) -> object:
        """Write or close it.

        Args:
            report: Of the last step, which the watcher has seen.
        """
        ...


_STOPPING = b"\nstopping after the step in hand; Ctrl-C once more stops at once\n"


class Interruption:
    """A handler that turns Ctrl-C into a stop at the end of the step in hand; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = self._at_once = False
        self._previous: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there may a program set handlers
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        if self._at_once:
            raise KeyboardInterrupt
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if watchable():
            with suppress(OSError, ValueError):  # a file of Python's may be in the middle of a write
                os.write(sys.stderr.fileno(), _STOPPING)

    @contextmanager
    def at_once(self) -> Generator[None]:
        """Have Ctrl-C stop at once inside a `with` block, where no step is in hand; ranks stop together, after the next one."""
        self._at_once = count() == 1
        try:
            yield
        finally:
            self._at_once = False


@contextmanager
def resumable(teacher: Teacher, state: TrainState, watchers: Sequence[Watcher]) -> Generator[None]:
    """Leave behind what the last step came to, where Ctrl-C stops a `with` block between two steps or after the last.

    Args:
        teacher: What it predicted in the block does not count: it is done again.
        state: After that step.
        watchers: Those with something to write do, checkpoint and log among them.
    """
    evaluations = teacher.evaluations
    try:
        yield
    except KeyboardInterrupt:
        teacher.evaluations = evaluations
        report = StepReport(state, teacher, interrupted=True, last=True)
        for watch in watchers:
            if isinstance(watch, Closing):
                watch.leave(report)
        raise
