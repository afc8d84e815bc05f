"""`esd-lora fleet` and `release`: an eraser for every request of a list, and a model without what they name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial as bound
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esd_lora.cli.commands import HeavyCommand
from esd_lora.cli.options import base_option, device_options, dry_run_option, overrides
from esd_lora.cli.printing import going_on_in, say
from esd_lora.cli.results import Estimated, FleetRun, Released
from esd_lora.errors import EsdLoraError

if TYPE_CHECKING:
    from esd_lora.fleet.jobs import Plan, Settings
    from esd_lora.fleet.registry import Registry
    from esd_lora.fleet.request import Request
    from esd_lora.fleet.running import MakeEngine
    from esd_lora.fleet.status import Status


def _pairs(_ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return `KIND=NAME` options as a mapping."""
    if not all("=" in value for value in values):
        raise EsdLoraError(f"--{param.name}: expected KIND=NAME, such as style=emoji-style.")
    return dict(value.split("=", 1) for value in values)


def _fleet_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what `fleet` and `release` share: the base, how it is trained and measured, and who works."""
    options = (
        click.argument("requests", type=click.Path(exists=True, path_type=Path)),
        base_option(),
        click.option(
            "--recipe", "recipes", multiple=True, metavar="RECIPE", help="How to train; chosen by the base unless given."
        ),
        click.option(
            "-s", "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a recipe field: train.lr=1e-4."
        ),
        click.option(
            "--suite",
            "suites",
            multiple=True,
            metavar="KIND=SUITE",
            callback=_pairs,
            help="What measures a kind; KIND= for none.",
        ),
        click.option("--pictures", type=click.IntRange(min=1), help="Most pictures of each prompt set of a suite."),
        click.option("--second", multiple=True, metavar="RECIPE", help="Train once more by this where --not-enough-if holds."),
        click.option("--not-enough-if", multiple=True, metavar="GATE", help="'erased.accuracy>0.05', as evaluate --fail-if."),
        click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Who works."),
        click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Each has a base of its own."),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads of a worker; an equal share unless given."),
        click.option("--address", help="Ray cluster, auto for the one that runs here; a local one is begun unless given."),
        click.option("--gpus", type=float, default=0.0, help="GPUs of a worker on Ray, 0.5 for two on one."),
        click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds after which a worker is ended."),
        click.option("--attempts", type=click.IntRange(min=1), default=3, show_default=True, help="How often one is tried."),
        device_options,
    )
    for option in reversed(options):  # the first stands on top of the help
        command = option(command)
    return command


@click.command(cls=HeavyCommand)
@_fleet_options
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder; the same command goes on in it.")
@click.option("--shard", default="0/1", metavar="I/N", help="This part of the list alone: 0/4 to 3/4, on as many machines.")
@click.option("--only", multiple=True, metavar="ID", help="These requests alone.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many, those that are due first.")
@click.option("--retry-failed", is_flag=True, help="Try again what failed or was refused.")
@click.option("--hourly", type=click.FloatRange(min=0), help="Price of an hour of a worker, for --dry-run.")
@dry_run_option
def fleet(
    requests: Path, out: Path, dry_run: bool, hourly: float | None, attempts: int, **options: Any
) -> FleetRun | Estimated:
    """Make and measure an eraser for every open request of REQUESTS: a CSV, JSON Lines, or the folder of a registry.

    \b
    esd-lora fleet requests.csv --base emoji -o fleet --workers 2
    esd-lora fleet requests.csv --base sd15 -o fleet --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
    esd-lora fleet requests.csv --base sdxl -o fleet --engine ray --address auto --workers 64 --gpus 0.5
    """
    from esd_lora.fleet.running import Choice, Shard, run_fleet

    listed, plan = _plan(requests, options)
    choice = Choice(options["only"], Shard.read(options["shard"]), options["limit"], options["retry_failed"])
    if dry_run:
        from esd_lora.estimates.fleet import estimate_fleet

        lines = estimate_fleet(listed, plan, out, choice, workers=options["workers"], hourly=hourly)
        say(*lines)
        return {"out": str(out), "seconds": None, "memory": None, "lines": lines}
    with going_on_in(out):
        statuses = run_fleet(listed, plan, out, _engine(options), choice=choice, attempts=attempts)
    return _show(statuses, out / f"{choice.shard}.html")


@click.command(cls=HeavyCommand)
@_fleet_options
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder; the next release is made there too.")
@click.option("--harmonise", "steps", type=click.IntRange(min=1), metavar="STEPS", help="Distil the stack, in steps for each.")
@click.option("--gate", "gates", multiple=True, metavar="GATE", help="Release nothing if so: 'erased.accuracy>0.05'.")
@click.option("--partial", is_flag=True, help="Leave out requests that failed or were refused.")
@click.option("--sign", "signed_by", metavar="KEY", help="Sign the manifest with this key of GnuPG.")
def release(
    requests: Path,
    out: Path,
    steps: int | None,
    gates: tuple[str, ...],
    partial: bool,
    signed_by: str | None,
    attempts: int,
    **options: Any,
) -> Released:
    """Make a model without what REQUESTS name: erasers, stack, merge, measurement, card, manifest.

    \b
    esd-lora release requests.csv --base emoji -o release --workers 2
    esd-lora release registry --base sd15 -o release --harmonise 100 --gate "erased.accuracy>0.05" --sign security@example.org
    """
    from esd_lora.fleet.records import CARD_NAME
    from esd_lora.fleet.release import PUBLISHED
    from esd_lora.fleet.release import release as run

    listed, plan = _plan(requests, options)
    how: dict[str, Any] = {"steps": steps, "gates": gates, "partial": partial, "signed_by": signed_by, "attempts": attempts}
    with going_on_in(out):
        record = run(listed, plan, out, _engine(options), registry=_registry(requests), **how)
    card = out / PUBLISHED / CARD_NAME
    say(f"release {record.number}, {len(record.requests)} requests erased: {card}")
    return {
        "number": record.number,
        "requests": list(record.requests),
        "card": str(card),
        "published": str(out / PUBLISHED),
    }


def _plan(requests: Path, options: dict[str, Any]) -> tuple[tuple[Request, ...], Plan]:
    """Return the requests of a file or a registry, and what their jobs have in common."""
    from esd_lora.fleet.jobs import Plan
    from esd_lora.fleet.requests import read_requests

    registry = _registry(requests)
    listed = registry.requests() if registry else read_requests(requests)
    return listed, Plan.of(listed, _settings(options))


def _registry(requests: Path) -> Registry | None:
    """Return the registry of a folder; of a file there is none."""
    from esd_lora.fleet.registry import Registry

    return Registry.open(requests, who="esd-lora release") if requests.is_dir() else None


def _settings(options: dict[str, Any]) -> Settings:
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

        return bound(RayEngine, **shared, address=options["address"], gpus=options["gpus"])
    from esd_lora.fleet.engines import LocalEngine

    return bound(LocalEngine, **shared)


def _show(statuses: dict[str, Status], page: Path) -> FleetRun:
    """Print how many requests stand how, and what a person has to look at; return all of them."""
    states = Counter(status.state for status in statuses.values())
    for status in statuses.values():
        if status.state in ("failed", "refused"):
            say(f"{status.id} {status.state}: {status.reason}", err=True)
    say(f"{', '.join(f'{count} {state}' for state, count in states.items()) or 'nothing to do'}: look at {page}")
    listed = statuses.values()
    return {
        "page": str(page),
        "requests": [{"id": status.id, "state": status.state, "reason": status.reason} for status in listed],
    }
