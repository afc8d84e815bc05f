"""Long work of the page: commands of the command line, one at a time, each with its state and its log in a folder of its own.

A job outlives the page and the server. A process of its own (`job_process`) waits for its turn, runs the command and writes
how it ended; pages and servers only read that. Whoever holds a job's lock is at work on it, and the system lets go of a lock
however a process ends: so what was killed is seen.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from esd_lora.errors import EsdLoraError
from esd_lora.files import reporting_write_errors, write_atomically

FOLDER = ".esd-lora-jobs"
"""Folder of all jobs, in the workplace."""
JOB_NAME, LOG_NAME, LOCK_NAME, STOP_NAME = "job.json", "log.txt", "lock", "stop"
"""Files of a job's folder. The last is there once somebody has asked for it to stop."""
ERRORS_NAME = "errors.txt"
"""What the processes behind jobs print themselves, beside the folders of jobs: nothing, unless they are broken."""
State = Literal["waiting", "running", "done", "failed", "stopped"]
_TAIL = 2**16  # bytes at a log's end in which its last lines and bars are looked for
_BAR = re.compile(r"(?:(?P<what>[^\r\n|]*?):)?\s*(?P<percent>\d{1,3})%\|[^|]*\|[^\[]*\[[^<\]]*<(?P<left>[^,\]]*)")


