"""Jobs of the page: commands in processes of their own, one at a time, whose state outlives whoever started them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from esd_lora.erasers.eraser import CHECKPOINT_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.ui.job_panel import describe
from esd_lora.ui.job_process import last_error, run_next
from esd_lora.ui.jobs import JOB_NAME, LOCK_NAME, LOG_NAME, STOP_NAME, Job, Jobs, Progress, environment, locked, python

CHECK = ("recipes", "check", "fast")


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Jobs that nobody takes up by himself: a test runs them one by one."""
    monkeypatch.setattr(Jobs, "_begin", lambda _: None)
    return Jobs(tmp_path)


def run(jobs: Jobs) -> None:
    """Run the next job as its process would."""
    program = [*python(), "-m", "esd_lora.ui.job_process", str(jobs.workplace)]
    subprocess.run(program, check=True, env=environment(), start_new_session=True)


def until(condition: Callable[[], bool]) -> None:
    """Look again and again, without waiting longer than it takes."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 60, "it never came"


def test_jobs_run_in_their_order(jobs: Jobs) -> None:
    first = jobs.submit("erase", "Check a recipe", CHECK)
    second = jobs.submit("stack", "Check another", ("recipes", "check", "no-such-recipe"))
    assert (first.id, second.id) == ("0001", "0002")
    assert [job.id for job in jobs.all()] == ["0002", "0001"]
    assert [job.id for job in jobs.all("erase")] == ["0001"]
    run(jobs)
    assert (jobs.get("0001").state, jobs.get("0002").state) == ("done", "waiting")
    assert jobs.log("0001").startswith("$ esd-lora recipes check fast\n")
    run(jobs)
    failed = jobs.get("0002")
    assert failed.state == "failed"
    assert failed.sentence.startswith("no recipe 'no-such-recipe'")
    assert failed.over
    run(jobs)  # nothing waits: it ends


def test_a_job_begins_by_itself_and_another_server_sees_it(tmp_path: Path) -> None:
    job = Jobs(tmp_path).submit("erase", "Check a recipe", CHECK)
    until(lambda: Jobs(tmp_path).get(job.id).over)
    assert Jobs(tmp_path).get(job.id).state == "done"


def test_nothing_is_imported_from_the_workplace(jobs: Jobs) -> None:
    (jobs.workplace / "click.py").write_text("raise SystemExit('imported')")
    jobs.submit("erase", "Check a recipe", CHECK)
    run(jobs)
    assert jobs.get("0001").state == "done"


def test_a_job_that_waits_is_stopped_and_taken_up_again(jobs: Jobs) -> None:
    jobs.submit("erase", "Check a recipe", CHECK)
    jobs.stop("0001")
    assert jobs.get("0001").state == "stopped"
    run(jobs)
    assert jobs.get("0001").state == "stopped"
    jobs.resume("0001")
    with pytest.raises(EsdLoraError, match="job 0001 is waiting"):
        jobs.resume("0001")
    run(jobs)
    assert jobs.get("0001").state == "done"


def waiting_command(jobs: Jobs) -> tuple[str, ...]:
    """Return a command that does not end by itself: it reads a list that nobody writes."""
    os.mkfifo(jobs.workplace / "list.csv")
    return ("requests", "add", "list.csv")


def test_a_job_that_runs_is_stopped(jobs: Jobs) -> None:
    jobs.submit("erase", "Read a list", waiting_command(jobs))
    program = [*python(), "-m", "esd_lora.ui.job_process", str(jobs.workplace)]
    running = subprocess.Popen(program, env=environment(), start_new_session=True)
    until(lambda: jobs.get("0001").state == "running")
    jobs.stop("0001")
    assert running.wait(60) == 0
    assert jobs.get("0001").state == "stopped"
    assert jobs.get("0001").ended


def test_a_killed_job_has_failed(jobs: Jobs) -> None:
    job = jobs.submit("erase", "Erase a cat", ("train", "--concept=a cat", "--out=no-cat"), "no-cat")
    jobs.write(job.model_copy(update={"state": "running", "started": 1.0, "process": 2**22 + 1}))
    lost = jobs.get("0001")
    assert lost.state == "failed"
    assert "was killed" in lost.sentence
    with locked(jobs.folder / "0001" / LOCK_NAME, wait=False) as mine:
        assert mine
        assert jobs.get("0001").state == "running"  # somebody is at work on it
    jobs.resume("0001")
    assert jobs.get("0001").arguments[-1] == "--force"
    jobs.write(lost)
    (jobs.workplace / "no-cat").mkdir()
    (jobs.workplace / "no-cat" / CHECKPOINT_NAME).touch()
    jobs.resume("0001")
    assert jobs.get("0001").arguments == ("train", "--concept=a cat", "--out=no-cat", "--resume")


def test_a_stop_that_comes_before_the_command_is_not_lost(jobs: Jobs) -> None:
    jobs.submit("erase", "Read a list", waiting_command(jobs))
    (jobs.folder / "0001" / STOP_NAME).touch()
    run(jobs)
    assert jobs.get("0001").state == "stopped"


def test_unknown_jobs_are_told(jobs: Jobs) -> None:
    for name in ("0007", "../0001"):
        with pytest.raises(EsdLoraError, match="there is no job"):
            jobs.get(name)
    (jobs.folder / "0001").mkdir(parents=True)  # made, and not written yet
    assert jobs.all() == []
    run_next(jobs)


def test_bars_are_read(jobs: Jobs) -> None:
    job = jobs.submit("erase", "Erase a cat", CHECK)
    log = jobs.folder / job.id / LOG_NAME
    assert jobs.progress(job.id) is None
    assert jobs.log(job.id) == ""
    log.write_text("base emoji: on cpu\n")
    assert jobs.progress(job.id) is None
    bars = [
        "erasing a cat:   0%|          | 0/450 [00:00<?, ?step/s]",
        "erasing a cat:  45%|###| 203/450 [01:10<02:05, 2.1step/s]",
    ]
    log.write_text("base emoji: on cpu\n" + "\r".join(bars))
    assert jobs.progress(job.id) == Progress("erasing a cat", 0.45, "02:05")
    assert jobs.log(job.id) == f"base emoji: on cpu\n{bars[1]}"
    log.write_text(" 12%|##   | 3/25 [00:01<?, ?batch/s]")
    assert jobs.progress(job.id) == Progress("", 0.12, "?")


def test_states_in_words() -> None:
    job = Job(id="0001", tab="erase", title="Erase <b>", arguments=("train",), created=0, started=0, ended=75, state="failed")
    text = describe(job.model_copy(update={"sentence": "nothing to <erase>."}))
    assert "<b>Erase &lt;b&gt;:</b> Failed after 1:15 minutes. Nothing to &lt;erase&gt;." in text
    running = describe(job.model_copy(update={"state": "running", "ended": None}), Progress("erasing", 0.45, "02:05"))
    assert 'role="progressbar"' in running
    assert "erasing: 45%, 02:05 left" in running
    assert "left" not in describe(job.model_copy(update={"state": "running"}), Progress("erasing", 0.45, "?"))
    assert "solved: &lt;all&gt;" in describe(job.model_copy(update={"state": "running"}), None, "solved: <all>")
    assert "Nothing was started" in describe(None)


def test_the_last_sentence_of_a_log() -> None:
    assert last_error("error: a.\nerror: output no-cat exists.\n  more") == "output no-cat exists."
    assert last_error("Usage: esd-lora\n\nError: No such option: --x\n") == "No such option: --x"
    assert "by a fault of the program" in last_error("Traceback ...\nValueError: x")


def test_a_damaged_record_is_no_job(jobs: Jobs) -> None:
    jobs.submit("erase", "Erase a cat", CHECK)
    (jobs.folder / "0001" / JOB_NAME).write_text(json.dumps({"id": "0001"}))
    assert jobs.all() == []
