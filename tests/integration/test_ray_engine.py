"""Workers on Ray: a cluster of two nodes on this machine, workers that are killed, and a node that is lost."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.fleet.engines import Lost
from esd_lora.fleet.jobs import Job
from esd_lora.fleet.ray_engine import RayEngine
from esd_lora.fleet.running import read_events, run_fleet
from esd_lora.fleet.status import folder_of
from fleet_requests import StubWorker, plan_of, request

ray = pytest.importorskip("ray", reason="Ray has no wheel for this Python")

pytestmark = [
    pytest.mark.slow,
    # Ray starts processes of its own and leaves their ends to them.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]
_STORE = 100 * 2**20  # bytes, and a plan is all that lies there
PLAN = plan_of([request(1)], threads=1)


@pytest.fixture(scope="module")
def cluster() -> Generator[Any]:
    """A cluster of two nodes, each with room for two workers."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))  # workers find the stub where this process does
    node = {"num_cpus": 2, "object_store_memory": _STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    patch.undo()


def jobs(*concepts: str) -> deque[Job]:
    """Return a job for each concept."""
    return deque(Job(request(number, concept), "", "key") for number, concept in enumerate(concepts))


def begin(out: Path) -> Any:
    """Return what to call where a job begins: it makes the eraser that the stub does not."""

    def begun(job: Job) -> None:
        folder = folder_of(out, job.request.id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS_NAME).touch()

    return begun


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_costs_its_own_job_alone(tmp_path: Path) -> None:
    engine = RayEngine(PLAN, tmp_path, workers=2, make_worker=StubWorker)
    outcomes = list(engine.run(jobs("a cat", "a crash", "a dog", "an exit", "a fox"), begin(tmp_path)))
    lost = {outcome.job.request.concept for outcome in outcomes if isinstance(outcome, Lost)}
    assert lost == {"a crash", "an exit"}
    assert len(outcomes) == 5


@pytest.mark.usefixtures("cluster")
def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    engine = RayEngine(PLAN, tmp_path, timeout=0.5, make_worker=StubWorker)
    (outcome,) = engine.run(jobs("for ever"), begin(tmp_path))
    assert isinstance(outcome, Lost)
    assert outcome.reason == "it took longer than the time limit"


@pytest.mark.usefixtures("cluster")
def test_a_base_that_cannot_be_loaded_ends_the_fleet_in_a_sentence(tmp_path: Path) -> None:
    plan = PLAN._replace(settings=PLAN.settings._replace(device="nowhere"))
    with pytest.raises(EsdLoraError, match=r"no worker can begin: .*there is no such device"):
        list(RayEngine(plan, tmp_path, make_worker=StubWorker).run(jobs("a cat"), begin(tmp_path)))


@pytest.mark.usefixtures("cluster")
def test_results_that_are_not_seen_are_named(tmp_path: Path) -> None:
    engine = RayEngine(PLAN, tmp_path, make_worker=StubWorker)
    with pytest.raises(EsdLoraError, match="storage that all nodes share"):
        list(engine.run(jobs("a cat"), print))


def test_a_node_that_is_lost_costs_its_jobs_one_attempt(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=2, object_store_memory=_STORE)
    listed = [request(number) for number in range(12)]
    plan = plan_of(listed, threads=1)

    class Losing(RayEngine):
        """Takes a node away once three jobs have ended."""

        def run(self, queue: deque[Job], begun: Any) -> Any:
            make = begin(tmp_path)

            def both(job: Job) -> None:
                begun(job)
                make(job)

            for number, outcome in enumerate(super().run(queue, both)):
                if number == 3:
                    cluster.remove_node(node, allow_graceful=False)
                yield outcome

    statuses = run_fleet(
        listed, plan, tmp_path, lambda plan, out: Losing(plan, out, workers=6, make_worker=StubWorker), progress=False
    )
    assert {status.state for status in statuses.values()} == {"done"}
    done = [event["id"] for event in read_events(tmp_path) if event["state"] == "done"]
    assert sorted(done) == sorted(request.id for request in listed)


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(EsdLoraError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        RayEngine(PLAN, tmp_path, address="127.0.0.1:1", make_worker=StubWorker)
