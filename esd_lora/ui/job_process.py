"""The process behind a job: it waits for its turn, runs the command, and writes how that ended.

    python -m esd_lora.ui.job_process WORKPLACE

There is one for every job that waits, and each takes up the oldest, whichever it was started for.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from esd_lora.ui.jobs import LOCK_NAME, LOG_NAME, STOP_NAME, Job, Jobs, environment, locked, python


def run_next(jobs: Jobs) -> None:
    """Wait until no other job runs, and run the oldest that waits, if there still is one."""
    with locked(jobs.folder / LOCK_NAME, wait=True):
        for job in reversed(jobs.all()):
            if job.state == "waiting":
                with locked(jobs.folder / job.id / LOCK_NAME, wait=True):
                    if jobs.get(job.id).state == "waiting":  # nobody has stopped it meanwhile
                        run(jobs, job)
                        return


def run(jobs: Jobs, job: Job) -> None:
    """Run a job's command in the workplace, and write how it ended."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to the whole group: the command ends, and this one tells how
        signal.signal(number, lambda *_: None)
    folder = jobs.folder / job.id
    job = job.model_copy(update={"state": "running", "started": time.time(), "process": os.getpgrp()})
    jobs.write(job)
    with (folder / LOG_NAME).open("ab") as log:
        log.write(f"$ {job.command}\n".encode())
        log.flush()
        start = log.tell()
        surroundings = {**environment(), "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0.5"}
        program = [*python(), "-m", "esd_lora", *job.arguments]
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(program, cwd=jobs.workplace, env=surroundings, **streams)
        if (folder / STOP_NAME).exists():  # its signal may have come before the command was there
            process.send_signal(signal.SIGINT)
        code = process.wait()
    stopped = (folder / STOP_NAME).exists()
    state = "done" if code == 0 else "stopped" if stopped else "failed"
    with (folder / LOG_NAME).open("rb") as log:
        log.seek(start)
        sentence = "" if state != "failed" else last_error(log.read().decode("utf-8", "replace"))
    jobs.write(job.model_copy(update={"state": state, "sentence": sentence, "ended": time.time()}))


def last_error(log: str) -> str:
    """Return the sentence that a command ended with."""
    sentences = re.findall(r"^(?:error|Error): (.+)$", log, re.MULTILINE)
    return sentences[-1].strip() if sentences else "it broke off, by a fault of the program or killed; its log says more."


if __name__ == "__main__":
    run_next(Jobs(Path(sys.argv[1])))
