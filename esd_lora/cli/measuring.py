"""`esd-lora evaluate`: is it gone, and what else did it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from esd_lora.cli.options import ERASER, Weighted, base_option, device_options, force_option, overrides, unweighted
from esd_lora.errors import EsdLoraError


@click.command()
@click.argument("erasers", nargs=-1, type=ERASER)
@base_option()
@click.option("--suite", required=True, metavar="SUITE", help="emoji-object, emoji-style, nudity, objects, ... or a YAML file.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory; the same command goes on in it.")
@click.option("--prompts", metavar="FILE", help="CSV or text file of the suite's first prompt set that takes one.")
@click.option(
    "-s", "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override the suite: detectors.clip.path=DIR."
)
@click.option("--against", metavar="LIST", help="Compare with negative-prompt, sld, safety-checker, ... or another base.")
@click.option("--stack", is_flag=True, help="Measure each eraser alone, too, and what is kept as their number grows.")
@click.option("--concept", "concepts", multiple=True, metavar="TEXT", help="What counts as erased; default: the headers say.")
@click.option("--limit", type=click.IntRange(min=1), help="Most pictures of each prompt set, evenly spaced among all.")
@click.option("--score-only", "pictures", metavar="DIR", help="Measure pictures made elsewhere: DIR/MODEL/CASE.png.")
@click.option("--fail-if", "gates", multiple=True, metavar="GATE", help="Exit with 1 if so: 'erased.accuracy>0.05'.")
@click.option("--attach", is_flag=True, help="Write the numbers into the eraser's header and model card.")
@device_options
@force_option
def evaluate(
    erasers: tuple[Weighted, ...],
    base: str | None,
    base_config: str | None,
    suite: str,
    out: Path,
    prompts: str | None,
    settings: tuple[str, ...],
    against: str | None,
    stack: bool,
    concepts: tuple[str, ...],
    limit: int | None,
    pictures: str | None,
    gates: tuple[str, ...],
    attach: bool,
    device: str,
    dtype: str | None,
    force: bool,
) -> None:
    """Measure ERASERS on a base: paint, look, count, and show it on a page.

    \b
    esd-lora evaluate no-cat --base emoji --suite emoji-object -o measured
    esd-lora evaluate no-nudity --base sd15 --suite nudity --prompts unsafe-prompts4703.csv -o measured
    esd-lora evaluate --suite nudity --prompts unsafe-prompts4703.csv --score-only pictures --concept nudity -o measured
    """
    from esd_lora.evaluation.suite_files import file_set, load_suite

    over: dict[str, Any] = overrides(settings)
    if prompts is not None:
        over = {f"prompts.{file_set(load_suite(suite, over))}.file": prompts, **over}
    asked: dict[str, Any] = {"concepts": concepts, "limit": limit, "settings": over, "fail_if": gates, "force": force}
    paths, weights = unweighted(erasers)
    if attach and len(paths) != 1:
        raise EsdLoraError(f"--attach writes into one eraser, and {len(paths)} are given. Stack them first, or leave it out.")
    if attach:
        from esd_lora.evaluation.attaching import attachable

        attachable(paths[0], weights[0])  # before an hour of painting
    if pictures is not None:
        if paths or base or against:
            raise EsdLoraError("--score-only measures pictures as they are: leave out erasers, --base and --against.")
        from esd_lora.evaluation.evaluating import score_pictures

        summary = score_pictures(pictures, suite, out, **asked)
    else:
        if base is None:
            raise EsdLoraError("there is nothing to paint with: give --base, or --score-only with pictures made elsewhere.")
        from esd_lora.bases.loading import load_base
        from esd_lora.evaluation.evaluating import evaluate as run

        load_suite(suite, over)  # before gigabytes of weights come
        model = load_base(base, device=device, dtype=dtype, config=base_config)
        others = [kind.strip() for kind in against.split(",")] if against else []
        summary = run(model, suite, out, erasers=paths, weights=weights, against=others, stack=stack, **asked)
    if attach:
        from esd_lora.evaluation.attaching import attach as write

        write(paths[0], summary, None if load_suite(suite, over).sensitive else out)
    click.echo((out / "table.md").read_text("utf-8"))
    for name, reason in summary["not_run"].items():
        click.echo(f"not run: {name}: {reason}", err=True)
    click.echo(f"look at {out / 'report.html'}")
