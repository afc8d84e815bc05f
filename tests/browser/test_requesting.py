"""The tab *Requests*: a registry filled, decided on and withdrawn from, and the fleet that erases what it asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from browsing import Server, choose, job_ends
from esd_lora.fleet.registry import Registry

EVIL = "<img src=x onerror=alert(1)> ${1+1}"


def open_registry(open_page: Callable[..., Page], name: str, *, width: int = 1280) -> Page:
    """Open the tab on a registry of one's own."""
    page = open_page("Requests", width=width)
    page.get_by_label("Registry").fill(name)
    expect(page.get_by_label("Who you are")).not_to_have_value("")  # the page names the user who runs it, once it is open
    page.get_by_label("Who you are").fill("ada")
    page.get_by_role("button", name="Add requests").click()
    return page


def test_requests_are_added_decided_on_and_withdrawn(open_page: Callable[..., Page], server: Server) -> None:
    page = open_registry(open_page, "page-registry", width=400)
    page.get_by_label("Id", exact=True).fill("no-mercury")
    page.get_by_label("Concept", exact=True).fill(EVIL)
    page.get_by_label("Due").fill("2020-01-31")
    page.get_by_role("button", name="Add this request").click()
    expect(page.get_by_text("1 added: no-mercury.")).to_be_visible()
    expect(page.get_by_role("cell", name="2020-01-31, overdue")).to_be_visible()
    expect(page.get_by_role("cell", name=EVIL)).to_be_visible()
    page.get_by_role("button", name="Decide on one").click()
    choose(page, "Request to decide on", f"no-mercury: {EVIL} (open)")
    page.get_by_label("Refuse it").check()
    page.get_by_role("button", name="Decide", exact=True).click()
    expect(page.get_by_text("Refusing no-mercury takes a reason")).to_be_visible()
    page.get_by_label("Why A refusal takes a reason.").fill("a planet")
    page.get_by_role("button", name="Decide", exact=True).click()
    expect(page.get_by_role("cell", name="refused")).to_be_visible()
    page.get_by_role("button", name="Withdraw one").click()
    choose(page, "Request to withdraw", f"no-mercury: {EVIL} (refused)")
    page.get_by_role("button", name="Withdraw", exact=True).click()
    expect(page.get_by_role("cell", name="withdrawn")).to_be_visible()
    registry = Registry.open(server.folder / "page-registry")
    assert [request.status for request in registry.requests()] == ["withdrawn"]
    assert '"who":"ada"' in (server.folder / "page-registry" / "registry.jsonl").read_text().replace(" ", "")
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_file_with_faults_is_told_them_all(open_page: Callable[..., Page], tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("id,concept,kind\na,cat,object\nb,dog,objekt\nc,,object\n", "utf-8")
    page = open_registry(open_page, "page-faults")
    page.locator("input[type=file]").first.set_input_files(file)
    expect(page.get_by_role("row", name="list.csv")).to_be_visible()  # by its words it is two parts
    page.get_by_role("button", name="Add the requests of this file").click()
    faults = page.get_by_role("alert").get_by_role("listitem")
    expect(faults).to_have_count(2)
    expect(faults.first).to_contain_text("list.csv:3: kind:")
    expect(page.get_by_text("No request was added yet.")).to_be_visible()


def test_who_makes_a_change_is_asked(open_page: Callable[..., Page]) -> None:
    page = open_registry(open_page, "page-nobody")
    page.get_by_label("Who you are").fill("")
    page.get_by_role("button", name="Add this request").click()
    expect(page.get_by_text("Nobody is named who makes this change.")).to_be_visible()


@pytest.mark.slow
def test_a_fleet_erases_what_is_asked_for(open_page: Callable[..., Page]) -> None:
    page = open_registry(open_page, "page-asked")
    page.get_by_label("Id", exact=True).fill("no-key")
    page.get_by_label("Concept", exact=True).fill("a key")
    page.get_by_role("button", name="Add this request").click()
    expect(page.get_by_text("1 added: no-key.")).to_be_visible()
    page.get_by_label("Folder What was begun in it goes on").fill("page-fleet")
    page.get_by_label("Most pictures of each kind of prompt").last.fill("2")
    page.get_by_role("button", name="Start", exact=True).click()
    job_ends(page, "Fleet of page-asked in page-fleet")
    frame = page.frame_locator("iframe[title='Page of the fleet']")
    expect(frame.get_by_role("heading", name="1 of 1 requests done")).to_be_visible()
    expect(frame.get_by_role("img", name="no-key, erased")).to_be_visible()
