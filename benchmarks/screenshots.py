"""Take the pictures of docs/ui.md: the page as it is, on the built-in base, in a headless Chromium.

    python benchmarks/screenshots.py [--only ui-stack.png]

Needs the extra `ui`, playwright, and chromium-headless-shell or chromium; takes a few minutes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from esd_lora.recipe_files import load_recipe
from esd_lora.training import train
from esd_lora.ui.app import serving
from esd_lora.ui.jobs import Jobs
from esd_lora.ui.workplace import Workplace

DOCS = Path(__file__).resolve().parents[1] / "docs"
WIDE, NARROW = 1180, 400
"""Widths of a window, in pixels."""
PATIENCE = 600_000
"""Milliseconds that a training may take."""


def show_erasing(page: Page) -> None:
    """Ask what erasing takes, erase, and wait for the card."""
    page.get_by_role("tab", name="Erase", exact=True).click()
    page.get_by_label("What to erase").fill("a cat")
    page.get_by_label("instant: solved").check()
    page.get_by_role("button", name="What will it take?").click()
    page.get_by_text("It will take ").wait_for()
    page.get_by_role("button", name="Erase", exact=True).click()
    page.get_by_role("heading", name="What is erased").wait_for()


def show_training(page: Page) -> None:
    """Train until the probe has been read twice and a preview is there."""
    page.get_by_role("tab", name="Erase", exact=True).click()
    page.get_by_label("What to erase").fill("a rocket")
    page.get_by_label("thorough: solved").check()
    page.get_by_role("button", name="Erase", exact=True).click()
    page.get_by_alt_text("after 90 steps: the base above").wait_for()


def show_trying(page: Page) -> None:
    """Paint with an eraser, and a grid over strengths."""
    page.get_by_role("tab", name="Try", exact=True).click()
    erasers = page.get_by_role("combobox", name="Erasers")
    erasers.click()
    page.get_by_role("option", name="no-cat", exact=True).click()
    erasers.press("Escape")
    page.get_by_role("button", name="Paint", exact=True).click()
    page.get_by_text(" a side in ").wait_for()
    page.get_by_text("A grid over strengths").click()
    page.get_by_role("button", name="Paint the grid").click()
    page.get_by_alt_text("a row for each strength").wait_for()


def choose(page: Page, label: str, *names: str) -> None:
    """Choose options of an input."""
    box = page.get_by_role("combobox", name=label)
    box.click()
    for name in names:
        page.get_by_role("option", name=re.compile(rf"^{name}(:|-measured:|$)")).click()
    box.press("Escape")


def show_stacking(page: Page) -> None:
    """See how two erasers interfere, and fuse them."""
    page.get_by_role("tab", name="Stack and merge", exact=True).click()
    choose(page, "Erasers to put together", *OTHERS)
    page.get_by_text("How they interfere").click()
    page.get_by_label("Measure on the base, too").check()
    page.get_by_role("button", name="Show", exact=True).click()
    page.get_by_text("Cosine of updates").wait_for()
    page.get_by_role("button", name="What will it take?").locator("visible=true").first.click()
    page.get_by_text("The eraser will have").wait_for()
    page.get_by_role("button", name="Make the stack").click()
    page.get_by_text(": Done").locator("visible=true").wait_for()
    page.get_by_text("What is lost").wait_for()


def show_measuring(page: Page) -> None:
    """Measure two erasers by a few pictures, and compare them."""
    for name in OTHERS:
        page.reload()
        page.get_by_role("tab", name="Measure", exact=True).click()
        page.get_by_label("Most pictures of each kind of prompt").locator("visible=true").fill("3")
        choose(page, "Erasers to measure", name)
        page.get_by_role("button", name="Measure", exact=True).click()
        page.get_by_text(f"Measure {name} by emoji-object: Done").wait_for()
    choose(page, "First", OTHERS[0])
    choose(page, "Second", OTHERS[1])
    page.get_by_label("Painted differently").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text("prompts and seeds that both have").wait_for()


def show_requests(page: Page) -> None:
    """Add a list of requests, and fill the form with what is refused."""
    page.get_by_role("tab", name="Requests", exact=True).click()
    page.get_by_label("Who you are").fill("ada")
    page.get_by_role("button", name="Add requests").click()
    page.locator("input[type=file]").first.set_input_files(
        {"name": "requests.csv", "mimeType": "text/csv", "buffer": REQUESTS.encode()}
    )
    page.get_by_text("requests.csv").first.wait_for()
    page.get_by_role("button", name="Add the requests of this file").click()
    page.get_by_text("4 added").wait_for()
    page.get_by_label("Id", exact=True).fill("no cat")
    page.get_by_label("Due", exact=True).fill("soon")
    page.get_by_role("button", name="Add this request").click()
    page.get_by_role("alert").get_by_role("listitem").first.wait_for()


OTHERS = ("no-pizza", "no-key")
"""Erasers that are there beforehand."""
REQUESTS = """id,concept,synonyms,kind,basis,reference,due,status
no-key,a key,,object,takedown,ticket 4711,2026-11-20,open
no-mercury,Mercury,Freddie,person,gdpr-17,ticket 12,2026-12-24,ambiguous
no-bus,a bus,a coach,object,policy,,2030-12-05,open
no-blue,blue,,style,licence,,,refused
"""
SHOTS: list[tuple[str, int, int, Callable[[Page], None]]] = [
    ("ui-erase.png", WIDE, 1250, show_erasing),
    ("ui-try.png", WIDE, 1250, show_trying),
    ("ui-try-narrow.png", NARROW, 1250, show_trying),
    ("ui-stack.png", WIDE, 2500, show_stacking),
    ("ui-measure.png", WIDE, 1900, show_measuring),
    ("ui-requests.png", WIDE, 1250, show_requests),
    ("ui-training.png", WIDE, 1250, show_training),
]
"""File, width and greatest height of a picture, and what is done before it is taken; later ones find what earlier ones made."""


def take(browser: Browser, address: str, file: Path, width: int, height: int, act: Callable[[Page], None]) -> None:
    """Take one picture, of the whole page up to a height."""
    page = browser.new_page(viewport={"width": width, "height": 900}, reduced_motion="reduce")
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    act(page)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    whole = page.evaluate("document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, whole)}
    page.screenshot(path=file, full_page=True, clip=clip, animations="disabled")
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="FILE", help="these alone; ui-try.png needs ui-erase.png before it")
    only = parser.parse_args().only
    program = next(path for name in ("chromium-headless-shell", "chromium") if (path := shutil.which(name)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        for name in OTHERS:
            recipe = load_recipe("instant", {"train.preview_every": 0}, base="emoji", concepts=[name.replace("no-", "a ")])
            train(recipe, out=Path(folder) / name, progress=False)
        workplace = Workplace(folder)
        with serving(workplace) as address:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            for name, width, height, act in SHOTS:
                if only is None or name in only:
                    take(browser, address, DOCS / name, width, height, act)
                    print(DOCS / name)
            browser.close()
        end_jobs(workplace.jobs)


def end_jobs(jobs: Jobs) -> None:
    """Stop what still runs, and wait until it has ended: its folder is removed."""
    for job in jobs.all():
        if not job.over:
            jobs.stop(job.id)
    while not all(job.over for job in jobs.all()):
        time.sleep(0.2)


if __name__ == "__main__":
    main()
