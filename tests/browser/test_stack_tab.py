"""The tab *Stack and merge*: erasers put together, looked at, merged and written for other programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from browsing import Server, choose, job_ends
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import stack
from esd_lora.erasers.tensor_files import read_header


def test_two_become_one_and_a_file_for_other_programs(
    open_page: Callable[..., Page], server: Server, two_erasers: list[str]
) -> None:
    page = open_page("Stack and merge", width=400)
    choose(page, "Erasers to put together", *two_erasers)
    strength = page.get_by_role("spinbutton", name="Strength of page-pizza")
    strength.fill("0.5")
    strength.press("Enter")
    page.get_by_role("button", name="How they interfere").click()
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.get_by_role("group", name="Cosine of updates").get_by_role("cell").nth(1)).to_have_text("1.00")
    page.get_by_label("Sum: exact, on no base; what each costs adds up").check()
    page.get_by_label("Name of the stack").fill("page-both")
    page.get_by_role("button", name="Make the stack").click()
    job_ends(page, "Stack 2 erasers into page-both")
    expect(page.get_by_text("a cat, a pizza (at strength 0.5)")).to_be_visible()
    expect(page.get_by_text("a plain sum: each does all that it did")).to_be_visible()
    members = [Eraser.load(server.folder / name) for name in two_erasers]
    assert Eraser.load(server.folder / "page-both").header.concepts == stack(members, [1, 0.5]).header.concepts
    page.get_by_role("button", name="Write its file for ComfyUI, A1111 and Forge").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download no-cat-pizza.safetensors").click()
    assert any(name.endswith(".lora_down.weight") for name in read_header(Path(download.value.path())).tensors)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


@pytest.mark.slow
def test_merging_says_what_was_checked(open_page: Callable[..., Page], server: Server, two_erasers: list[str]) -> None:
    page = open_page("Stack and merge")
    choose(page, "Erasers to put together", two_erasers[0])
    page.get_by_label("Name of the merged base").fill("page-merged")
    page.get_by_role("button", name="Merge and verify").click()
    job_ends(page, "Merge 1 eraser into page-merged")
    expect(page.get_by_text("each value is the base's plus the update, to within rounding")).to_be_visible()
    expect(page.get_by_text("byte for byte the base's")).to_be_visible()
    assert (server.folder / "page-merged" / "model_index.json").is_file()


def test_nothing_chosen_is_one_sentence(open_page: Callable[..., Page]) -> None:
    page = open_page("Stack and merge")
    for number, button in enumerate(("Make the stack", "Merge and verify"), 1):
        page.get_by_role("button", name=button).click()
        expect(page.get_by_text("No erasers chosen: choose 1 or more.")).to_have_count(number)
