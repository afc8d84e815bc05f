"""`esd-lora requests`: what is to be erased, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import click

from esd_lora.cli.options import say
from esd_lora.errors import EsdLoraError
from esd_lora.fleet.registry import Decision, Registry
from esd_lora.fleet.request import Request, Status
from esd_lora.fleet.requests import read_requests

registry_option = click.option(
    "-r", "--registry", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the registry."
)
who_option = click.option(
    "--who", envvar=["USER", "USERNAME"], default="unknown", help="Whom the log names for the change; your account by default."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print requests as JSON.")


@click.group()
def requests() -> None:
    """Keep a list of what is to be erased: add requests, decide on them, withdraw them, see which are overdue."""


@requests.command("add")
@click.argument("file", type=click.Path(path_type=Path))
@registry_option
@who_option
def requests_add(file: Path, registry: Path, who: str) -> None:
    """Add the requests of FILE, a CSV or JSON Lines; all of them or, if anything is wrong with one, none."""
    read = read_requests(file)
    new = Registry.open(registry, who, new=True).add(read, file)
    say(f"added: {len(new)}; there already: {len(read) - len(new)}; registry: {registry}")


@requests.command("list")
@registry_option
@click.option("--status", "statuses", type=click.Choice(get_args(Status)), multiple=True, help="Only these; repeatable.")
@json_option
def requests_list(registry: Path, statuses: tuple[str, ...], as_json: bool) -> None:
    """List requests as they stand."""
    everyone = Registry.open(registry).requests()
    _print([request for request in everyone if not statuses or request.status in statuses], as_json)


@requests.command("decide")
@click.argument("id")
@registry_option
@click.option("--open", "decision", flag_value="open", help="Have it erased.")
@click.option("--refuse", "decision", flag_value="refused", help="Do not; takes a --reason.")
@click.option("--reason", default="", metavar="TEXT", help="Why.")
@click.option("--concept", metavar="TEXT", help="What is meant, in the place of its concept.")
@click.option("--anchor", metavar="TEXT", help="What should appear instead, in the place of its anchor.")
@click.option("--synonym", "synonyms", metavar="TEXT", multiple=True, help="In the place of its synonyms; repeatable.")
@who_option
def requests_decide(
    id: str, registry: Path, decision: Decision | None, reason: str, synonyms: tuple[str, ...], who: str, **names: Any
) -> None:
    """Decide on an ambiguous or open request: what exactly is meant, or that it is refused."""
    if decision is None:
        raise EsdLoraError("nothing is decided: give --open or --refuse.")
    decided = Registry.open(registry, who).decide(id, decision, reason, synonyms=synonyms or None, **names)
    _print([decided], as_json=False)


@requests.command("withdraw")
@click.argument("id")
@registry_option
@click.option("--reason", default="", metavar="TEXT", help="Why.")
@who_option
def requests_withdraw(id: str, registry: Path, reason: str, who: str) -> None:
    """Withdraw a request. It stays in the log."""
    _print([Registry.open(registry, who).withdraw(id, reason)], as_json=False)


@requests.command("overdue")
@registry_option
@click.option(
    "--on", type=click.DateTime(["%Y-%m-%d"]), metavar="DATE", help="The day to look from: 2026-11-30; today by default."
)
@click.option("--fail", is_flag=True, help="Exit with 1 if any is.")
@json_option
def requests_overdue(registry: Path, on: datetime | None, fail: bool, as_json: bool) -> None:
    """List open and ambiguous requests whose day has passed, the longest overdue first."""
    today = on.date() if on else datetime.now(UTC).date()
    late = Registry.open(registry).overdue(today)
    if late or as_json:
        _print(late, as_json)
    else:
        say(f"nothing is overdue on {today}")
    if late and fail:
        raise click.exceptions.Exit(1)


def _print(requests: Iterable[Request], as_json: bool) -> None:
    """Print requests, one a line, or as a list in JSON."""
    if as_json:
        say(*json.dumps([request.record() for request in requests], indent=2, ensure_ascii=False).split("\n"))
        return
    for request in requests:
        due = f"due {request.due}" if request.due else ""
        say(f"{request.id:<24} {request.status:<10} {request.kind:<10} {due:<15} {request.concept}")
