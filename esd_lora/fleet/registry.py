"""The registry: what became of every request, as a log to which lines are added and in which none is changed.

The requests as they stand are the events of `registry.jsonl`, one after the other; `requests.csv` beside it shows them, and is
written anew after each change.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from esd_lora.errors import EsdLoraError, did_you_mean, shortened
from esd_lora.faults import faults_of, first_fault, listed
from esd_lora.files import lock_output, refuse_inputs
from esd_lora.fleet.event_log import Change, Event, EventLog
from esd_lora.fleet.request import MAX_NAME, MAX_REFERENCE, Request, Status
from esd_lora.fleet.requests import contradictions, warn_of_overlaps, write_requests
from esd_lora.wording import in_one_line

LOG = "registry.jsonl"
VIEW = "requests.csv"
Decision: TypeAlias = Literal["open", "refused"]
"""What may become of a request on which a person decides."""


class Registry:
    """The requests of one folder, and the log of what happened to them.

    Whoever changes something holds the log for that moment, and reads first what others have added to it.

    Args:
        folder: Holds `registry.jsonl` and `requests.csv`; made with the first request.
        who: Whom events name. A person's account, say, or a service's; it stays in the log for good.
    """

    def __init__(self, folder: str | Path, who: str = "unknown"):
        self.folder = Path(folder)
        self.view = self.folder / VIEW
        self.who = in_one_line(who)[:MAX_NAME] or "unknown"
        self._added: dict[str, Request] = {}
        self._requests: dict[str, Request] = {}
        self._log = EventLog(self.folder / LOG)

    @classmethod
    def open(cls, folder: str | Path, who: str = "unknown", *, new: bool = False) -> Registry:
        """Return the registry of a folder, and warn if its last line was cut off while it was written.

        Args:
            folder: As in the class.
            who: As in the class.
            new: Whether it may have no request yet.

        Raises:
            EsdLoraError: If there is none, or as `EventLog.read` does.
        """
        registry = cls(folder, who)
        log = registry._log
        if not new and not log.file.is_file():
            raise EsdLoraError(f"there is no registry in {folder}: it has no {LOG}. Add requests to it first, or give another.")
        registry._catch_up()
        if log.torn:
            warnings.warn(
                f"{log.file}:{log.number + 1}: was cut off while it was written, and counts for nothing. The next change takes"
                " its place.",
                stacklevel=2,
            )
        return registry

    def requests(self) -> tuple[Request, ...]:
        """Return the requests as they stand, withdrawn ones too, in the order they were added; `line` is that of the log."""
        return tuple(self._requests.values())

    def overdue(self, today: date) -> tuple[Request, ...]:
        """Return the open and ambiguous requests that were due before a day, the longest overdue first."""
        late = (r for r in self.requests() if r.due and r.due < today and r.status in ("open", "ambiguous"))
        return tuple(sorted(late, key=lambda request: (request.due, request.id)))

    def add(self, requests: Iterable[Request], file: str | Path | None = None) -> tuple[Request, ...]:
        """Add requests, all or none, warn where names overlap with those of others, and return those that are new.

        A request that is there already, as it was added or as it stands, is left as it is.

        Args:
            requests: What to add.
            file: Where they were read from, for messages.

        Raises:
            EsdLoraError: With every fault at once: a request of the same id that says something else, and `contradictions`
                among all that there are. Or as `open` does, or if the log cannot be written.
        """
        new: dict[str, Request] = {}

        def given(request: Request) -> str:
            return f"{file}:{request.line}" if file is not None and request.line else f"request {request.id}"

        def where(request: Request) -> str:
            return given(request) if request.id in new else self._place(request)

        refuse_inputs(self.view, [] if file is None else [file])
        with self._held():
            if self.view.exists() and not self._log.number:
                raise EsdLoraError(f"{self.view} is there, and no event of a {LOG} behind it. Move it, or give another folder.")
            there = {request.id.casefold(): request for request in self.requests()}
            sentences: list[str] = []
            for request in requests:
                other = there.get(request.id.casefold())
                if other is None:
                    there[request.id.casefold()] = new[request.id] = request
                elif fault := self._difference(other, request):
                    sentences.append(f"{given(request)}: {fault}")
            everyone = [*self.requests(), *new.values()]
            _refuse([*sentences, *contradictions(everyone, where)])
            warn_of_overlaps(everyone, where, new)
            self._append([Change("added", request.id, request.record()) for request in new.values()])
        return tuple(self._requests[id] for id in new)

    def decide(
        self,
        id: str,
        decision: Decision,
        reason: str = "",
        *,
        concept: str | None = None,
        anchor: str | None = None,
        synonyms: Iterable[str] | None = None,
    ) -> Request:
        """Decide on a request that is ambiguous or open, say more exactly what is meant, and return it as it stands then.

        Args:
            id: The request's.
            decision: `open` to have it erased, `refused` with a reason.
            reason: Why.
            concept: What is meant, in the place of its concept.
            anchor: In the place of its anchor.
            synonyms: In the place of its synonyms.

        Raises:
            EsdLoraError: If it is neither ambiguous nor open, nothing is decided, a refusal has no reason, or the open request
                contradicts another. Or as `add` does.
        """
        names = {"concept": concept, "anchor": anchor, "synonyms": None if synonyms is None else list(synonyms)}
        changes = {name: value for name, value in names.items() if value is not None}
        with self._held():
            request = self._request(id)
            if request.status not in ("ambiguous", "open"):
                raise EsdLoraError(f"{id} is {request.status}. Only requests that are ambiguous or open are decided.")
            if decision == "refused" and (changes or not reason.strip()):
                raise EsdLoraError(f"refusing {id} takes a reason, and changes no names.")
            payload = {"status": decision, "reason": _reason(reason), **changes}
            decided = self._changed(request, payload)
            if decided == request:
                raise EsdLoraError(f"{id} is open already, and no concept, anchor or synonym was given that is another.")
            if decision == "open":
                self._check([decided])
            self._append([Change("decided", id, payload)])
        return self._requests[id]

    def withdraw(self, id: str, reason: str = "") -> Request:
        """Withdraw a request, which stays in the log, and return it as it stands then; one that is withdrawn stays as it is.

        Raises:
            EsdLoraError: If there is no such request. Or as `add` does.
        """
        with self._held():
            if self._request(id).status != "withdrawn":
                self._append([Change("withdrawn", id, {"status": "withdrawn", "reason": _reason(reason)})])
        return self._requests[id]

    def set_status(self, ids: str | Iterable[str], status: Status, reason: str = "") -> tuple[Request, ...]:
        """Say what became of requests, all or none, and return those that stood elsewhere before.

        Args:
            ids: One id, or several, which is quicker than one after the other.
            status: Any but `withdrawn`, which is the word of `withdraw`.
            reason: Why.

        Raises:
            EsdLoraError: If one is withdrawn, or would be open and contradict another. Or as `add` does.
        """
        if status == "withdrawn":
            raise EsdLoraError("a request is withdrawn by itself, not by setting a status. Withdraw it.")
        payload = {"status": status, "reason": _reason(reason)}
        with self._held():
            old = [self._request(id) for id in dict.fromkeys([ids] if isinstance(ids, str) else ids)]
            if gone := [request.id for request in old if request.status == "withdrawn"]:
                raise EsdLoraError(
                    f"{', '.join(gone[:10])} is withdrawn, and stays so. Add what was sent anew under another id."
                )
            moved = [request for request in old if request.status != status]
            if status == "open":
                self._check([self._changed(request, payload) for request in moved])
            self._append([Change("status", request.id, payload) for request in moved])
        return tuple(self._requests[request.id] for request in moved)

    def _request(self, id: str) -> Request:
        if id not in self._requests:
            raise EsdLoraError(
                f"there is no request {shortened(repr(id))} in {self._log.file}{did_you_mean(id, self._requests)}."
            )
        return self._requests[id]

    def _difference(self, there: Request, request: Request) -> str | None:
        """Return what a request says otherwise than the one of its id that is there; `None` where nothing."""
        if there.id != request.id:
            return f"id: {request.id!r} differs from {there.id!r} in case alone. Give it another"
        if request in (there, self._added.get(there.id)):
            return None
        record = request.record()
        # Beside what it was when it was added: that it is done by now is no difference.
        other = self._added.get(there.id, there).record()
        names = [name for name in {**other, **record} if other.get(name) != record.get(name)]
        differ = "; ".join(
            f"{name} {shortened(repr(other.get(name)))} there, {shortened(repr(record.get(name)))} here" for name in names
        )
        return f"{request.id} says something else than in the registry: {differ}. Decide on that one, or give this another id"

    def _place(self, request: Request) -> str:
        """Return where in the log a request was added."""
        return f"{self._log.file}:{self._requests[request.id].line}"

    def _check(self, changed: Iterable[Request]) -> None:
        """Refuse requests that contradict others once they have changed, and warn of those that overlap."""
        ids = {request.id: request for request in changed}
        everyone = [ids.get(request.id, request) for request in self.requests()]
        _refuse(contradictions(everyone, self._place))
        warn_of_overlaps(everyone, self._place, ids)

    @contextmanager
    def _held(self) -> Generator[None]:
        """Hold the log for the length of a `with` block, know all that is in it, and show afterwards how requests stand."""
        with lock_output(self._log.file):
            self._catch_up()
            yield
            if self._log.number:
                try:
                    write_requests(self.requests(), self.view)
                except EsdLoraError as error:  # what happened is in the log all the same
                    warnings.warn(f"{self.view} shows no longer what {self._log.file} says: {error}", stacklevel=4)

    def _catch_up(self) -> None:
        """Let the events happen that were added to the log since it was read."""
        for event in self._log.read():
            try:
                self._requests[event.id] = self._after(event)
            except ValidationError as error:
                raise self._log.damage(event.number, first_fault(error)) from error
            except (ValueError, EsdLoraError) as error:
                raise self._log.damage(event.number, str(error)) from error

    def _after(self, event: Event) -> Request:
        """Return the request of an event as it stands after it."""
        if event.what != "added":
            return self._changed(self._request(event.id), event.payload)
        request = Request.of_record(event.payload, event.number)
        if request.id != event.id or request.id in self._requests:
            raise ValueError(f"it adds {request.id} as {event.id}, or for a second time")
        self._added[request.id] = request
        return request

    def _changed(self, request: Request, payload: Mapping[str, Any]) -> Request:
        """Return a request with what the payload of an event changes.

        Raises:
            EsdLoraError: If a name is none.
        """
        changes = {name: payload[name] for name in ("status", "concept", "anchor", "synonyms") if name in payload}
        try:
            return Request.model_validate({**request.model_dump(), **changes, "line": request.line})
        except ValidationError as error:
            raise EsdLoraError(f"{request.id}: {'; '.join(fault.sentence() for fault in faults_of(error))}.") from error

    def _append(self, changes: Collection[Change]) -> None:
        """Add events to the log, and let them happen."""
        if changes:
            self._log.append(changes, self.who)
            self._catch_up()


def _reason(text: str) -> str:
    return in_one_line(text)[:MAX_REFERENCE]


def _refuse(sentences: list[str]) -> None:
    if sentences:
        raise EsdLoraError("the requests contradict what is there:\n  " + "\n  ".join(listed(sentences)))
