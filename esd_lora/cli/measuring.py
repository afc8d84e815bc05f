"""`esd-lora evaluate`: is it gone, and what else did it cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esd_lora.cli.commands import HeavyCommand
from esd_lora.cli.options import (
    ERASER,
    Weighted,
    allow_code_option,
    base_option,
    choose_out,
    concept_option,
    device_options,
    dry_run_option,
    force_option,
    is_configured,
    names_of,
    out_option,
    overrides,
    paths_of,
    unweighted,
)
from esd_lora.cli.printing import estimated, going_on_in, say
from esd_lora.cli.results import Estimated, Evaluated
from esd_lora.errors import EsdLoraError
from esd_lora.preflight import check
from esd_lora.ranks import is_main

if TYPE_CHECKING:
    from esd_lora.bases.base import Base
    from esd_lora.erasers.stacking import Strength
    from esd_lora.evaluation.report.report import Report
    from esd_lora.evaluation.suites.suite_files import Suite


@click.command(cls=HeavyCommand)
@click.argument("erasers", nargs=-1, type=ERASER)
@base_option()
@click.option("--suite", required=True, metavar="SUITE", help="emoji-object, emoji-style, nudity, objects, ... or a YAML file.")
@out_option("Directory; the same command goes on in it", "measured/ERASERS-SUITE-...")
@click.option("--prompts", metavar="FILE", help="CSV or text file of the suite's first prompt set that takes one.")
@click.option(
    "-s", "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override the suite: detectors.clip.path=DIR."
)
@allow_code_option
@click.option("--against", metavar="LIST", help="Compare with negative-prompt, sld, safety-checker, ... or another base.")
@click.option("--stack", is_flag=True, help="Measure each eraser alone, too, and what is kept as their number grows.")
@concept_option("What counts as erased; default: the headers say.")
@click.option("--limit", type=click.IntRange(min=1), help="Most pictures of each prompt set, evenly spaced among all.")
@click.option("--score-only", "pictures", metavar="DIR", help="Measure pictures made elsewhere: DIR/MODEL/CASE.png.")
@click.option("--fail-if", "gates", multiple=True, metavar="GATE", help="Exit with 1 if so: 'erased.accuracy>0.05'.")
@click.option("--attach", is_flag=True, help="Write the numbers into the eraser's header and model card.")
@device_options
@dry_run_option
@force_option
def evaluate(
    erasers: tuple[Weighted, ...],
    base: str | None,
    base_config: str | None,
    suite: str,
    out: Path | None,
    prompts: str | None,
    settings: tuple[str, ...],
    allow_code: tuple[str, ...],
    against: str | None,
    stack: bool,
    concepts: tuple[str, ...],
    limit: int | None,
    pictures: str | None,
    gates: tuple[str, ...],
    attach: bool,
    device: str,
    dtype: str | None,
    dry_run: bool,
    force: bool,
) -> Evaluated | Estimated | None:
    """Measure ERASERS on a base: paint, score, count, and show it on a page.

    \b
    esd-lora evaluate no-cat --base emoji --suite emoji-object -o measured
    esd-lora evaluate no-nudity --base sd15 --suite nudity --prompts unsafe-prompts4703.csv -o measured
    esd-lora evaluate --suite nudity --prompts unsafe-prompts4703.csv --score-only pictures --concept nudity -o measured
    """
    base = None if pictures is not None and is_configured("base") else base
    out = _choose(out, names_of(*paths_of(*erasers), suite))
    check(out, True, base, erasers, read=(suite, prompts))  # an evaluation that lies there may be gone on with
    from esd_lora.bases.loading import load_base
    from esd_lora.evaluation import evaluating
    from esd_lora.evaluation.suites.suite_files import load_suite

    paths, weights = unweighted(erasers)
    _check_options(paths, weights, base, against, pictures, attach, dry_run)
    loaded = load_suite(suite, overrides(settings), prompts, allow_code=allow_code)
    options: dict[str, Any] = {"concepts": concepts, "limit": limit, "fail_if": gates, "force": force, "allow_code": allow_code}
    if base is None:
        report = evaluating.score_pictures(str(pictures), loaded, out, **options)
    else:
        alone = not (dry_run or against or loaded.attacks)
        model = load_base(base, device=device, dtype=dtype, config=base_config, text_first=alone)
        options |= {"erasers": paths, "weights": weights, "stack": stack, "against": _kinds(against)}
        if dry_run:
            return _estimate(model, loaded, out, options)
        with going_on_in(out):
            report = evaluating.evaluate(model, loaded, out, **options)
    if attach and is_main():
        _attach(paths[0], report, loaded, out)
    return _show(report, out) if is_main() else None


def _kinds(against: str | None) -> list[str]:
    """Return what `--against` names."""
    return [kind.strip() for kind in against.split(",")] if against else []


def _attach(eraser: str, report: Report, suite: Suite, out: Path) -> None:
    """Write the numbers into the eraser, with pictures where people may see them."""
    from esd_lora.evaluation.report.attaching import attach as write_into

    write_into(eraser, report, None if suite.sensitive else out)


def _choose(out: Path | None, name: str) -> Path:
    """Return the directory: the given one, or one that is the same for the same command, and goes on there."""
    named = {key: value for key, value in click.get_current_context().params.items() if key not in _NOT_MEASURED}
    digest = hashlib.sha256(repr(sorted(named.items())).encode()).hexdigest()[:6]
    return choose_out(out, "measured", f"{name} {digest}", again=True)


_NOT_MEASURED = ("out", "force", "dry_run", "attach", "gates", "allow_code")
"""Parameters of `evaluate` on which no picture depends."""


def _show(report: Report, out: Path) -> Evaluated:
    """Print what came out in a few lines, and where all of it is; return it."""
    from esd_lora.evaluation.report.brief import brief, not_run

    for line in brief(report):
        say(line.text, colour={"better": "green", "worse": "red"}.get(line.change))
    say(*not_run(report), err=True)
    page = out / "report.html"
    say(f"look at {page}; every number is in {out / 'table.md'}")
    return {"out": str(out), "page": str(page), "summary": json.loads(report.to_json())}


def _estimate(base: Base, suite: Suite, out: Path, options: dict[str, Any]) -> Estimated:
    """Print what an evaluation would take, and what it would write."""
    from esd_lora.estimates.pictures import estimate_evaluation
    from esd_lora.evaluation.preparing import prepare_evaluation

    del options["force"]
    prepared = prepare_evaluation(base, suite, out, **options)
    estimate = estimate_evaluation(prepared, options["allow_code"])
    models = ", ".join(variant.name for variant in prepared.variants)
    written = f"would be written into {out}: {estimate.most.pictures} pictures of {models}; scores, table.md, report.html"
    return estimated(estimate, out, written)


def _check_options(
    paths: Sequence[str],
    weights: Sequence[Strength],
    base: str | None,
    against: str | None,
    pictures: str | None,
    attach: bool,
    dry_run: bool,
) -> None:
    """Refuse options that do not go together, before an hour of painting.

    Raises:
        EsdLoraError: With what to leave out or to give.
    """
    if dry_run and pictures is not None:
        raise EsdLoraError("--dry-run says what painting takes, and --score-only paints nothing: leave either out.")
    if attach and len(paths) != 1:
        raise EsdLoraError(f"--attach writes into one eraser, and {len(paths)} are given. Stack them first, or leave it out.")
    if attach:
        from esd_lora.evaluation.report.attaching import require_attachable

        require_attachable(paths[0], weights[0])
    if pictures is not None and (paths or base or against):
        raise EsdLoraError("--score-only measures pictures as they are: leave out erasers, --base and --against.")
    if pictures is None and base is None:
        raise EsdLoraError("there is nothing to paint with: give --base, or --score-only with pictures made elsewhere.")
