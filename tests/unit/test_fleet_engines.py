"""Engines: what becomes of jobs whose workers end, hang or cannot begin."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import pytest

from esd_lora.errors import EsdLoraError
from esd_lora.fleet.engines import LocalEngine, Lost
from esd_lora.fleet.jobs import Job
from fleet_requests import StubWorker, plan_of, request

PLAN = plan_of([request(1)])


def quiet(job: Job) -> None:
    """Do nothing where a job begins."""
    assert job.key


def jobs(*concepts: str) -> deque[Job]:
    """Return a job for each concept."""
    return deque(Job(request(number, concept), "", "key") for number, concept in enumerate(concepts))


def test_jobs_are_shared_and_a_crash_costs_its_own_job_alone(tmp_path: Path) -> None:
    begun: list[str] = []
    engine = LocalEngine(PLAN, tmp_path, workers=2, make_worker=StubWorker)
    queue = jobs("a cat", "a crash", "a dog", "an exit", "a fox")
    outcomes = list(engine.run(queue, lambda job: begun.append(job.request.concept)))
    lost = {outcome.job.request.concept: outcome.reason for outcome in outcomes if isinstance(outcome, Lost)}
    assert begun == ["a cat", "a crash", "a dog", "an exit", "a fox"]
    assert lost == {
        "a crash": "its worker was ended by SIGKILL, as the system does when memory runs out",
        "an exit": "its worker ended with exit code 7",
    }
    assert len(outcomes) == 5


def test_a_job_that_is_put_back_is_worked_on(tmp_path: Path) -> None:
    queue = jobs("a cat")
    again = Job(request(9, "a dog"), "", "key")
    seen: list[str] = []
    for outcome in LocalEngine(PLAN, tmp_path, make_worker=StubWorker).run(queue, quiet):
        seen.append(outcome.job.request.concept)
        if len(seen) == 1:
            queue.append(again)
    assert seen == ["a cat", "a dog"]


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    engine = LocalEngine(PLAN, tmp_path, timeout=0.2, make_worker=StubWorker)
    (outcome,) = engine.run(jobs("for ever"), quiet)
    assert isinstance(outcome, Lost)
    assert outcome.reason == "it took longer than the time limit"


def test_a_base_that_cannot_be_loaded_ends_the_fleet_in_a_sentence(tmp_path: Path) -> None:
    plan = PLAN._replace(settings=PLAN.settings._replace(device="nowhere"))
    with pytest.raises(EsdLoraError, match="there is no such device"):
        list(LocalEngine(plan, tmp_path, make_worker=StubWorker).run(jobs("a cat"), quiet))


def test_workers_that_end_before_they_begin_end_the_fleet(tmp_path: Path) -> None:
    plan = PLAN._replace(settings=PLAN.settings._replace(device="dies"))
    with pytest.raises(EsdLoraError, match="no worker can begin: its worker ended with exit code 3"):
        list(LocalEngine(plan, tmp_path, make_worker=StubWorker).run(jobs("a cat"), quiet))


def test_workers_end_with_whoever_drives_them(tmp_path: Path) -> None:
    run = LocalEngine(PLAN, tmp_path, make_worker=StubWorker).run(jobs("a cat", "for ever"), quiet)
    process = int(next(run).reason)
    run.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
