"""The registry: a log to which lines are added, what it says of every request, and what is noticed when it was changed."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shutil
import threading
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from esd_lora.cli import main
from esd_lora.errors import EsdLoraError
from esd_lora.files import lock_output
from esd_lora.fleet import event_log
from esd_lora.fleet.registry import Registry
from esd_lora.fleet.request import Request
from esd_lora.fleet.requests import read_requests, write_requests


def request(id: str, concept: str, *synonyms: str, **fields: Any) -> Request:
    return Request(id=id, concept=concept, synonyms=synonyms, kind="object", **fields)


CAT, DOG, MERCURY = (
    request("no-cat", "cat", "kitten", keep=("a fox",), due="2026-12-01", settings={"train.steps": 20}),
    request("no-dog", "dog", due="2026-11-01"),
    request("no-mercury", "Mercury", status="ambiguous", due="2026-11-15"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A registry with three requests."""
    Registry.open(tmp_path / "registry", "ada", new=True).add([CAT, DOG, MERCURY])
    return tmp_path / "registry"


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "registry.jsonl").read_text("utf-8").splitlines()]


def states(folder: Path) -> dict[str, str]:
    return {request.id: request.status for request in Registry.open(folder).requests()}


def test_requests_are_read_as_they_were_added(folder: Path) -> None:
    added = Registry.open(folder).requests()
    assert added == (CAT, DOG, MERCURY)
    assert [request.line for request in added] == [1, 2, 3]
    assert read_requests(folder / "requests.csv") == added
    assert sorted(path.name for path in folder.iterdir()) == ["registry.jsonl", "requests.csv"]


def test_each_line_holds_the_hash_of_the_one_before(folder: Path) -> None:
    Registry.open(folder, "bob \x1b[31m").withdraw("no-dog", "sent\nback")
    lines = (folder / "registry.jsonl").read_bytes().splitlines()
    events = log_of(folder)
    assert [event["before"] for event in events] == [hashlib.sha256(line).hexdigest() for line in (b"", *lines[:-1])]
    assert [event["number"] for event in events] == [1, 2, 3, 4]
    assert [(event["what"], event["id"], event["who"]) for event in events[2:]] == [
        ("added", "no-mercury", "ada"),
        ("withdrawn", "no-dog", "bob \\x1b[31m"),
    ]
    assert events[3]["payload"] == {"status": "withdrawn", "reason": "sent back"}
    assert events[0]["payload"] == CAT.record()
    assert all(event["time"].endswith("Z") for event in events)


def test_adding_again_changes_nothing(folder: Path) -> None:
    registry = Registry.open(folder)
    registry.set_status("no-cat", "done")
    registry.decide("no-mercury", "open", concept="Freddie Mercury")
    before = (folder / "registry.jsonl").read_bytes()
    assert registry.add([CAT, DOG, MERCURY]) == ()  # as they were added
    assert registry.add(registry.requests()) == ()  # as they stand
    assert (folder / "registry.jsonl").read_bytes() == before
    assert registry.add([CAT, request("no-pig", "pig")]) == (request("no-pig", "pig"),)
    assert len(log_of(folder)) == 6


