"""`esd-lora fleet`: an eraser for every request of a list."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esd_lora.cli.options import HeavyCommand, base_option, device_options, dry_run_option, overrides, say
from esd_lora.errors import EsdLoraError

if TYPE_CHECKING:
    from esd_lora.fleet.running import MakeEngine
    from esd_lora.fleet.status import Status


def _pairs(_ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return `KIND=NAME` options as a mapping."""
    if not all("=" in value for value in values):
        raise EsdLoraError(f"--{param.name}: expected KIND=NAME, such as style=emoji-style.")
    return dict(value.split("=", 1) for value in values)


@click.command(cls=HeavyCommand)
@click.argument("requests", type=click.Path(exists=True, path_type=Path))
@base_option()
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder; the same command goes on in it.")
@click.option("--recipe", "recipes", multiple=True, metavar="RECIPE", help="How to train; chosen by the base unless given.")
@click.option("-s", "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a recipe field: train.lr=1e-4.")
@click.option(
    "--suite", "suites", multiple=True, metavar="KIND=SUITE", callback=_pairs, help="What measures a kind; none: KIND=."
)
@click.option("--pictures", type=click.IntRange(min=1), help="Most pictures of each prompt set of a suite.")
@click.option("--second", multiple=True, metavar="RECIPE", help="Train once more by this where --not-enough-if holds.")
@click.option("--not-enough-if", multiple=True, metavar="GATE", help="'erased.accuracy>0.05', as evaluate --fail-if.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Who works.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="How many, each with the base loaded."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of a worker; an equal share unless given.")
@click.option("--address", help="Ray cluster; a local one is begun unless given.")
@click.option("--gpus", type=float, default=0.0, help="GPUs of a worker on Ray, 0.5 for two on one.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds after which a worker is ended.")
@click.option("--attempts", type=click.IntRange(min=1), default=3, show_default=True, help="How often a request is tried.")
@click.option("--shard", default="0/1", metavar="I/N", help="This part of the list alone: 0/4 to 3/4, on as many machines.")
@click.option("--only", multiple=True, metavar="ID", help="These requests alone.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many, those that are due first.")
@click.option("--retry-failed", is_flag=True, help="Try again what failed or was refused.")
@click.option("--hourly", type=click.FloatRange(min=0), help="Price of an hour of a worker, for --dry-run.")
@device_options
@dry_run_option
def fleet(requests: Path, out: Path, dry_run: bool, hourly: float | None, attempts: int, **options: Any) -> None:
    """Make and measure an eraser for every open request of REQUESTS: a CSV, JSON Lines, or the folder of a registry.

    \b
    esd-lora fleet requests.csv --base emoji -o fleet --workers 2
    esd-lora fleet requests.csv --base sd15 -o fleet --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
    esd-lora fleet requests.csv --base sdxl -o fleet --engine ray --address auto --workers 64 --gpus 0.5
    """
    from esd_lora.fleet.jobs import Plan
    from esd_lora.fleet.requests import read_requests
    from esd_lora.fleet.running import Choice, Shard, run_fleet

    listed = read_requests(requests)
    plan = Plan.of(listed, _settings(options))
    choice = Choice(options["only"], Shard.read(options["shard"]), options["limit"], options["retry_failed"])
    if dry_run:
        from esd_lora.estimates.fleet import estimate_fleet

        say(*estimate_fleet(listed, plan, out, choice, workers=options["workers"], hourly=hourly))
        return
    try:
        statuses = run_fleet(listed, plan, out, _engine(options), choice=choice, attempts=attempts)
    except KeyboardInterrupt:
        raise EsdLoraError(f"interrupted; the same command goes on in {out}.") from None
    _show(statuses, out)


def _settings(options: dict[str, Any]) -> Any:
    """Return how all requests are trained and measured."""
    from esd_lora.bases.presets import preset_for
    from esd_lora.fleet.jobs import Settings

    base = options["base"]
    if not base:
        raise EsdLoraError("a fleet needs the model to erase from: give --base.")
    return Settings(
        base=base,
        base_config=options["base_config"],
        recipe=options["recipes"] or (preset_for(base),),
        second=options["second"],
        overrides=overrides(options["settings"]),
        suites=options["suites"],
        limit=options["pictures"],
        not_enough_if=options["not_enough_if"],
        device=options["device"],
        dtype=options["dtype"],
        threads=options["threads"] or max(1, (os.cpu_count() or 1) // options["workers"]),
    )


def _engine(options: dict[str, Any]) -> MakeEngine:
    """Return what makes the engine."""
    shared = {"workers": options["workers"], "timeout": options["timeout"]}
    if options["engine"] == "ray":
        from esd_lora.fleet.ray_engine import RayEngine

        return partial(RayEngine, **shared, address=options["address"], gpus=options["gpus"])
    from esd_lora.fleet.engines import LocalEngine

    return partial(LocalEngine, **shared)


def _show(statuses: dict[str, Status], out: Path) -> None:
    """Print how many requests stand how, and what a person has to look at."""
    states = Counter(status.state for status in statuses.values())
    for status in statuses.values():
        if status.state in ("failed", "refused"):
            say(f"{status.id} {status.state}: {status.reason}", err=True)
    say(f"{', '.join(f'{count} {state}' for state, count in states.items()) or 'nothing to do'}: look at {out / 'fleet.html'}")
