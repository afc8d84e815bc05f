"""The page: its tabs, how it looks, and the server that shows it on this machine."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import gradio
from gradio import themes

from esd_lora.errors import EsdLoraError
from esd_lora.ui.erasing import erase_tab
from esd_lora.ui.markup import PIECES_CSS
from esd_lora.ui.measuring import measure_tab
from esd_lora.ui.requesting import requests_tab
from esd_lora.ui.stacking import stack_tab
from esd_lora.ui.trying import try_tab
from esd_lora.ui.workplace import Workplace

TABS: Mapping[str, Callable[[Workplace], None]] = {
    "Try": try_tab,
    "Erase": erase_tab,
    "Stack and merge": stack_tab,
    "Measure": measure_tab,
    "Requests": requests_tab,
}
"""Title of a tab to the function that fills it."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that no other machine reaches."""
_AT_ONCE = 16  # calls of each handler that does not wait for a model
_CSS = (
    """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.job-bar { height: 0.6rem; border-radius: 0.3rem; background: var(--border-color-primary); overflow: hidden; }
.job-bar > div { height: 100%; background: var(--color-accent); }
.small-pictures img { image-rendering: pixelated; width: 100%; }
.grid-wrap.fixed-height { min-height: 0 !important; }
.gradio-container .row > *, .gradio-container .column > * { min-width: 0; }
.job-state { margin: 0.5rem 0; }
.terminal { background: var(--code-background-fill); padding: 0.6rem; font-size: var(--text-sm); }
.terminal { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto; margin: 0.2rem 0; }
.terminal-label { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
.gradio-container .prose pre, .gradio-container .prose code { white-space: pre-wrap; overflow-wrap: anywhere; }
.gradio-container .prose pre { margin-bottom: 0.8rem; }
.gradio-container .prose table { display: block; overflow-x: auto; }
.figure { margin: 0; }
.figure img { max-width: 100%; height: auto; }
.figure figcaption { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
.job-failed { color: var(--error-text-color); }
"""
    + PIECES_CSS
)


def build(workplace: Workplace, tabs: Mapping[str, Callable[[Workplace], None]] = TABS) -> gradio.Blocks:
    """Return the page.

    Args:
        workplace: What the tabs share.
        tabs: Title of a tab to the function that fills it; of one alone there is no row of tabs.
    """
    with gradio.Blocks(title="esd-lora", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gradio.Markdown(_heading(workplace))
        if len(tabs) == 1:
            for fill in tabs.values():
                fill(workplace)
        else:
            with gradio.Tabs(overflow_behavior="wrap"):
                for title, fill in tabs.items():
                    with gradio.Tab(title, render_children=True):
                        fill(workplace)
    return page


def _heading(workplace: Workplace) -> str:
    """Return what stands above all tabs."""
    if not workplace.open:
        return "# Erasers\nSmall LoRA files that remove concepts from a text-to-image model."
    place = str(workplace.folder).replace("`", "'")
    return f"# esd-lora\nErasers in `{place}`. Nothing leaves this machine; jobs go on when this page or its server is closed."


def look() -> dict[str, Any]:
    """Return what `launch` takes so that a page looks as it should, and fetches nothing from elsewhere."""
    theme = themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "css": _CSS, "footer_links": [], "run_history": False, "ssr_mode": False, "share": False}


@contextmanager
def serving(
    workplace: Workplace,
    *,
    host: str = LOOPBACK[0],
    port: int | None = None,
    login: tuple[str, str] | None = None,
    browser: bool = False,
) -> Generator[str]:
    """Show the page for the length of a `with` block. Jobs go on after that, and a server that is started again finds them.

    Args:
        workplace: What the tabs share; its folder becomes the working directory, from which alone files are shown.
        host: Address to listen on.
        port: The first free one from 7860 on unless given.
        login: Name and password.
        browser: Whether to open the page in a browser.

    Yields:
        The address of the page.

    Raises:
        EsdLoraError: If other machines could reach the page and there is no password, or the port is taken.
    """
    if host not in LOOPBACK:
        if not login:
            raise EsdLoraError(f"--host {host} lets other machines in: give a --password, or leave it out.")
        warnings.warn(f"whoever reaches {host} and knows the password can start jobs on this machine.", stacklevel=3)
    page = build(workplace)
    os.chdir(workplace.folder)
    workplace.jobs.take_up()
    page.queue(default_concurrency_limit=_AT_ONCE)
    launch: dict[str, Any] = {"server_name": host, "server_port": port, "auth": [login] if login else None}
    try:
        page.launch(prevent_thread_lock=True, quiet=True, inbrowser=browser, **launch, **look())
    except OSError as error:
        raise EsdLoraError(
            f"port {port or '7860 to 7959'} on {host} is taken or not to be had. Give another --port."
        ) from error
    try:
        yield str(page.local_url)
    finally:
        page.close(verbose=False)


def wait_for_end() -> None:
    """Wait for Ctrl-C, or for the system's request to end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background programs ignore the first, unless they say otherwise
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
