"""Workers on a Ray cluster: actors that load the base once, on as many machines as there are.

Ray Core places them, a fraction of a GPU each if asked for, notices what dies, and brings results back as they end. Every node
needs this package, and the base under the same name. Where a node sees the fleet's folder, its workers write there; elsewhere
they work in a folder of their own, and Ray carries what they made to the driver. Workers of one node read a base from the same
pages of memory where its files hold the dtype that is used; on a card each has its own.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import uuid4

from esd_lora.errors import EsdLoraError, how_to_install, shortened
from esd_lora.fleet.engines import EARLY_ENDS, Lost, MakeWorker
from esd_lora.fleet.jobs import Job, Plan
from esd_lora.fleet.parcels import pack, unpack
from esd_lora.fleet.working import Outcome, Worker

_PATIENCE = 10.0  # seconds
_STORE = 2**28  # bytes of a local cluster's object store: what lies there is the plan


class _Task(NamedTuple):
    """What an actor is at: a job, or getting ready."""

    actor: Any
    job: Job | None
    deadline: float | None


class _NodeWorker:
    """A worker on a node of the cluster.

    Args:
        make_worker: Makes what works on jobs.
        plan: What all jobs have in common.
        out: The fleet's folder, as the driver sees it.
        mark: Name of a file there; a node that has it sees the same folder.
    """

    def __init__(self, make_worker: MakeWorker, plan: Plan, out: Path, mark: str):
        self._own = None if (out / mark).is_file() else TemporaryDirectory(prefix="esd-lora-")
        self._worker = make_worker(plan, Path(self._own.name) if self._own else out)

    def work(self, job: Job) -> tuple[Outcome, bytes]:
        """Return what came of a job, and what the driver does not see of it."""
        outcome = self._worker.work(job)
        return outcome, pack(Path(self._own.name)) if self._own else b""


class RayEngine:
    """Actors on a Ray cluster.

    Args:
        plan: What all jobs have in common.
        out: The fleet's folder.
        workers: Number of actors; those that the cluster has no room for wait.
        timeout: Seconds after which a worker is ended, its job lost; none unless given.
        address: Of the cluster, `auto` for the one that runs here; a local one is begun unless given.
        gpus: GPUs of a worker; 0.5 puts two on one.
        make_worker: Makes what works on jobs, on a node.

    Raises:
        EsdLoraError: If Ray is not installed, or there is no such cluster.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        *,
        workers: int = 1,
        timeout: float | None = None,
        address: str | None = None,
        gpus: float = 0.0,
        make_worker: MakeWorker = Worker,
    ):
        try:
            import ray
        except ImportError as error:
            raise EsdLoraError(f"--engine ray needs Ray, which is not installed: {how_to_install('ray')}.") from error
        self.out, self.workers, self.timeout, self._make_worker = out.resolve(), workers, timeout, make_worker
        self._ray: Any = ray
        if not ray.is_initialized():
            _connect(ray, address)
        self._class: Any = ray.remote(num_cpus=plan.settings.threads or 1, num_gpus=gpus)(_NodeWorker)
        self._plan = ray.put(plan)

    def run(self, jobs: deque[Job], begun: Callable[[Job], None]) -> Iterator[Outcome | Lost]:
        """Work as `Engine.run` says."""
        with _marked(self.out) as mark:
            yield from self._run(jobs, begun, mark)

    def _run(self, jobs: deque[Job], begun: Callable[[Job], None], mark: str) -> Iterator[Outcome | Lost]:
        ray = self._ray
        tasks: dict[Any, _Task] = {}
        idle: list[Any] = []
        early_ends, able = 0, False
        try:
            while jobs or any(task.job for task in tasks.values()):
                while len(tasks) + len(idle) < min(
                    self.workers, len(jobs) + sum(task.job is not None for task in tasks.values())
                ):
                    actor = self._class.remote(self._make_worker, self._plan, self.out, mark)
                    tasks[actor.__ray_ready__.remote()] = _Task(actor, None, None)
                while idle and jobs:
                    begun(job := jobs.popleft())
                    actor = idle.pop()
                    tasks[actor.work.remote(job)] = _Task(actor, job, time.monotonic() + self.timeout if self.timeout else None)
                for reference in self._awaited(tasks):
                    actor, job, _ = tasks.pop(reference)
                    try:
                        result = ray.get(reference, timeout=0)
                    except ray.exceptions.RayError as error:
                        late = isinstance(error, ray.exceptions.GetTimeoutError)
                        ray.kill(actor)
                        reason = "it took longer than the time limit" if late else f"its worker was lost: {_cause_of(error)}"
                        if job is not None:
                            yield Lost(job, reason)
                        elif not able and (early_ends := early_ends + 1) == EARLY_ENDS:
                            raise EsdLoraError(f"no worker can begin: {_cause_of(error)}") from error
                        continue
                    idle.append(actor)
                    able = True
                    if job is not None:
                        outcome, content = result
                        if content:
                            unpack(content, self.out, job.request.id)
                        yield outcome
        finally:
            for actor in [*idle, *(task.actor for task in tasks.values())]:
                ray.kill(actor)

    def _awaited(self, tasks: dict[Any, _Task]) -> list[Any]:
        """Wait, and return the references of what has ended or is out of time."""
        deadlines = [task.deadline for task in tasks.values() if task.deadline is not None]
        left = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ended, _ = self._ray.wait(list(tasks), num_returns=1, timeout=left)
        now = time.monotonic()
        late = [reference for reference, task in tasks.items() if task.deadline is not None and task.deadline <= now]
        return ended or late


@contextmanager
def _marked(out: Path) -> Generator[str]:
    """Yield the name of a file that stands in a folder for the length of a `with` block."""
    mark = out / f".{uuid4().hex}"
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield mark.name
    finally:
        mark.unlink(missing_ok=True)


def _connect(ray: Any, address: str | None) -> None:
    """Join a cluster, or begin a local one.

    Raises:
        EsdLoraError: If there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        host, colon, port = (address or "").rpartition(":")
        if colon and port.isdecimal() and "/" not in host:
            socket.create_connection((host, int(port)), _PATIENCE).close()  # Ray itself asks for minutes
        own = {"include_dashboard": False, "object_store_memory": _STORE} if address is None else {}
        ray.init(address=address, log_to_driver=False, **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise EsdLoraError(f"no Ray cluster at {address!r}: {shortened(str(error))}. Check --address.") from error


def _cause_of(error: Exception) -> str:
    """Return the last line of what Ray says, which is the exception of a worker."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return shortened(lines[-1] if lines else type(error).__name__)