class Job(BaseModel):
    """One command, and how far it is."""

    model_config = ConfigDict(frozen=True)

    id: str
    """`0001` and so on, in the order in which jobs are taken up."""
    tab: str
    """Name of the tab that it was started from: `erase`, `stack`, `measure`."""
    title: str
    """What it does, in a few words: `Erase a cat`."""
    arguments: tuple[str, ...]
    """What stands behind `esd-lora` on the command line."""
    out: str | None = None
    """What it makes, relative to the workplace."""
    state: State = "waiting"
    sentence: str = ""
    """Why it failed, in one sentence."""
    created: float
    started: float | None = None
    ended: float | None = None
    process: int | None = None
    """Id of the process group at work on it."""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it by itself."""
        return self.state not in ("waiting", "running")

    @property
    def command(self) -> str:
        """The command as one would type it."""
        return shlex.join(("esd-lora", *self.arguments))


class Progress(NamedTuple):
    """What the last bar in a log shows."""

    what: str
    share: float
    """0 to 1."""
    left: str
    """Time left, as `minutes:seconds`; `?` where it is not known."""


class Jobs:
    """The jobs of a workplace.

    Args:
        workplace: Folder in which the commands run.
    """

    def __init__(self, workplace: Path):
        self.workplace, self.folder = workplace, workplace / FOLDER

    def submit(self, tab: str, title: str, arguments: Sequence[str], out: str | None = None) -> Job:
        """Queue a command, and return its job.

        Args:
            tab: Name of the tab that starts it.
            title: What it does, in a few words.
            arguments: What stands behind `esd-lora` on the command line; paths are relative to the workplace.
            out: What it makes, relative to the workplace.

        Raises:
            EsdLoraError: If the system has no locks to queue by, or nothing can be written into the workplace.
        """
        if sys.platform == "win32":
            command = shlex.join(("esd-lora", *arguments))
            raise EsdLoraError(f"jobs of the page need Linux or macOS. Run {command} in a terminal, or the page in WSL.")
        with reporting_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            number = max((int(path.name) for path in self.folder.glob("[0-9]*")), default=0)
            while True:
                number += 1
                with suppress(FileExistsError):
                    (self.folder / f"{number:04d}").mkdir()
                    break
        job = Job(id=f"{number:04d}", tab=tab, title=title, arguments=tuple(arguments), out=out, created=time.time())
        self.write(job)
        self._begin()
        return job

    def all(self, tab: str | None = None) -> list[Job]:
        """Return the jobs of a tab, or of all tabs, the newest first."""
        names = sorted((path.name for path in self.folder.glob("[0-9]*")), reverse=True)
        jobs = [job for name in names if (job := self._read(name))]
        return [job for job in jobs if tab in (None, job.tab)]

    def get(self, job: str) -> Job:
        """Return a job by its id.

        Raises:
            EsdLoraError: If there is no such job.
        """
        known = self._read(job) if job.isdecimal() else None
        if known is None:
            raise EsdLoraError(f"there is no job {job!r} in {self.folder}. Reload the page.")
        return known

    def stop(self, job: str) -> None:
        """Ask a job to stop: a training ends after the step in hand, with a checkpoint; asked again, it ends at once.

        Raises:
            EsdLoraError: If there is no such job.
        """
        folder, again = self.folder / job, (self.folder / job / STOP_NAME).exists()
        self.get(job)
        with reporting_write_errors(folder):
            (folder / STOP_NAME).touch()
        with locked(folder / LOCK_NAME, wait=False) as mine:
            current = self.get(job)
            if mine and current.state == "waiting":
                self.write(current.model_copy(update={"state": "stopped", "ended": time.time()}))
            elif not mine and current.process:
                with suppress(ProcessLookupError):
                    os.killpg(current.process, signal.SIGTERM if again else signal.SIGINT)

    def resume(self, job: str) -> None:
        """Queue a job anew that was stopped or failed: a training goes on from its checkpoint, others as their commands do.

        Raises:
            EsdLoraError: If there is no such job, or it is not over.
        """
        folder, current = self.folder / job, self.get(job)
        if not current.over:
            raise EsdLoraError(f"job {job} is {current.state}. Wait until it is over, or stop it.")
        (folder / STOP_NAME).unlink(missing_ok=True)
        arguments = [argument for argument in current.arguments if argument not in ("--resume", "--force")]
        if current.out and arguments[0] == "train":  # what is there is its own
            from esd_lora.erasers.eraser import CHECKPOINT_NAME

            checkpoint = self.workplace / current.out / CHECKPOINT_NAME
            arguments.append("--resume" if checkpoint.is_file() else "--force")
        changes = {"state": "waiting", "sentence": "", "started": None, "ended": None, "arguments": tuple(arguments)}
        self.write(current.model_copy(update=changes))
        self._begin()

    def take_up(self) -> None:
        """Have what waits since before a restart of the machine wait for its turn again."""
        for job in self.all():
            if job.state == "waiting":
                self._begin()

    def log(self, job: str, lines: int = 30) -> str:
        """Return the last lines of a job's log, of each bar how it stands last."""
        shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in self._tail(job).split("\n")]
        return "\n".join([line for line in shown if line][-lines:])

    def progress(self, job: str) -> Progress | None:
        """Return what the last bar in a job's log shows, if there is one."""
        bars = list(_BAR.finditer(self._tail(job)))
        if not bars:
            return None
        return Progress((bars[-1]["what"] or "").strip(), int(bars[-1]["percent"]) / 100, bars[-1]["left"].strip())

    def write(self, job: Job) -> None:
        """Write a job's state."""
        write_atomically(self.folder / job.id / JOB_NAME, job.model_dump_json(indent=1).encode())

    def _read(self, name: str) -> Job | None:
        """Return a job as it stands; `None` where its folder holds none yet. One whose process was killed has failed."""
        file = self.folder / name / JOB_NAME
        try:
            job = Job.model_validate_json(file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        if job.state != "running":
            return job
        with locked(file.with_name(LOCK_NAME), wait=False) as gone:
            if not gone:
                return job
            job = Job.model_validate_json(file.read_bytes())  # it may have ended between the two
        lost = {"state": "failed", "sentence": "its process was killed, or the machine restarted. Go on with Resume."}
        return job.model_copy(update=lost) if job.state == "running" else job

    def _tail(self, job: str) -> str:
        """Return the end of a job's log."""
        try:
            with (self.folder / job / LOG_NAME).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                return file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def _begin(self) -> None:
        """Start a process that waits for its turn and takes up the oldest job that waits."""
        _children[:] = [child for child in _children if child.poll() is None]
        program = [*python(), "-m", "esd_lora.ui.job_process", str(self.workplace)]
        with (self.folder / ERRORS_NAME).open("ab") as errors:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": errors, "stderr": errors}
            _children.append(subprocess.Popen(program, env=environment(), start_new_session=True, **streams))


_children: list[subprocess.Popen[Any]] = []
"""Processes that this one has started: asked now and then whether they ended, so that none is left as a zombie."""


def python() -> list[str]:
    """Return how Python is started so that nothing is imported from the folder it runs in."""
    return [sys.executable, "-P"]


def environment() -> dict[str, str]:
    """Return the environment in which this very package is imported, from wherever it was here."""
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


@contextmanager
def locked(file: Path, *, wait: bool) -> Generator[bool]:
    """Hold a lock file for the length of a `with` block.

    Args:
        file: Made when missing; the lock ends with the process, however that ends.
        wait: Whether to wait for whoever holds it.

    Yields:
        Whether it is held here.
    """
    import fcntl

    with file.open("ab") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
