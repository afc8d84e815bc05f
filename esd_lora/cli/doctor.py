"""`esd-lora doctor`: what this machine lacks."""

from __future__ import annotations

import json

import click

from esd_lora.cli.options import HeavyCommand, say


@click.command(cls=HeavyCommand)
@click.option("--card", metavar="SIZE", help="Also say how published models train on a card of SIZE: 12GB.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(card: str | None, as_json: bool) -> None:
    """Look at packages, devices, memory, disk and the Hub; say what is wrong and what to do about it. Exit code 1 if it is."""
    from esd_lora.doctor import Finding, examine
    from esd_lora.memory_plans import read_size

    findings: list[Finding] = []
    for finding in examine(read_size(card) if card else None):
        findings.append(finding)
        if not as_json:
            say(finding.line())
    if as_json:
        say(*json.dumps([finding.as_json() for finding in findings], indent=2).split("\n"))
    if not all(finding.ok for finding in findings):
        raise click.exceptions.Exit(1)
