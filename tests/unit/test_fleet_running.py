"""The driver of a fleet: what is worked on, how often, and where it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.fleet.running import EVENTS_NAME, Choice, Shard, read_events, run_fleet
from esd_lora.fleet.status import STATUS_NAME, folder_of, read_status
from fleet_requests import ScriptedEngine, plan_of, request

LISTED = [request(number) for number in (3, 1, 2)]
PLAN = plan_of(LISTED)


def run(out: Path, engine: ScriptedEngine | None = None, **options: object) -> ScriptedEngine:
    """Run the fleet, and return the engine, which knows what it worked on."""
    engine = engine or ScriptedEngine()
    run_fleet(LISTED, PLAN, out, engine, progress=False, **options)  # type: ignore[arg-type]
    return engine


def states(out: Path) -> dict[str, str]:
    """Return the state of every request, by id."""
    return {request.id: status.state for request in LISTED if (status := read_status(out, request.id))}


def test_what_is_due_first_is_worked_on_first_and_nothing_twice(tmp_path: Path) -> None:
    assert run(tmp_path).worked_on == ["r1", "r2", "r3"]
    assert run(tmp_path).worked_on == []
    assert states(tmp_path) == dict.fromkeys(["r1", "r2", "r3"], "done")
    assert [event["id"] for event in read_events(tmp_path)] == ["r1", "r2", "r3"]


def test_a_lost_job_is_tried_again_after_the_others_and_given_up_in_the_end(tmp_path: Path) -> None:
    engine = run(tmp_path, ScriptedEngine({"r1": ["lost", "failed"], "r2": ["lost", "lost", "lost"]}))
    assert engine.worked_on == ["r1", "r2", "r3", "r1", "r2", "r1", "r2"]
    assert states(tmp_path) == {"r1": "done", "r2": "failed", "r3": "done"}
    failed = read_status(tmp_path, "r2")
    assert failed is not None
    assert (failed.attempts, failed.reason) == (3, "its worker was ended by SIGKILL")
    assert run(tmp_path).worked_on == []
    assert run(tmp_path, choice=Choice(retry_failed=True)).worked_on == ["r2"]
    done = read_status(tmp_path, "r2")
    assert done is not None
    assert (done.state, done.attempts, done.reason) == ("done", 1, "")


def test_what_is_refused_is_not_tried_again(tmp_path: Path) -> None:
    engine = run(tmp_path, ScriptedEngine({"r1": ["refused"]}))
    assert engine.worked_on == ["r1", "r2", "r3"]
    assert states(tmp_path)["r1"] == "refused"


def test_a_recipe_with_faults_is_refused_before_any_work(tmp_path: Path) -> None:
    bad = request(4, settings={"train.probe_every": 0})
    engine = ScriptedEngine()
    statuses = run_fleet([*LISTED, bad], PLAN, tmp_path, engine, progress=False)
    assert "r4" not in engine.worked_on
    assert statuses["r4"].state == "refused"
    assert "set train.probe_every" in statuses["r4"].reason


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_driver_that_is_stopped_goes_on_where_it_was(number: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ScriptedEngine(stop_after=number))
    assert states(tmp_path)[f"r{number}"] == "running"
    assert run(tmp_path).worked_on == [f"r{left}" for left in (1, 2, 3) if left >= number]
    assert sorted(event["id"] for event in read_events(tmp_path) if event["state"] == "done") == ["r1", "r2", "r3"]


def test_an_eraser_that_is_gone_is_made_anew(tmp_path: Path) -> None:
    run(tmp_path)
    (folder_of(tmp_path, "r2") / WEIGHTS_NAME).unlink()
    assert run(tmp_path).worked_on == ["r2"]


def test_other_settings_are_other_results(tmp_path: Path) -> None:
    run(tmp_path)
    engine = ScriptedEngine()
    run_fleet(LISTED, plan_of(LISTED, overrides={"train.seed": 1}), tmp_path, engine, progress=False)
    assert engine.worked_on == ["r1", "r2", "r3"]


def test_part_of_a_list(tmp_path: Path) -> None:
    assert run(tmp_path, choice=Choice(only=["r3"])).worked_on == ["r3"]
    assert run(tmp_path, choice=Choice(limit=1)).worked_on == ["r1"]
    shares = [run(tmp_path / "shards", choice=Choice(shard=Shard(number, 2))).worked_on for number in range(2)]
    assert sorted(name for share in shares for name in share) == ["r1", "r2", "r3"]
    assert sorted(page.name for page in (tmp_path / "shards").glob("*.html")) == ["fleet-0-of-2.html", "fleet-1-of-2.html"]
    with pytest.raises(EsdLoraError, match="no such request"):
        run(tmp_path, choice=Choice(only=["r9"]))


def test_requests_that_are_not_to_be_erased_are_left_alone(tmp_path: Path) -> None:
    listed = [
        request(1, status="withdrawn"),
        request(2, status="ambiguous"),
        request(3, status="refused"),
        request(4, status="done"),
    ]
    engine = ScriptedEngine()
    run_fleet(listed, plan_of(listed), tmp_path, engine, progress=False)
    assert engine.worked_on == ["r4"]  # done for a model that was released before: this one has to do it too


def test_a_damaged_status_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    file = folder_of(tmp_path, "r1") / STATUS_NAME
    file.write_text(file.read_text()[:20])
    with pytest.raises(EsdLoraError, match=r"r1/status\.json is damaged"):
        run(tmp_path)


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    run(tmp_path)
    with (tmp_path / EVENTS_NAME).open("a") as file:
        file.write('{"id": "r')
    assert len(list(read_events(tmp_path))) == 3


def test_the_page_tells_where_everything_stands_and_names_nobody_private(tmp_path: Path) -> None:
    listed = [
        request(1, "<script>cat", due="2020-01-01"),
        request(2, "Aloysius Quill", kind="person", private=True),
        request(3, "a fox"),
    ]
    run_fleet(listed, plan_of(listed), tmp_path, ScriptedEngine({"r2": ["refused"], "r1": ["refused"]}), progress=False)
    page = (tmp_path / "fleet.html").read_text()
    assert "1 of 3 requests done" in page
    assert "&lt;script&gt;cat" in page
    assert "<script>" not in page
    assert "Quill" not in page
    assert page.count('class="short late"') == 1
    assert "5.0% (5.0%)" in page
    assert json.loads((tmp_path / EVENTS_NAME).read_text().splitlines()[0])["state"] == "refused"
