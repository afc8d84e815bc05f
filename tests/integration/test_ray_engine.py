"""Workers on Ray: a cluster of two nodes on this machine, workers that are killed, and a node that is lost."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.fleet import ray_engine
from esd_lora.fleet.engines import Lost
from esd_lora.fleet.jobs import Job, Plan
from esd_lora.fleet.ray_engine import RayEngine
from esd_lora.fleet.running import read_events, run_fleet
from esd_lora.fleet.status import LOGS, STATUS_NAME, folder_of
from esd_lora.fleet.working import MEASURED, Outcome
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


def begun(_job: Job) -> None:
    """Take no notice of a job that begins."""


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_costs_its_own_job_alone(tmp_path: Path) -> None:
    engine = RayEngine(PLAN, tmp_path, workers=2, make_worker=StubWorker)
    outcomes = list(engine.run(jobs("a cat", "a crash", "a dog", "an exit", "a fox"), begun))
    lost = {outcome.job.request.concept for outcome in outcomes if isinstance(outcome, Lost)}
    assert lost == {"a crash", "an exit"}
    assert len(outcomes) == 5


@pytest.mark.usefixtures("cluster")
def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    engine = RayEngine(PLAN, tmp_path, timeout=0.5, make_worker=StubWorker)
    (outcome,) = engine.run(jobs("for ever"), begun)
    assert isinstance(outcome, Lost)
    assert outcome.reason == "it took longer than the time limit"


@pytest.mark.usefixtures("cluster")
def test_a_base_that_cannot_be_loaded_ends_the_fleet_in_a_sentence(tmp_path: Path) -> None:
    plan = PLAN._replace(settings=PLAN.settings._replace(device="nowhere"))
    with pytest.raises(EsdLoraError, match=r"no worker can begin: .*there is no such device"):
        list(RayEngine(plan, tmp_path, make_worker=StubWorker).run(jobs("a cat"), begun))


class WritingWorker(StubWorker):
    """Makes a file for an eraser, a picture of its evaluation, and a log, with who made them in it."""

    def __init__(self, plan: Plan, out: Path):
        super().__init__(plan, out)
        self.out = out

    def work(self, job: Job) -> Outcome:
        folder = folder_of(self.out, job.request.id)
        for file in (folder / WEIGHTS_NAME, folder / MEASURED / "0.png", self.out / LOGS / f"{job.request.id}.log"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(self.out))
        return super().work(job)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("shared", [True, False])
def test_results_come_back_from_nodes_that_do_not_see_the_folder(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker writes into the fleet's folder where its node sees the same one, else into its own, and Ray carries it over."""
    if not shared:
        monkeypatch.setattr(ray_engine, "_marked", lambda _: nullcontext("another machine's"))
    queue = jobs("a cat", "a dog")
    old = folder_of(tmp_path, queue[0].request.id)
    (old / MEASURED).mkdir(parents=True)
    for name in (STATUS_NAME, "recipe.yaml", f"{MEASURED}/1.png"):
        (old / name).touch()
    ids = [job.request.id for job in queue]
    outcomes = list(RayEngine(PLAN, tmp_path, make_worker=WritingWorker).run(queue, begun))
    assert [outcome.job.request.id for outcome in outcomes] == ids
    for name in ids:
        files = [folder_of(tmp_path, name) / WEIGHTS_NAME, folder_of(tmp_path, name) / MEASURED / "0.png"]
        makers = {file.read_text() for file in (*files, tmp_path / LOGS / f"{name}.log")}
        assert len(makers) == 1
        assert (makers == {str(tmp_path)}) == shared
    left = {str(path.relative_to(old)) for path in old.rglob("*") if path.is_file()}
    new = {STATUS_NAME, WEIGHTS_NAME, f"{MEASURED}/0.png"}
    assert left == (new | {"recipe.yaml", f"{MEASURED}/1.png"} if shared else new), "what an earlier attempt left is gone"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_node_that_is_lost_costs_its_jobs_one_attempt(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=2, object_store_memory=_STORE)
    listed = [request(number) for number in range(12)]
    plan = plan_of(listed, threads=1)

    class Losing(RayEngine):
        """Takes a node away once three jobs have ended."""

        def run(self, queue: deque[Job], begun: Any) -> Any:
            for number, outcome in enumerate(super().run(queue, begun)):
                if number == 3:
                    cluster.remove_node(node, allow_graceful=False)
                yield outcome

    statuses = run_fleet(
        listed, plan, tmp_path, lambda plan, out: Losing(plan, out, workers=6, make_worker=WritingWorker), progress=False
    )
    assert {status.state for status in statuses.values()} == {"done"}
    done = [event["id"] for event in read_events(tmp_path) if event["state"] == "done"]
    assert sorted(done) == sorted(request.id for request in listed)


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(EsdLoraError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        RayEngine(PLAN, tmp_path, address="127.0.0.1:1", make_worker=StubWorker)
