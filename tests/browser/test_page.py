"""The page as a user has it: each tab does its job on the built-in base, in a real browser."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image
from playwright.sync_api import Locator, Page, expect

import esd_lora
from browsing import Server, choose_tab, end_server, refused_server, start_server
from esd_lora.cli import main

OpenPage = Callable[..., Page]
TABS = ("Try", "Erase", "Stack and merge", "Measure", "Requests")
NAMED = {
    "textbox",
    "slider",
    "spinbutton",
    "combobox",
    "checkbox",
    "radio",
    "button",
    "tab",
    "progressbar",
    "searchbox",
    "listbox",
}
"""Roles whose name a screen reader reads out."""


def choose_erasers(page: Page, *names: str) -> None:
    """Choose erasers of the workplace."""
    erasers = page.get_by_role("combobox", name="Erasers")
    for name in names:
        erasers.click()
        page.get_by_role("option", name=name, exact=True).click()
    erasers.press("Escape")


def prompt(page: Page) -> Locator:
    """Return the input for a prompt of the tab *Try*."""
    return page.get_by_role("textbox", name="Prompt", exact=True)


def status(page: Page) -> Locator:
    """Return the line under the pictures of the tab *Try*."""
    return page.get_by_text(" a side in ")


def sources(page: Page, side: str) -> list[str]:
    """Return where the pictures of a side come from; gradio names files by what is in them."""
    return [str(image.get_attribute("src")) for image in page.get_by_alt_text(side).all()]


def fault(page: Page) -> Locator:
    """Return the box in which a fault is told."""
    return page.get_by_test_id("toast-body")


def widths(page: Page) -> tuple[int, int]:
    """Return how wide a page is, and the window."""
    return page.evaluate("[document.documentElement.scrollWidth, innerWidth]")


def unnamed(page: Page) -> list[Any]:
    """Return what a screen reader comes across and has no name for."""
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    known = [node for node in tree if not node.get("ignored") and node["role"]["value"] in NAMED]
    assert known
    return [node for node in known if not node.get("name", {}).get("value", "").strip()]


def test_erasers_are_tried_with_the_same_seeds(open_page: OpenPage, server: Server, tmp_path: Path) -> None:
    page = open_page("Try")
    expect(page.get_by_role("slider")).to_have_count(0)
    choose_erasers(page, "no-cat")
    expect(page.get_by_role("slider", name="Strength of no-cat")).to_have_value("1")
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(status(page)).to_contain_text("2 pictures a side in")
    before, after = sources(page, "before, seed"), sources(page, "after, seed")
    assert len({*before, *after}) == 4

    strength = page.get_by_role("spinbutton", name="Strength of no-cat")
    strength.fill("0.5")
    strength.press("Tab")
    expect(status(page)).to_contain_text("The base's were kept from before.")
    assert sources(page, "before, seed") == before
    assert not {*sources(page, "after, seed")} & {*after}

    with page.expect_download() as download:
        page.get_by_role("button", name="Download settings").click()
    settings = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert settings["command"] == page.get_by_label("The same in a terminal").inner_text()
    settings["generate"]["erasers"] = [str(server.folder / name) for name in settings["generate"]["erasers"]]
    repeated = esd_lora.generate(**settings["generate"])
    for image, side in zip(repeated, sources(page, "after, seed"), strict=True):
        (tmp_path / "shown.png").write_bytes(page.request.get(side).body())
        assert Image.open(tmp_path / "shown.png").convert("RGB").tobytes() == image.tobytes()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download pictures").click()
    assert download.value.suggested_filename == "before-and-after.png"


@pytest.mark.slow
def test_the_command_line_paints_the_same(
    open_page: OpenPage, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page("Try")
    choose_erasers(page, "no-cat")
    prompt(page).fill("a dog in ink style")
    page.get_by_label("Gate: erasers on").check()
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.get_by_text("Gate: no-cat off (similarity")).to_be_visible()
    assert {*sources(page, "before, seed")} == {*sources(page, "after, seed")}
    page.get_by_text("A grid over strengths").click()
    page.get_by_role("button", name="Paint the grid").click()
    expect(page.get_by_alt_text("a dog in ink style: a row for each strength (-1, 0 (base), 0.5, 1, 1.5)")).to_be_visible()
    words = shlex.split(page.get_by_label("The same in a terminal").inner_text())
    monkeypatch.chdir(server.folder)
    words[words.index("pictures")] = str(tmp_path / "pictures")
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "pictures").iterdir()} >= {"comparison.png", "strengths.png", "gates.json"}


def test_a_concept_is_erased_and_a_reload_finds_it(open_page: OpenPage, server: Server) -> None:
    page, other = open_page("Erase"), open_page("Erase")
    page.get_by_label("What to erase").fill("a rocket")
    page.get_by_label("instant: solved").check()
    page.get_by_role("button", name="Erase", exact=True).click()
    expect(page.get_by_text("Erase a rocket:")).to_be_visible()
    other.reload()  # another user, who started nothing
    choose_tab(other, "Erase")
    expect(other.get_by_text("Erase a rocket:")).to_be_visible()

    page.get_by_role("button", name="What will it take?").click()  # meanwhile
    expect(page.get_by_text("It will take ")).to_be_visible()
    expect(page.get_by_text("prompts near it, the one reached best")).to_be_visible()
    expect(page.get_by_text("these are what it hurts first")).to_be_visible()

    expect(page.get_by_text("Erase a rocket: Done after")).to_be_visible()
    expect(page.get_by_role("heading", name="Eraser: a rocket")).to_be_visible()
    expect(page.get_by_alt_text("the base above, erased below")).to_be_visible()
    expect(page.get_by_role("button", name="Measure it")).to_be_visible()
    expect(other.get_by_role("heading", name="Eraser: a rocket")).to_be_visible()
    assert (server.folder / "no-rocket" / "README.md").is_file()
    choose_tab(page, "Try")
    choose_erasers(page, "no-cat", "no-rocket")
    expect(page.get_by_role("slider")).to_have_count(2)


def test_two_users_do_not_paint_with_each_others_erasers(open_page: OpenPage) -> None:
    pages = open_page("Try"), open_page("Try")
    for page in pages:
        prompt(page).fill("a cat in noto style")
    choose_erasers(pages[0], "no-cat")
    for page in pages:
        page.get_by_role("button", name="Paint", exact=True).click()
    for page in pages:
        expect(status(page)).to_be_visible()
    with_eraser, without = (sources(page, "after, seed") for page in pages)
    assert sources(pages[0], "before, seed") == sources(pages[1], "before, seed") == without
    assert not {*with_eraser} & {*without}
    expect(status(pages[1])).to_contain_text("both sides are the base")


def test_faults_are_told_in_one_sentence(open_page: OpenPage) -> None:
    page = open_page("Erase")
    page.get_by_role("button", name="Erase", exact=True).click()
    expect(fault(page)).to_contain_text("There is nothing to erase. Write a concept")
    choose_tab(page, "Try")
    prompt(page).fill("")
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(fault(page).last).to_contain_text("There is no prompt. Write what to paint.")
    erasers = page.get_by_role("combobox", name="Erasers")
    erasers.fill("nowhere/at all")
    erasers.press("Enter")
    prompt(page).fill("a cat")
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(fault(page).last).to_contain_text("nowhere/at all")
    assert "Traceback" not in page.content()


def test_a_page_is_worked_by_keys(open_page: OpenPage) -> None:
    page = open_page("Try")
    page.get_by_role("tab", name="Try").focus()
    tab_to(page, "Erase")
    page.keyboard.press("Enter")
    expect(page.get_by_label("What to erase")).to_be_visible()
    tab_to(page, "")  # the first input
    page.keyboard.type("a cat")
    assert page.get_by_label("What to erase").input_value() == "a cat"
    tab_to(page, "What will it take?")
    page.keyboard.press("Enter")
    expect(page.get_by_text("It will take ")).to_be_visible()


def tab_to(page: Page, text: str) -> None:
    """Press Tab until what is focused has a text; inputs have none."""
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == text:
            return
    raise AssertionError(f"Tab does not come to {text!r}")


@pytest.mark.parametrize("width", [1280, 400])
def test_every_tab_fits_and_says_what_is_what(open_page: OpenPage, width: int) -> None:
    hosts: set[str] = set()
    page = open_page("Try", width=width, watch=lambda request: hosts.add(request.url))
    for tab in TABS:
        choose_tab(page, tab)
        expect(page.get_by_role("tab", name=tab, exact=True)).to_have_attribute("aria-selected", "true")
        assert unnamed(page) == []
        shown, window = widths(page)
        assert shown <= window, tab
    own = page.url.split("/")[2]
    assert {url.split("/")[2] for url in hosts if url.startswith("http")} == {own}  # nothing comes from elsewhere


@pytest.mark.slow
def test_a_training_is_stopped_and_goes_on_after_a_restart(open_page: OpenPage, tmp_path: Path) -> None:
    first = start_server(tmp_path)
    page = open_page("Erase", address=first.address)
    page.get_by_label("What to erase").fill("a cat")
    page.get_by_label("thorough: solved").check()
    page.get_by_role("button", name="Erase", exact=True).click()
    expect(page.get_by_role("progressbar")).to_be_visible(timeout=300_000)
    assert "job 0001 goes on: Erase a cat" in end_server(first)

    second = start_server(tmp_path)
    assert "is taken or not to be had" in refused_server(tmp_path, second.port)
    page = open_page("Erase", address=second.address)
    expect(page.get_by_role("progressbar")).to_be_visible()
    expect(page.get_by_alt_text("How far the concept is gone")).to_be_visible(timeout=300_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Erase a cat: Stopped after")).to_be_visible()
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_text("Erase a cat: Done after")).to_be_visible(timeout=600_000)
    page.get_by_role("button", name="Measure it").click()
    expect(page.get_by_text("Measure no-cat: Done after")).to_be_visible(timeout=600_000)
    expect(page.get_by_role("heading", name="Measured")).to_be_visible()
    assert "goes on" not in end_server(second)
