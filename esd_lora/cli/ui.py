"""`esd-lora ui`: the page to work on."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from esd_lora.built_in import BUILT_IN
from esd_lora.cli.completing import complete_bases
from esd_lora.cli.printing import say
from esd_lora.settings import variable


@click.command()
@click.option(
    "--base",
    default=BUILT_IN[0],
    show_default=True,
    envvar=variable("base"),
    shell_complete=complete_bases,
    help="Base that the page begins with, as for train.",
)
@click.option(
    "--dir",
    "folder",
    default=".",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder where erasers are made and found.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port; the first free one from 7860 on unless given.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --password.")
@click.option("--user", default="user", show_default=True, help="Name to log in with, where there is a password.")
@click.option("--password", envvar="ESD_LORA_PASSWORD", help="Password to log in with; or in ESD_LORA_PASSWORD.")
@click.option("--open/--no-open", "browser", default=True, help="Whether to open the page in a browser.")
def ui(base: str, folder: Path, port: int | None, host: str, user: str, password: str | None, browser: bool) -> None:
    """Open a page in the browser to try, make, stack and measure erasers; nothing leaves this machine.

    \b
    esd-lora ui
    esd-lora ui --base my-model.safetensors --dir erasers --port 8000 --no-open
    ESD_LORA_PASSWORD=... esd-lora ui --host 0.0.0.0 --user ada
    """
    from esd_lora.ui.workplace import Workplace, require_gradio

    require_gradio()
    if sys.stderr.isatty():
        say("ui: loading ...", err=True)
    from esd_lora.ui.app import serving, wait_for_end

    workplace = Workplace(folder, base)
    login = (user, password) if password else None
    with serving(workplace, host=host, port=port, login=login, browser=browser) as address:
        say(f"the page is at {address} (Ctrl-C ends it); erasers in {workplace.folder}")
        wait_for_end()
    for job in workplace.jobs.all():
        if not job.over:
            say(f"job {job.id} goes on: {job.title}; esd-lora ui in this folder shows it again")
