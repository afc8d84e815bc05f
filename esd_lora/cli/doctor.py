"""`esd-lora doctor`: what this machine lacks."""

from __future__ import annotations

import json

import click

from esd_lora.cli.options import say


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(as_json: bool) -> None:
    """Look at packages, devices, memory, disk and the Hub; say what is wrong and what to do about it. Exit code 1 if it is."""
    from esd_lora.doctor import Finding, examine

    findings: list[Finding] = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            say(finding.line())
    if as_json:
        say(*json.dumps([finding.as_json() for finding in findings], indent=2).split("\n"))
    if not all(finding.ok for finding in findings):
        raise click.exceptions.Exit(1)
