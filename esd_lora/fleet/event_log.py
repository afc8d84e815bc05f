"""A log of events, to which lines are added and in which none is changed.

Each line is an event and holds the SHA-256 of the line before it, so that one that was changed is noticed. What is added is on
the disk before it counts. A run that is killed while it adds leaves at most the beginning of a line at the end, which the next
addition takes away; anything else that is no event is damage.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from esd_lora.errors import EsdLoraError, shortened
from esd_lora.faults import first_fault
from esd_lora.files import reporting_write_errors, sync
from esd_lora.json_files import MAX_JSON, parse_json

MAX_BYTES = 2**28
"""Longest log that is read: half a million events of 500 bytes."""
What: TypeAlias = Literal["added", "decided", "withdrawn", "status"]
"""What may happen to a request."""


class Change(NamedTuple):
    """What is to become an event."""

    what: What
    id: str
    payload: dict[str, Any]


class Event(BaseModel):
    """A line of the log."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    number: int
    """Its line, from 1."""
    time: AwareDatetime
    """When it was added, in UTC."""
    who: str
    """Who added it."""
    what: What
    """What happened."""
    id: str
    """To which request."""
    payload: dict[str, Any]
    """What else belongs to it."""
    before: str
    """SHA-256 of the line before it, without its line break; of nothing where it is the first."""


class EventLog:
    """The events of one file, as far as they were read.

    Args:
        file: Made with the first event. Whoever adds to it holds it (`files.lock_output`).
    """

    def __init__(self, file: Path):
        self.file = file
        self.number = 0
        """The last event's."""
        self.torn = False
        """Whether the beginning of a line stood after it."""
        self._size, self._ended = 0, True  # in bytes; whether the last event has its line break
        self._hash = _hash(b"")

    def read(self) -> list[Event]:
        """Return the events that were added since the last call.

        Raises:
            EsdLoraError: If it cannot be read, is too large, or was damaged or changed; the message names the line.
        """
        content = self._rest()
        if not self._ended and content:
            if not content.startswith(b"\n"):
                raise self.damage(self.number, "it goes on where it ended")
            content, self._size, self._ended = content[1:], self._size + 1, True
        *lines, last = content.split(b"\n")
        events: list[Event] = []
        for line in lines:
            events.append(self._next(line))
            self._size += len(line) + 1
        self.torn = bool(last) and not _is_json(last)  # no beginning of an object is JSON
        if last and not self.torn:  # whole but for its line break
            events.append(self._next(last))
            self._size, self._ended = self._size + len(last), False
        return events

    def _rest(self) -> bytes:
        """Return what stands in the file after the events that were read."""
        try:
            with self.file.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                opened.seek(self._size)
                content = opened.read(MAX_BYTES + 1)
        except FileNotFoundError:
            size, content = 0, b""
        except OSError as error:
            raise EsdLoraError(f"{self.file} cannot be read: {error.strerror or error}.") from error
        if size < self._size:
            raise EsdLoraError(f"{self.file} was shortened since it was read. Restore it from a copy.")
        if self._size + len(content) > MAX_BYTES:
            raise EsdLoraError(f"{self.file} has more than {MAX_BYTES:,} bytes, too many for a log. Begin another.")
        return content

    def _next(self, line: bytes) -> Event:
        number = self.number + 1
        try:
            event = Event.model_validate(parse_json(line))
        except ValidationError as error:
            raise self.damage(number, first_fault(error)) from error
        except ValueError as error:
            raise self.damage(number, str(error)) from error
        if event.number != number:
            raise self.damage(number, f"it has the number {event.number}")
        if event.before != self._hash:
            raise EsdLoraError(
                f"{self.file}:{max(self.number, 1)}: was changed after it was written: line {number} holds another hash of what"
                " stands before it. Restore it from a copy."
            )
        self.number, self._hash = number, _hash(line)
        return event

    def damage(self, number: int, what: str) -> EsdLoraError:
        """Return the error of a line that is no event, or cannot be the next one."""
        return EsdLoraError(
            f"{self.file}:{number}: is damaged, expected an event: {shortened(what).rstrip('.')}. Restore it from a copy."
        )

    def append(self, changes: Iterable[Change], who: str) -> None:
        """Add events, all in one; they are on the disk afterwards, and `read` returns them.

        Args:
            changes: What happened.
            who: Whom the events name.

        Raises:
            EsdLoraError: If one is too long, or the system does not let it; then nothing was added.
        """
        lines: list[bytes] = []
        time, before = datetime.now(UTC), self._hash
        for number, (what, id, payload) in enumerate(changes, self.number + 1):
            event = Event(number=number, time=time, who=who, what=what, id=id, payload=payload, before=before)
            lines.append(json.dumps(event.model_dump(mode="json"), ensure_ascii=False).encode())
            before = _hash(lines[-1])
            if len(lines[-1]) > MAX_JSON:
                raise EsdLoraError(
                    f"{id} comes to more than {MAX_JSON:,} bytes, too many for a line of {self.file}. Shorten it."
                )
        with reporting_write_errors(self.file):
            self._write(b"".join([b"" if self._ended else b"\n", *(line + b"\n" for line in lines)]))

    def _write(self, content: bytes) -> None:
        """Write after the last event."""
        with self.file.open("ab", buffering=0) as opened:
            if os.fstat(opened.fileno()).st_size > self._size:
                opened.truncate(self._size)
            try:
                if opened.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(opened.fileno())
            except OSError:
                with suppress(OSError):
                    opened.truncate(self._size)
                    if not self._size:
                        self.file.unlink()
                raise
        if not self._size:
            sync(self.file.parent)


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True
