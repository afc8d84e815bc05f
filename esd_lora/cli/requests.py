"""`esd-lora requests`: what is to be erased, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esd_lora.cli.commands import Commands, Failed
from esd_lora.cli.printing import say
from esd_lora.cli.results import Requests, RequestsAdded
from esd_lora.errors import EsdLoraError

if TYPE_CHECKING:
    from esd_lora.fleet.registry import Decision, Registry
    from esd_lora.fleet.request import Request

STATUSES = ("open", "ambiguous", "refused", "done", "withdrawn")
"""All of `fleet.request.Status`, which takes pydantic to import: --help shows them."""
registry_option = click.option(
    "-r", "--registry", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the registry."
)
who_option = click.option(
    "--who", envvar=["USER", "USERNAME"], default="unknown", help="Whom the log names for the change; your account by default."
)


@click.group(cls=Commands)
def requests() -> None:
    """Keep a list of what is to be erased: add requests, decide on them, withdraw them, see which are overdue."""


@requests.command("add")
@click.argument("file", type=click.Path(path_type=Path))
@registry_option
@who_option
def requests_add(file: Path, registry: Path, who: str) -> RequestsAdded:
    """Add the requests of FILE, a CSV or JSON Lines; all of them or, if anything is wrong with one, none."""
    from esd_lora.fleet.requests import read_requests

    read = read_requests(file)
    new = _open(registry, who, new=True).add(read, file)
    old = len(read) - len(new)
    say(f"added: {len(new)}; there already: {old}; registry: {registry}")
    return {"added": len(new), "there_already": old, "registry": str(registry)}


@requests.command("list")
@registry_option
@click.option("--status", "statuses", type=click.Choice(STATUSES), multiple=True, help="Only these; repeatable.")
def requests_list(registry: Path, statuses: tuple[str, ...]) -> Requests:
    """List requests as they stand."""
    everyone = _open(registry).requests()
    return _show([request for request in everyone if not statuses or request.status in statuses])


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
) -> Requests:
    """Decide on an ambiguous or open request: what exactly is meant, or that it is refused."""
    if decision is None:
        raise EsdLoraError("nothing is decided: give --open or --refuse.")
    return _show([_open(registry, who).decide(id, decision, reason, synonyms=synonyms or None, **names)])


@requests.command("withdraw")
@click.argument("id")
@registry_option
@click.option("--reason", default="", metavar="TEXT", help="Why.")
@who_option
def requests_withdraw(id: str, registry: Path, reason: str, who: str) -> Requests:
    """Withdraw a request. It stays in the log."""
    return _show([_open(registry, who).withdraw(id, reason)])


@requests.command("overdue")
@registry_option
@click.option(
    "--on", type=click.DateTime(["%Y-%m-%d"]), metavar="DATE", help="The day to look from: 2026-11-30; today by default."
)
@click.option("--fail", is_flag=True, help="Exit with 1 if any is.")
def requests_overdue(registry: Path, on: datetime | None, fail: bool) -> Requests:
    """List open and ambiguous requests whose day has passed, the longest overdue first."""
    today = on.date() if on else datetime.now(UTC).date()
    late = _open(registry).overdue(today)
    listed = _show(late)
    if not late:
        say(f"nothing is overdue on {today}")
    if late and fail:
        raise Failed(listed)
    return listed


def _open(registry: Path, who: str = "unknown", *, new: bool = False) -> Registry:
    """Return the registry of a folder, where `new` one need not be there."""
    from esd_lora.fleet.registry import Registry

    return Registry.open(registry, who, new=new)


def _show(requests: Sequence[Request]) -> Requests:
    """Print requests, one a line, and return them."""
    for request in requests:
        due = f"due {request.due}" if request.due else ""
        say(f"{request.id:<24} {request.status:<10} {request.kind:<10} {due:<15} {request.concept}")
    return {"requests": [request.record() for request in requests]}