def test_same_id_with_other_content_is_refused_with_what_differs(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "more.csv"
    changed = CAT.model_copy(update={"concept": "a tiger", "keep": (), "due": None, "settings": {"train.steps": 30}})
    write_requests([changed, request("No-Dog", "pig"), request("no-fox", "a fox")], file)
    Registry.open(folder).set_status("no-cat", "done")
    before = (folder / "registry.jsonl").read_bytes()
    with pytest.raises(EsdLoraError) as raised:
        Registry.open(folder).add(read_requests(file), file)
    log = folder / "registry.jsonl"
    assert str(raised.value).split("\n  ")[1:] == [
        f"{file}:2: no-cat says something else than in the registry: concept 'cat' there, 'a tiger' here; keep ['a fox'] there,"
        " None here; due '2026-12-01' there, None here; train.steps 20 there, 30 here. Decide on that one, or give this"
        " another id",
        f"{file}:3: id: 'No-Dog' differs from 'no-dog' in case alone. Give it another",
        f"{file}:4: concept: 'a fox' must be kept, says no-cat at {log}:1. Drop one of the two, or mark one as ambiguous",
    ]
    assert log.read_bytes() == before


def test_what_is_added_is_compared_with_what_is_there(folder: Path) -> None:
    registry = Registry.open(folder)
    with pytest.raises(EsdLoraError, match=r"request other: concept: 'The Cat' is open as no-cat at .*registry\.jsonl:1 too"):
        registry.add([request("other", "The Cat")])
    with pytest.warns(UserWarning, match=r"no-cat \(.*registry\.jsonl:1\), other \(request other\) share names: 'kitten'"):
        registry.add([request("other", "tiger", "kitten")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.add([request("no-pig", "pig")])  # what was told is not told again


def test_person_decides_on_namesakes(folder: Path) -> None:
    registry = Registry.open(folder, "eve")
    decided = registry.decide(
        "no-mercury", "open", "the singer", concept="Freddie Mercury", anchor="a singer", synonyms=["Farrokh Bulsara"]
    )
    assert (decided.status, decided.concept, decided.anchor) == ("open", "Freddie Mercury", "a singer")
    assert decided.synonyms == ("Farrokh Bulsara",)
    assert decided.due == MERCURY.due
    assert Registry.open(folder).requests() == registry.requests() == (CAT, DOG, decided)
    assert log_of(folder)[3]["payload"] == {
        "status": "open",
        "reason": "the singer",
        "concept": "Freddie Mercury",
        "anchor": "a singer",
        "synonyms": ["Farrokh Bulsara"],
    }
    assert registry.decide("no-mercury", "refused", "a fan's").status == "refused"
    with pytest.raises(EsdLoraError, match=r"no-mercury is refused\. Only requests that are ambiguous or open"):
        registry.decide("no-mercury", "open")


def test_decisions_that_are_none(folder: Path) -> None:
    registry = Registry.open(folder)
    before = (folder / "registry.jsonl").read_bytes()
    for arguments, names, sentence in (
        (("no-dog", "open"), {}, "is open already"),
        (("no-dog", "open"), {"concept": "dog"}, "is open already"),
        (("no-dog", "refused"), {}, "takes a reason"),
        (("no-dog", "refused", " "), {}, "takes a reason"),
        (("no-dog", "refused", "why"), {"concept": "pig"}, "changes no names"),
        (("no-mercury", "open"), {"concept": "a CAT"}, "'a CAT' is open as no-cat"),
        (("no-mercury", "open"), {"synonyms": ["fox"]}, "synonyms: 'fox' must be kept, says no-cat"),
        (("no-mercury", "open"), {"concept": "\u202e"}, "no-mercury: concept: expected text"),
        (("no-merkury", "open"), {}, r"there is no request 'no-merkury' in .* \(did you mean 'no-mercury'\?\)"),
    ):
        with pytest.raises(EsdLoraError, match=sentence):
            registry.decide(*arguments, **names)  # type: ignore[arg-type]
    assert (folder / "registry.jsonl").read_bytes() == before


def test_withdrawn_request_stays(folder: Path) -> None:
    registry = Registry.open(folder)
    assert registry.withdraw("no-cat").status == "withdrawn"
    assert registry.withdraw("no-cat").status == "withdrawn"
    assert len(log_of(folder)) == 4
    assert states(folder) == {"no-cat": "withdrawn", "no-dog": "open", "no-mercury": "ambiguous"}
    registry.add([request("no-fox", "fox"), request("no-cat-again", "cat")])  # neither kept nor open any longer
    with pytest.raises(EsdLoraError, match="no-cat is withdrawn, and stays so"):
        registry.set_status(["no-dog", "no-cat"], "done")
    assert states(folder)["no-dog"] == "open"


def test_what_became_of_requests(folder: Path) -> None:
    registry = Registry.open(folder)
    assert [request.id for request in registry.set_status(["no-cat", "no-dog", "no-cat"], "done", "erased")] == [
        "no-cat",
        "no-dog",
    ]
    assert registry.set_status("no-dog", "done") == ()
    assert len(log_of(folder)) == 5
    with pytest.warns(UserWarning, match="share names: 'dog'"):
        registry.add([request("dog-2", "dog")])
    with pytest.raises(EsdLoraError, match="'dog' is open as no-dog"):
        registry.set_status("no-dog", "open")
    with pytest.raises(EsdLoraError, match="Withdraw it"):
        registry.set_status("no-dog", "withdrawn")


def test_overdue(folder: Path) -> None:
    registry = Registry.open(folder)
    registry.add([request("no-bee", "bee"), request("no-ant", "ant", due="2026-11-01", status="refused")])
    assert registry.overdue(date(2026, 11, 1)) == ()
    assert registry.overdue(date(2026, 11, 16)) == (DOG, MERCURY)
    assert registry.overdue(date(2026, 12, 2)) == (DOG, MERCURY, CAT)


def test_what_others_add_is_read_before_a_change(folder: Path) -> None:
    mine, other = Registry.open(folder), Registry.open(folder)
    other.withdraw("no-dog")
    mine.add([request("no-pig", "pig")])
    assert mine.requests()[1].status == "withdrawn"
    assert [event["number"] for event in log_of(folder)] == [1, 2, 3, 4, 5]
    with pytest.raises(EsdLoraError, match="'pig' is open as no-pig"):
        other.add([request("second", "pig")])


def test_one_run_at_a_time_adds(folder: Path) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_output(folder / "registry.jsonl"):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        with pytest.raises(EsdLoraError, match="is being written by"):
            Registry.open(folder).withdraw("no-dog")
    finally:
        done.set()
        thread.join()
    assert states(folder)["no-dog"] == "open"


def test_line_that_was_cut_off_is_told_and_goes_with_the_next_change(folder: Path) -> None:
    log = folder / "registry.jsonl"
    log.write_bytes(log.read_bytes() + b'{"number": 4, "time": "2026')
    with pytest.warns(UserWarning, match=r"registry\.jsonl:4: was cut off while it was written"):
        registry = Registry.open(folder)
    assert registry.requests() == (CAT, DOG, MERCURY)
    registry.withdraw("no-dog")
    assert [event["what"] for event in log_of(folder)] == ["added", "added", "added", "withdrawn"]
    assert states(folder)["no-dog"] == "withdrawn"


def test_line_that_lacks_only_its_line_break_counts(folder: Path) -> None:
    log = folder / "registry.jsonl"
    log.write_bytes(log.read_bytes().removesuffix(b"\n"))
    registry = Registry.open(folder)
    assert registry.requests() == (CAT, DOG, MERCURY)
    assert registry.add([CAT]) == ()
    registry.withdraw("no-dog")
    registry.withdraw("no-cat")
    assert states(folder) == {"no-cat": "withdrawn", "no-dog": "withdrawn", "no-mercury": "ambiguous"}
    assert len(log_of(folder)) == 5


def event_line(before: bytes, fields: dict[str, Any]) -> bytes:
    event = {
        **{"number": 4, "time": "2026-11-30T00:00:00Z", "who": "ada", "what": "withdrawn", "id": "no-cat", "payload": {}},
        **{"before": hashlib.sha256(before).hexdigest(), **fields},
    }
    return json.dumps(event).encode()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"number": 5}, "it has the number 5"),
        ({"number": None}, "number: Input should be a valid integer"),
        ({"what": "forgotten"}, "what: Input should be 'added', 'decided', 'withdrawn' or 'status'"),
        ({"id": "no-pig"}, "there is no request 'no-pig'"),
        ({"what": "added", "payload": CAT.record()}, "it adds no-cat as no-cat, or for a second time"),
        ({"what": "added", "id": "no-pig", "payload": CAT.record()}, "it adds no-cat as no-pig"),
        ({"what": "added", "id": "no-pig", "payload": {"id": "no-pig"}}, "concept: Field required"),
        ({"what": "status", "payload": {"status": "gone"}}, "status: Input should be"),
        ({"time": "2026-11-30T00:00:00"}, "time: Input should have timezone info"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_event_that_cannot_be_the_next(fields: dict[str, Any], sentence: str, folder: Path) -> None:
    log = folder / "registry.jsonl"
    last = log.read_bytes().splitlines()[-1]
    log.write_bytes(log.read_bytes() + event_line(last, fields) + b"\n")
    with pytest.raises(EsdLoraError, match=r"registry\.jsonl:4: is damaged, expected an event: ") as raised:
        Registry.open(folder)
    assert sentence in str(raised.value)
    assert str(raised.value).endswith("Restore it from a copy.")


def test_changed_line_is_named(folder: Path) -> None:
    log = folder / "registry.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"concept": "dog"', b'"concept": "pig"'))
    with pytest.raises(EsdLoraError, match=r"registry\.jsonl:2: was changed after it was written: line 3 holds another hash"):
        Registry.open(folder)
    with pytest.raises(EsdLoraError, match="was changed"):
        Registry(folder).add([request("no-pig", "pig")])


def test_line_that_was_taken_out_is_noticed(folder: Path) -> None:
    log = folder / "registry.jsonl"
    first, _, third = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + third)
    with pytest.raises(EsdLoraError, match=r"registry\.jsonl:2: is damaged, expected an event: it has the number 3"):
        Registry.open(folder)


def test_log_that_changes_while_it_is_known(folder: Path) -> None:
    registry, log = Registry.open(folder), folder / "registry.jsonl"
    content = log.read_bytes()
    log.write_bytes(content[:-10])
    with pytest.raises(EsdLoraError, match="was shortened since it was read"):
        registry.withdraw("no-dog")
    log.write_bytes(content.removesuffix(b"\n"))
    registry = Registry.open(folder)
    log.write_bytes(content.removesuffix(b"\n") + b"x\n")
    with pytest.raises(EsdLoraError, match="goes on where it ended"):
        registry.withdraw("no-dog")


def test_log_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MAX_JSON", 100)
    with pytest.raises(EsdLoraError, match="no-dog comes to more than 100 bytes"):
        Registry.open(folder).withdraw("no-dog")
    monkeypatch.setattr(event_log, "MAX_BYTES", 100)
    with pytest.raises(EsdLoraError, match="has more than 100 bytes"):
        Registry.open(folder)


def test_system_that_refuses_leaves_the_log_as_it_was(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "registry.jsonl").read_bytes()
    registry, new = Registry.open(folder), Registry.open(tmp_path / "new", new=True)

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(EsdLoraError, match="cannot be written: No space left"):
            registry.withdraw("no-dog")
        with pytest.raises(EsdLoraError, match="cannot be written: No space left"):
            new.add([CAT])
    assert (folder / "registry.jsonl").read_bytes() == before
    assert list((tmp_path / "new").iterdir()) == []
    assert registry.withdraw("no-dog").status == "withdrawn"
    assert new.add([CAT]) == (CAT,)


def test_log_that_cannot_be_read(folder: Path) -> None:
    (folder / "registry.jsonl").unlink()
    (folder / "registry.jsonl").mkdir()
    with pytest.raises(EsdLoraError, match=r"registry\.jsonl cannot be read: Is a directory"):
        Registry.open(folder, new=True)


def test_change_counts_though_it_cannot_be_shown(folder: Path) -> None:
    (folder / "requests.csv").unlink()
    (folder / "requests.csv").mkdir()
    with pytest.warns(UserWarning, match=r"requests\.csv shows no longer what .*registry\.jsonl says: output"):
        assert Registry.open(folder).withdraw("no-dog").status == "withdrawn"
    assert states(folder)["no-dog"] == "withdrawn"


def test_view_is_never_what_is_read(folder: Path, tmp_path: Path) -> None:
    view = folder / "requests.csv"
    with pytest.raises(EsdLoraError, match="An input is never written over"):
        Registry.open(folder).add(read_requests(view), view)
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(view, mine / "requests.csv")
    with pytest.raises(EsdLoraError, match=r"requests\.csv is there, and no event of a registry\.jsonl behind it"):
        Registry.open(mine, new=True).add([CAT])
    assert [path.name for path in mine.iterdir()] == ["requests.csv"]


def test_view_that_a_killed_run_left_old_is_mended(folder: Path) -> None:
    view = (folder / "requests.csv").read_bytes()
    Registry.open(folder).withdraw("no-dog")
    (folder / "requests.csv").write_bytes(view)
    Registry.open(folder).withdraw("no-dog")
    assert read_requests(folder / "requests.csv")[1].status == "withdrawn"


def test_folder_without_a_registry(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match=r"there is no registry in .*: it has no registry\.jsonl"):
        Registry.open(tmp_path)
    assert Registry.open(tmp_path, new=True).requests() == ()
    assert list(tmp_path.iterdir()) == []


# The commands


def invoke(*args: object) -> Result:
    return CliRunner(env={"USER": "grace"}).invoke(main, ["requests", *map(str, args)])


def good(*args: object) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands(tmp_path: Path) -> None:
    file, folder = tmp_path / "list.csv", tmp_path / "registry"
    write_requests([CAT, DOG, MERCURY], file)
    assert good("add", file, "-r", folder) == f"added: 3; there already: 0; registry: {folder}\n"
    assert good("add", file, "-r", folder, "--who", "ada") == f"added: 0; there already: 3; registry: {folder}\n"
    table = good("list", "-r", folder).splitlines()
    assert [line.split()[:3] for line in table] == [
        ["no-cat", "open", "object"],
        ["no-dog", "open", "object"],
        ["no-mercury", "ambiguous", "object"],
    ]
    assert "due 2026-12-01" in table[0]
    assert [row["id"] for row in json.loads(good("list", "-r", folder, "--status", "ambiguous", "--json"))["requests"]] == [
        "no-mercury"
    ]
    decided = good(*("decide", "no-mercury", "-r", folder, "--open", "--concept", "Freddie Mercury", "--synonym", "Queen's"))
    assert decided.split() == ["no-mercury", "open", "object", "due", "2026-11-15", "Freddie", "Mercury"]
    assert "refused" in good("decide", "no-dog", "-r", folder, "--refuse", "--reason", "a common animal", "--who", "ada")
    assert "withdrawn" in good("withdraw", "no-cat", "-r", folder)
    assert [event["who"] for event in log_of(folder)] == ["grace", "grace", "grace", "grace", "ada", "grace"]
    with (folder / "requests.csv").open(encoding="utf-8", newline="") as view:
        assert [row["status"] for row in csv.DictReader(view)] == ["withdrawn", "refused", "open"]


def test_overdue_command(folder: Path) -> None:
    assert good("overdue", "-r", folder, "--on", "2026-10-01", "--fail") == "nothing is overdue on 2026-10-01\n"
    assert json.loads(good("overdue", "-r", folder, "--on", "2026-10-01", "--json")) == {"requests": []}
    assert [line.split()[0] for line in good("overdue", "-r", folder, "--on", "2026-11-16").splitlines()] == [
        "no-dog",
        "no-mercury",
    ]
    late = invoke("overdue", "-r", folder, "--on", "2026-11-02", "--json", "--fail")
    assert late.exit_code == 1
    assert late.stderr == ""
    assert [row["id"] for row in json.loads(late.stdout)["requests"]] == ["no-dog"]
    assert "no-cat" in good("overdue", "-r", folder, "--on", "2099-01-01")


def test_mistakes_are_told_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("id,concept,kind\nx,y,objekt\n")
    for args, sentence in (
        (("add", file, "-r", tmp_path / "new"), "list.csv:2: kind:"),
        (("add", tmp_path / "none.csv", "-r", folder), "there is no list of requests"),
        (("list", "-r", tmp_path / "new"), "there is no registry"),
        (("decide", "no-cat", "-r", folder), "give --open or --refuse"),
        (("withdraw", "no-cut", "-r", folder), "did you mean 'no-cat'?"),
    ):
        result = invoke(*args)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert sentence in result.stderr
    assert not (tmp_path / "new").exists()


def test_overlaps_are_warned_of(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    write_requests([request("no-tiger", "tiger", "kitten"), request("a", "bee", "fly"), request("b", "ant", "fly")], file)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = invoke("add", file, "-r", folder)
    assert result.exit_code == 0
    assert [line.partition(". ")[0] for line in result.stderr.splitlines()] == [
        f"warning: a ({file}:3), b ({file}:4) share names: 'fly'",
        f"warning: no-cat ({folder / 'registry.jsonl'}:1), no-tiger ({file}:2) share names: 'kitten'",
    ]
