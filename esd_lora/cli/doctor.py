"""`esd-lora doctor`: what this machine lacks."""

from __future__ import annotations

import click

from esd_lora.cli.commands import Failed, Verb
from esd_lora.cli.printing import say
from esd_lora.cli.results import Examined


@click.command(cls=Verb)
@click.option("--card", metavar="SIZE", help="Also say how published models train on a card of SIZE: 12GB.")
def doctor(card: str | None) -> Examined:
    """Look at packages, devices, memory, disk and the Hub; say what is wrong and what to do about it. Exit code 1 if it is."""
    from esd_lora.doctor import Finding, examine
    from esd_lora.memory_plans import read_size

    findings: list[Finding] = []
    for finding in examine(read_size(card) if card else None):
        findings.append(finding)
        say(finding.line())
    examined: Examined = {
        "ok": all(finding.ok for finding in findings),
        "findings": [
            {"name": finding.name, "ok": finding.ok, "state": finding.state, "remedy": finding.remedy or None}
            for finding in findings
        ],
    }
    if not examined["ok"]:
        raise Failed(examined)
    return examined
