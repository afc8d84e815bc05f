"""Take the pictures of docs/ui.md: the page as it is, on the built-in base, in a headless Chromium.

    python benchmarks/screenshots.py

Needs the extra `ui`, playwright, and chromium-headless-shell or chromium; takes a few minutes.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

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


SHOTS: list[tuple[str, int, int, Callable[[Page], None]]] = [
    ("ui-erase.png", WIDE, 1250, show_erasing),
    ("ui-try.png", WIDE, 1250, show_trying),
    ("ui-try-narrow.png", NARROW, 1250, show_trying),
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
    program = next(path for name in ("chromium-headless-shell", "chromium") if (path := shutil.which(name)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        workplace = Workplace(folder)
        with serving(workplace) as address:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            for name, width, height, act in SHOTS:
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
