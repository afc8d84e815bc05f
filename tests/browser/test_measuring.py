"""The tab *Measure*: evaluations made and opened, and two of them beside each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from browsing import Server, choose, job_ends
from evaluations import Seen, made_evaluation

EVIL = "a {{value}} ${document.title='evil'} <img src=x onerror=\"document.title='evil'\">"
"""What a page that shows it as HTML, or takes it for a template, would obey."""


@pytest.fixture(scope="module")
def measured(server: Server) -> list[str]:
    """Two evaluations in the workplace, of the same prompts: titles as the page has them, without the day."""
    first = [
        Seen(EVIL, 0, "target", 10, "dog", False),
        *(Seen(f"thing {i}", i, "general", 10, "dog", True) for i in range(1, 15)),
    ]
    second = [first[0], first[1]._replace(shade=250, seen="cat", accurate=False), *first[2:]]
    base = [picture._replace(shade=128) for picture in first]
    for name, pictures in (("page-one", first), ("page-other", second)):
        made_evaluation(server.folder / name, {"base": base, "erased": pictures}, concepts=[EVIL])
    return ["page-one", "page-other"]


def option(page: Page, label: str, name: str) -> None:
    """Choose the evaluation in a folder."""
    page.get_by_label(label, exact=True).click()
    entry = page.get_by_role("option").filter(has_text=f"{name}:")
    entry.click()
    expect(entry).to_have_count(0)  # the list is closed before another opens


def test_result_and_page_of_an_earlier_evaluation(open_page: Callable[..., Page], measured: list[str]) -> None:
    page = open_page("Measure", width=400)
    option(page, "Evaluation to look at", measured[0])
    expect(page.get_by_role("cell", name="5.0 % (1.7 to 13.7)")).to_be_visible()
    expect(page.get_by_text("-95.0 points (-99.0 to -86.0): better")).to_be_visible()
    page.get_by_role("button", name="Its page, with pictures").click()
    frame = page.frame_locator(f"iframe[title='Page of the evaluation {measured[0]}']")
    expect(frame.get_by_role("heading", name="Measured")).to_be_visible()
    expect(page).to_have_title("esd-lora")
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_two_picture_by_picture(open_page: Callable[..., Page], measured: list[str]) -> None:
    page = open_page("Measure", width=400)
    option(page, "First", measured[0])
    option(page, "Second", measured[1])
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("15 of 15 prompts and seeds that both have.")).to_be_visible()
    expect(page.get_by_role("heading", name=EVIL)).to_be_visible()
    expect(page.get_by_role("img", name=f"base: {EVIL}")).to_be_visible()
    expect(page.get_by_text("1 to 12 of 15")).to_be_visible()
    page.get_by_role("button", name="Next").click()
    expect(page.get_by_text("13 to 15 of 15")).to_be_visible()
    for which in ("Judged differently", "Painted differently, most of all first"):
        page.get_by_label(which).check()
        page.get_by_role("button", name="Compare", exact=True).click()
        expect(page.get_by_text("1 of 15 prompts and seeds that both have.")).to_be_visible()
        expect(page.get_by_role("heading", name="thing 1", exact=True)).to_be_visible()
    expect(page).to_have_title("esd-lora")  # nothing of what was shown was obeyed
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_what_cannot_be_compared_is_one_sentence(open_page: Callable[..., Page], measured: list[str]) -> None:
    page = open_page("Measure")
    option(page, "First", measured[0])
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("No second evaluation is chosen.")).to_be_visible()
    page.get_by_label("Most pictures of each kind of prompt").first.fill("many")
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.get_by_text("'many' is no number that fits.")).to_be_visible()


@pytest.mark.slow
def test_an_eraser_is_measured(open_page: Callable[..., Page], two_erasers: list[str]) -> None:
    page = open_page("Measure")
    choose(page, "Erasers to measure, all on together", two_erasers[0])
    page.get_by_label("Most pictures of each kind of prompt").first.fill("4")
    page.get_by_role("button", name="What will it take?").first.click()
    expect(page.get_by_text("pictures of base and erased. About")).to_be_visible()
    page.get_by_role("button", name="Measure", exact=True).click()
    job_ends(page, f"Measure {two_erasers[0]} by emoji-object")
    expect(page.get_by_role("row", name="Target: prompts about what was erased")).to_be_visible()
