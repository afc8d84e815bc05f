"""A server of the page, started and ended as a user does."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from playwright.sync_api import Page, expect


class Server(NamedTuple):
    """A server of the page."""

    address: str
    folder: Path
    """Its workplace."""
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.address.rstrip("/").rpartition(":")[2])


def start_server(folder: Path, *options: str) -> Server:
    """Start `esd-lora ui` on a free port, and return once it says where the page is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "esd_lora", "ui", "--no-open", "--port", str(port), "--dir", str(folder), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if address := re.search(r"the page is at (\S+)", line):
            return Server(address[1], folder, process)
    raise AssertionError("".join(lines))


def refused_server(folder: Path, port: int) -> str:
    """Return what a second server on a port ends with."""
    command = [sys.executable, "-m", "esd_lora", "ui", "--no-open", "--port", str(port), "--dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr


def end_server(server: Server) -> str:
    """End a server as Ctrl-C does, and return what it printed after its address."""
    server.process.send_signal(signal.SIGINT)
    printed, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, printed
    return printed


def choose_tab(page: Page, tab: str) -> None:
    """Choose a tab; those that a narrow page has no room for are in a menu."""
    button = page.get_by_role("tab", name=tab, exact=True)
    button.wait_for(state="attached")
    if not button.is_visible():
        page.get_by_role("button", name="More tabs").click()
    button.click()


def choose(page: Page, label: str, *names: str) -> None:
    """Choose options of an input that takes one or several."""
    page.get_by_label(label).click()
    for name in names:
        page.get_by_role("option", name=name, exact=True).click()
    page.keyboard.press("Escape")


def job_ends(page: Page, title: str) -> None:
    """Wait until the page says that a job is done."""
    expect(page.get_by_text(f"{title}: Done")).to_be_visible()
