"""Requests on the page: their order, files and forms with every fault at once, command lines, a fleet's page in a frame."""

from __future__ import annotations

import warnings
from datetime import date
from pathlib import Path

import pytest
from PIL import Image

from esd_lora.errors import EsdLoraError
from esd_lora.fleet.registry import Registry
from esd_lora.ui import request_lists
from esd_lora.ui.request_lists import (
    add_file,
    add_form,
    fleet_command,
    fleet_page,
    has_registry,
    in_order,
    page_file,
    show_requests,
)
from fleet_requests import request

TODAY = date(2026, 12, 10)


def test_what_is_overdue_comes_first() -> None:
    requests = [
        request(1, status="done"),  # overdue no more
        request(20),
        request(30, status="ambiguous"),
        request(2),
        request(3, status="ambiguous"),
        request(4, status="withdrawn"),
        request(5, due=None),
        request(6, status="refused"),
    ]
    assert [each.id for each in in_order(requests, TODAY)] == ["r2", "r3", "r30", "r20", "r5", "r1", "r6", "r4"]
    html = show_requests(requests, TODAY)
    assert "<caption>Requests: 2 overdue</caption>" in html
    assert html.count("overdue</td>") == 2
    assert '<td class="bad">2026-12-03, overdue</td>' in html


def test_long_lists_are_cut_off_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_lists, "_MOST_ROWS", 2)
    html = show_requests([request(i) for i in range(20, 24)], TODAY)
    assert "Requests, the first 2 of 4: none overdue" in html
    assert html.count("<tr><td>") == 2


def test_names_are_escaped() -> None:
    html = show_requests([request(1, "<b>x</b>", reference="[x](javascript:1)<i>")], TODAY)
    assert "<b>" not in html
    assert "<i>" not in html


def test_form_becomes_a_request(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path, "ada", new=True)
    fields = {"id": "no-cat", "concept": "a cat", "kind": "object", "synonyms": "a kitten; a tomcat", "due": "", "anchor": None}
    added = add_form(registry, fields | {"private": True})
    assert added.sentence() == "1 added: no-cat."
    assert added.new[0].synonyms == ("a kitten", "a tomcat")
    assert added.new[0].private
    assert has_registry(tmp_path)
    assert add_form(registry, fields | {"private": True}).sentence() == "0 added; 1 there already: nothing new."


def test_form_with_every_fault_at_once(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError) as raised:
        add_form(Registry.open(tmp_path, new=True), {"id": "no cat", "kind": "objekt", "due": "soon"})
    first, *faults = str(raised.value).split("\n  ")
    assert first == "the request has faults:"
    assert [fault.partition(":")[0] for fault in faults] == ["id", "concept", "kind", "due"]
    assert "did you mean 'object'?" in faults[2]
    assert not has_registry(tmp_path)


def test_file_with_every_fault_at_once_by_the_name_it_was_uploaded_under(tmp_path: Path) -> None:
    file = tmp_path / "upload-1234"
    file = file.with_suffix(".csv")
    file.write_text("id,concept,kind\na,cat,object\nb,dog,objekt\nc,,object\n", "utf-8")
    with pytest.raises(EsdLoraError) as raised:
        add_file(Registry.open(tmp_path / "registry", new=True), file, "list.csv")
    assert "upload" not in str(raised.value)
    assert [line.partition(": ")[0] for line in str(raised.value).split("\n  ")[1:]] == ["list.csv:3", "list.csv:4"]


def test_names_that_are_shared_are_told(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path, new=True)
    add_form(registry, {"id": "a", "concept": "mercury", "kind": "object"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        added = add_form(registry, {"id": "b", "concept": "Freddie Mercury", "synonyms": "Mercury", "kind": "person"})
    assert added.overlaps == ["a (object, open), b (person, open) share names: 'mercury'. Are they one request, or namesakes?"]


def test_commands_of_fleet_and_release(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match="there is no registry in"):
        fleet_command("fleet", tmp_path, "emoji", Path("out"))
    Registry.open(tmp_path, new=True).add([request(1)])
    start = [str(tmp_path), "--base=emoji"]
    gate = "erased.accuracy>0.05"
    fleet = fleet_command("fleet", tmp_path, "emoji", Path("out"), pictures=5, gate=gate)
    assert fleet == ["fleet", *start, "--workers=1", "--pictures=5", "--out=out"]
    release = fleet_command("release", tmp_path, "emoji", Path("out"), workers=2, gate=gate)
    assert release == ["release", *start, "--workers=2", f"--gate={gate}", "--out=out"]
    with pytest.raises(EsdLoraError, match="choose a base"):
        fleet_command("release", tmp_path, "", Path("out"))


def test_page_of_a_fleet_holds_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert page_file(tmp_path) is None
    fleet = tmp_path / "fleet"
    for name in ("r1", "r2"):
        (fleet / "erasers" / name / "samples").mkdir(parents=True)
        Image.new("RGB", (200, 100)).save(fleet / "erasers" / name / "samples" / "1_base.png")
    (tmp_path / "secret.png").write_bytes(b"")
    places = ["erasers/r1/samples/1_base.png", "erasers/r1/samples/1_erased.png", "erasers/../samples/1_base.png"]
    places.append("erasers/r2/samples/1_base.png")
    (fleet / "fleet.html").write_text("".join(f'<img src="{place}">' for place in places), "utf-8")
    file = page_file(tmp_path)
    assert file == fleet / "fleet.html"
    parts = fleet_page(file).split('<img src="')[1:]
    assert [part[:23] for part in parts] == [
        "data:image/jpeg;base64,",
        '">',
        "erasers/../samples/1_ba",
        "data:image/jpeg;base64,",
    ]
    monkeypatch.setattr(request_lists, "_MOST_PICTURES", 1)
    assert fleet_page(file).count("data:image") == 1
