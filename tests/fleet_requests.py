"""Requests of a small fleet, and workers that do next to nothing, for tests of who does what when."""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.fleet.engines import Lost
from esd_lora.fleet.jobs import Job, Plan, Settings
from esd_lora.fleet.request import Request
from esd_lora.fleet.status import folder_of
from esd_lora.fleet.working import Outcome


def request(number: int, concept: str = "", **fields: object) -> Request:
    """Return a request of an object; `due` later with every number."""
    due = datetime.date(2026, 12, 1) + datetime.timedelta(days=number)
    return Request.model_validate(
        {"id": f"r{number}", "concept": concept or f"thing {number}", "kind": "object", "due": due} | fields
    )


def plan_of(requests: list[Request], **settings: object) -> Plan:
    """Return the plan of a fleet on the built-in base."""
    return Plan.of(requests, Settings(**{"base": "emoji", **settings}))  # type: ignore[arg-type]


class ScriptedEngine:
    """Works on jobs in this process, as a script says.

    Args:
        script: Id of a request to what comes of its job at each attempt; `done` where nothing is said.
        stop_after: Raise `KeyboardInterrupt` in the place of so many-th outcome.
    """

    def __init__(self, script: Mapping[str, list[str]] | None = None, stop_after: int | None = None):
        self.script = {name: list(ends) for name, ends in (script or {}).items()}
        self.stop_after = stop_after
        self.worked_on: list[str] = []

    def __call__(self, _plan: Plan, out: Path) -> ScriptedEngine:
        self.out = out
        return self

    def run(self, jobs: deque[Job], begun: Callable[[Job], None]) -> Iterator[Outcome | Lost]:
        while jobs:
            begun(job := jobs.popleft())
            self.worked_on.append(job.request.id)
            if len(self.worked_on) == self.stop_after:
                raise KeyboardInterrupt
            ends = self.script.get(job.request.id)
            end = ends.pop(0) if ends else "done"
            if end == "lost":
                yield Lost(job, "its worker was ended by SIGKILL")
                continue
            if end == "done":
                (folder_of(self.out, job.request.id) / WEIGHTS_NAME).write_bytes(b"")
            figures = {"left": 0.05, "kept": 0.99}
            yield Outcome(job, end, "" if end == "done" else f"it {end}", figures, recipe="fast", seconds=1.5)  # type: ignore[arg-type]


class StubWorker:
    """A worker that does what the concept of a request says; it runs in a process of its own."""

    def __init__(self, plan: Plan, _out: Path):
        if plan.settings.device == "nowhere":
            raise EsdLoraError("the base cannot be loaded: there is no such device.")
        if plan.settings.device == "dies":
            os._exit(3)

    def work(self, job: Job) -> Outcome:
        if job.request.concept == "a crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if job.request.concept == "an exit":
            os._exit(7)
        if job.request.concept == "for ever":
            time.sleep(600)
        return Outcome(job, "done", str(os.getpid()))
