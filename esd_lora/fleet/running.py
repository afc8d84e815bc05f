"""Running a fleet: every open request becomes an eraser that is measured, and what is done already is not done again.

The driver alone writes where requests stand (`erasers/ID/status.json`), a line for each end (`fleet.jsonl`) and the page;
workers write erasers and measurements. So a worker that is killed costs its own job, and a driver that is killed nothing: what
was begun and not ended is begun anew.
"""

from __future__ import annotations

import datetime
import json
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from esd_lora.bars import Bar
from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.erasers.header import HEADER_KEY, EraserHeader, parse_header
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.files import lock_output, reporting_write_errors
from esd_lora.fleet.engines import Engine, Lost
from esd_lora.fleet.jobs import ACTIVE, Job, Plan, is_stale
from esd_lora.fleet.page import Page
from esd_lora.fleet.request import Request
from esd_lora.fleet.status import State, Status, folder_of, read_status, write_status
from esd_lora.fleet.working import Outcome
from esd_lora.wording import printable

EVENTS_NAME = "fleet.jsonl"
"""A line of JSON for every job that ended: when, which, how, at which attempt, after how many seconds."""

MakeEngine = Callable[[Plan, Path], Engine]


class Shard(NamedTuple):
    """One of several parts of a list, by the ids: each is worked on by a driver of its own, on a machine of its own."""

    number: int
    """From 0."""
    count: int

    def __str__(self) -> str:
        """Return the name of its page, which the whole list's does not share with those of parts."""
        return "fleet" if self.count == 1 else f"fleet-{self.number}-of-{self.count}"

    def holds(self, request: str) -> bool:
        """Return whether a request is in this part, whatever else is in the list."""
        return zlib.crc32(request.encode()) % self.count == self.number

    @classmethod
    def read(cls, text: str) -> Shard:
        """Read `0/4`.

        Raises:
            EsdLoraError: If it is of another form, or there is no such part.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise EsdLoraError(f"--shard {text!r}: expected NUMBER/COUNT with numbers from 0, such as 0/4 to 3/4.")
        return cls(int(number), int(count))


class Choice(NamedTuple):
    """Which requests of a list are worked on now."""

    only: Collection[str] = ()
    """Ids; all unless given."""
    shard: Shard = Shard(0, 1)
    limit: int | None = None
    """Most jobs, those that are due first."""
    retry_failed: bool = False
    """Whether what failed or was refused is tried again, though nothing about it has changed."""


def run_fleet(
    requests: Sequence[Request],
    plan: Plan,
    out: str | Path,
    make_engine: MakeEngine,
    *,
    choice: Choice = Choice(),  # noqa: B008, which is frozen
    attempts: int = 3,
    progress: bool = True,
) -> dict[str, Status]:
    """Make and measure the eraser of every request, and return where the chosen ones stand, by id.

    Args:
        requests: All of the list; those to be erased (`ACTIVE`) are worked on, soonest due first.
        plan: Of the list, from `Plan.of`.
        out: Folder: `erasers/ID/` for each request, `logs/`, `fleet.jsonl`, `fleet.html` (`fleet-0-of-4.html` of a shard).
        make_engine: From plan and folder to what works on the jobs: `LocalEngine` with its workers.
        choice: Which requests, if not all.
        attempts: How often a job may be lost or fail before it is given up; what is refused is not tried again.
        progress: Whether to show a progress bar.

    Raises:
        EsdLoraError: If an id of `choice` is unknown, another run works on the same part, or workers cannot begin.
    """
    out = Path(out)
    with reporting_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with lock_output(out / str(choice.shard)):
        statuses, jobs = survey(requests, plan, out, choice)
        for status in statuses.values():
            if status != read_status(out, status.id):
                write_status(out, status)
        page = Page(out / f"{choice.shard}.html", requests, statuses)
        states = Counter[State](status.state for status in statuses.values())
        queue = deque(jobs)
        with Bar(total=len(jobs), desc="fleet", unit="request", disable=not progress) as bar:

            def begun(job: Job) -> None:
                before = statuses[job.request.id]
                _move(statuses, out, before.with_state("running", attempts=before.attempts + 1))

            engine = make_engine(plan, out)
            for outcome in engine.run(queue, begun) if jobs else ():
                status = _after(statuses[outcome.job.request.id], outcome, attempts)
                _move(statuses, out, status)
                _record(out, status)
                if status.state == "queued":
                    queue.append(outcome.job)
                else:
                    states[status.state] += 1
                    bar.update()
                    bar.set_postfix_str(printable(_summary(states, page)))
                page.write_now_and_then()
        page.write()
    return statuses


def survey(
    requests: Sequence[Request],
    plan: Plan,
    out: Path,
    choice: Choice = Choice(),  # noqa: B008, which is frozen
) -> tuple[dict[str, Status], list[Job]]:
    """Return where the chosen requests stand, by id, and the jobs that are to be done, soonest due first; nothing is written.

    Raises:
        EsdLoraError: If an id of `choice` is unknown, or a status is damaged.
    """
    unknown = sorted({*choice.only} - {request.id for request in requests})
    if unknown:
        raise EsdLoraError(f"--only {unknown[0]}: the list has no such request. Check its id.")
    chosen = [
        request
        for request in requests
        if request.status in ACTIVE and choice.shard.holds(request.id) and (not choice.only or request.id in choice.only)
    ]
    chosen.sort(key=lambda request: (request.due or datetime.date.max, request.received or datetime.date.max, request.id))
    statuses: dict[str, Status] = {}
    jobs: list[Job] = []
    for request in chosen:
        before = read_status(out, request.id)
        try:
            job = plan.job(request)
        except EsdLoraError as error:
            statuses[request.id] = Status(id=request.id, key="", state="refused").with_state("refused", reason=str(error))
            continue
        statuses[request.id] = before or Status(id=request.id, key=job.key, state="queued")
        if before is None or _to_do(before, job, plan, out, choice.retry_failed):
            jobs.append(job)
    jobs = jobs[: choice.limit]
    return statuses | {job.request.id: Status(id=job.request.id, key=job.key, state="queued") for job in jobs}, jobs


def _to_do(before: Status, job: Job, plan: Plan, out: Path, retry_failed: bool) -> bool:
    """Return whether a request that something is known of has to be worked on."""
    if before.key != job.key or before.state in ("queued", "running"):
        return True
    if before.state in ("failed", "refused"):
        return retry_failed
    return bool(plan.avoid) and is_stale(_header(out, job.request.id), plan.avoided_by(job.request))


def _header(out: Path, request: str) -> EraserHeader:
    weights = folder_of(out, request) / WEIGHTS_NAME
    return parse_header(read_header(weights).metadata[HEADER_KEY], weights)


def _after(before: Status, outcome: Outcome | Lost, attempts: int) -> Status:
    """Return where a request stands once a worker is through with it, or gone."""
    if isinstance(outcome, Lost):
        state = "failed" if before.attempts >= attempts else "queued"
        return before.with_state(state, reason=outcome.reason)
    fields = {"worst": outcome.worst, "recipe": outcome.recipe, "seconds": round(outcome.seconds, 3), "reason": outcome.reason}
    figures = {name: round(value, 4) for name, value in (outcome.figures or {}).items()}
    state = "queued" if outcome.state == "failed" and before.attempts < attempts else outcome.state
    return before.with_state(state, figures=figures, **fields)


def _summary(states: Counter[State], page: Page) -> str:
    """Return what the bar says beside how many jobs have ended: `12 done, 1 failed, 2 overdue`."""
    parts = [f"{count} {state}" for state, count in states.items() if state != "queued"]
    return ", ".join([*parts, *([f"{page.late} overdue"] if page.late else [])])


def _move(statuses: dict[str, Status], out: Path, status: Status) -> None:
    statuses[status.id] = status
    write_status(out, status)


def _record(out: Path, status: Status) -> None:
    """Append a line to the events; each is written by one call, so lines of several drivers do not mix."""
    event = {
        "time": status.ended or _now(),
        **status.model_dump(include={"id", "key", "state", "attempts", "reason", "seconds"}),
    }
    with (out / EVENTS_NAME).open("ab", buffering=0) as file:
        file.write(f"{json.dumps(event, ensure_ascii=False)}\n".encode())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_events(out: str | Path) -> Iterator[dict[str, object]]:
    """Yield what ended, oldest first; a last line that a crash cut off is left out."""
    file = Path(out) / EVENTS_NAME
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)
