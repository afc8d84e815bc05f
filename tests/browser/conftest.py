"""Fixtures of the browser tests: a server of the page, and a real browser that looks at it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from browsing import Server, choose_tab, end_server, start_server
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATIENCE = 120_000
"""Milliseconds until something that should appear counts as missing: torch alone may take ten seconds to load."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; `.ci/run` installs one where there is none.

    One for each file of tests: while playwright runs, nothing else in the process can have an event loop.
    """
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser here: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for the tests of a file, on the built-in base; its workplace holds an eraser, `no-cat`.

    It ends with them: one that waits takes a tenth of a core.
    """
    folder = tmp_path_factory.mktemp("workplace")
    recipe = load_recipe("instant", {"train.preview_every": 0}, base="emoji", concepts=["a cat"])
    train(recipe, out=folder / "no-cat", progress=False)
    running = start_server(folder)
    yield running
    end_server(running)


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[Callable[..., Page]]:
    """Open the page as a user of one's own: `open_page("Erase", width=400)`; `watch` sees its requests.

    What a test leaves open is closed.
    """
    contexts: list[BrowserContext] = []

    def open_one(
        tab: str, *, width: int = 1280, address: str | None = None, watch: Callable[[Request], object] | None = None
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        if watch:
            page.on("request", watch)
        page.goto(address or server.address)
        choose_tab(page, tab)
        return page

    expect.set_options(timeout=PATIENCE)
    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def two_erasers(server: Server) -> list[str]:
    """Names of two erasers in the workplace."""
    recipe = load_recipe("instant", {"train.preview_every": 0}, base="emoji", concepts=["a pizza"])
    train(recipe, out=server.folder / "page-pizza", progress=False)
    return ["no-cat", "page-pizza"]
