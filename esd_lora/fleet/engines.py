"""Engines: who works on the jobs of a fleet. One interface, whatever the workers are.

An engine takes jobs from the left of a queue as its workers become free and yields what came of them, in the order in which
they end; jobs may be put into the queue meanwhile. A worker that is killed, runs out of memory or takes too long costs its own
job alone, which comes back as `lost`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, Protocol

from tqdm.auto import tqdm

from esd_lora.errors import EsdLoraError
from esd_lora.fleet.jobs import Job, Plan
from esd_lora.fleet.working import Outcome, Worker

_PATIENCE = 5.0  # seconds
EARLY_ENDS = 3
"""How often workers may end before the first of them has loaded the base."""


class Works(Protocol):
    """Works on one job after the other: `Worker`."""

    def work(self, job: Job) -> Outcome:
        """Return what came of a job."""
        ...


MakeWorker = Callable[[Plan, Path], Works]
"""From the plan and the fleet's folder to what works there, in a process of its own."""


class Lost(NamedTuple):
    """A job whose worker ended without an outcome."""

    job: Job
    reason: str


class Engine(Protocol):
    """Works on jobs."""

    def run(self, jobs: deque[Job], begun: Callable[[Job], None]) -> Iterator[Outcome | Lost]:
        """Yield what came of each job, until the queue is empty and no worker is busy.

        Args:
            jobs: Taken from the left; whoever iterates may add to it.
            begun: Called with a job before a worker gets it.

        Raises:
            EsdLoraError: If workers cannot begin, because of the base for example.
        """
        ...


class LocalEngine:
    """Processes on this machine.

    Args:
        plan: What all jobs have in common.
        out: The fleet's folder.
        workers: Number of processes, each with a base of its own in memory.
        timeout: Seconds after which a worker is ended, its job lost; none unless given.
        make_worker: Makes what works on jobs, in its process.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        *,
        workers: int = 1,
        timeout: float | None = None,
        make_worker: MakeWorker = Worker,
    ):
        self.workers, self.timeout = workers, timeout
        self._begin = partial(_Process, make_worker, plan, out)

    def run(self, jobs: deque[Job], begun: Callable[[Job], None]) -> Iterator[Outcome | Lost]:
        """Work as `Engine.run` says."""
        workers: list[_Process] = []
        early_ends, able = 0, False
        try:
            while jobs or any(worker.job for worker in workers):
                busy = sum(worker.job is not None for worker in workers)
                while len(workers) < min(self.workers, busy + len(jobs)):
                    workers.append(self._begin())
                for worker in workers:
                    if worker.ready and worker.job is None and jobs:
                        begun(job := jobs.popleft())
                        worker.give(job, self.timeout)
                for worker in _awaited(workers):
                    message = worker.receive()
                    if isinstance(message, Outcome):
                        worker.job = None
                        yield message
                    elif message is None:
                        worker.ready = able = True
                    else:
                        workers.remove(worker)
                        if worker.job is not None:
                            yield Lost(worker.job, message.reason)
                        elif not able and (early_ends := early_ends + 1) == EARLY_ENDS:
                            raise EsdLoraError(f"no worker can begin: {message.reason}")
        finally:
            for worker in workers:
                worker.end()


class _Ended(NamedTuple):
    """A worker is no more."""

    reason: str


class _Process:
    """A worker's process, and what it works on.

    Each has a pipe of its own: what a process holds when it is killed is nobody else's.
    """

    def __init__(self, make_worker: MakeWorker, plan: Plan, out: Path):
        context = get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make_worker, plan, out), daemon=True)
        self.process.start()
        other.close()
        self.ready = False
        """Whether it has loaded the base."""
        self.job: Job | None = None
        self.deadline: float | None = None

    @property
    def is_late(self) -> bool:
        """Whether its job takes longer than it may."""
        return self.job is not None and self.deadline is not None and self.deadline <= time.monotonic()

    def give(self, job: Job, timeout: float | None) -> None:
        """Hand it a job."""
        self.job, self.deadline = job, time.monotonic() + timeout if timeout else None
        with suppress(OSError):  # if it has ended, `receive` says so
            self.connection.send(job)

    def receive(self) -> Outcome | _Ended | None:
        """Return what it has to say: an outcome, its end, or nothing but that it is ready.

        Raises:
            EsdLoraError: If it cannot load the base: no other could.
        """
        with suppress(EOFError, OSError):
            if self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, str):
                    raise EsdLoraError(message)
                return message
        late = self.process.is_alive() and self.deadline is not None
        self.kill()
        return _Ended("it took longer than the time limit" if late else _cause_of(self.process.exitcode))

    def end(self) -> None:
        """Let it end by itself if it has nothing to do, and end it otherwise."""
        if self.ready and self.job is None:
            self.connection.close()
            self.process.join(_PATIENCE)
        self.kill()

    def kill(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _awaited(workers: Sequence[_Process]) -> list[_Process]:
    """Wait, and return the workers that have something to say, have ended, or are out of time."""
    now = time.monotonic()
    left = [worker.deadline - now for worker in workers if worker.job and worker.deadline]
    waited = [place for worker in workers for place in (worker.connection, worker.process.sentinel)]
    heard = wait(waited, max(0.0, min(left)) if left else None)
    return [worker for worker in workers if worker.connection in heard or worker.process.sentinel in heard or worker.is_late]


def _cause_of(exitcode: int | None) -> str:
    """Return how a process ended, in words."""
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"its worker was ended by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")
    return f"its worker ended with exit code {exitcode}"


def _serve(connection: Connection, make_worker: MakeWorker, plan: Plan, out: Path) -> None:
    """Work in a process of its own until the driver ends it, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    tqdm.set_lock(threading.RLock())  # the lock among processes, which nobody needs here, is left behind by one that is killed
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        worker = make_worker(plan, out)
    except EsdLoraError as error:
        connection.send(str(error))
        return
    connection.send(None)
    with suppress(EOFError):
        while True:
            connection.send(worker.work(connection.recv()))


def _end_with_driver() -> None:
    """Wait for the driver's end, and end with it: nobody else may work on the same request then."""
    driver = parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)
