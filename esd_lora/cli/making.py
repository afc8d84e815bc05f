"""`esd-lora train`, `generate` and `demo`: making erasers, and pictures with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from esd_lora.cli.options import ERASER, Weighted, base_option, device_options, force_option, numbers, overrides, unweighted
from esd_lora.errors import EsdLoraError
from esd_lora.recipe_files import load_recipe


@click.command()
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...")
@click.option("--concept", "concepts", multiple=True, metavar="TEXT", help="What to erase; may be given several times.")
@click.option("--anchor", metavar="TEXT", help="What should appear instead; default: nothing in particular.")
@click.option("--erase-from", metavar="TEXT", help="Prompt to erase the concept from: a hat from 'cowboy'.")
@base_option()
@click.option("--scope", help="Layers that get an adapter: xattn, xattn-kv, selfattn, noxattn, full, re:REGEX.")
@click.option("--negative-guidance", type=float, metavar="X", help="eta in the convention of ESD's 2025 scripts: eta + 1.")
@click.option("-s", "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a recipe field: train.lr=1e-4.")
@device_options
@click.option("--track", multiple=True, metavar="TRACKER", help="Report to tensorboard, wandb or trackio.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory for the eraser.")
@click.option("--kohya", is_flag=True, help="Also write kohya/NAME.safetensors there, for A1111, Forge and ComfyUI.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the output directory.")
@force_option
def train(
    recipes: tuple[str, ...],
    concepts: tuple[str, ...],
    anchor: str | None,
    erase_from: str | None,
    base: str | None,
    base_config: str | None,
    scope: str | None,
    negative_guidance: float | None,
    settings: tuple[str, ...],
    device: str,
    dtype: str | None,
    track: tuple[str, ...],
    out: Path,
    kohya: bool,
    resume: bool,
    force: bool,
) -> None:
    """Train an eraser from RECIPE: built-in names or YAML files, each over those before it; default: fast.

    \b
    esd-lora train --concept "a cat" -o no-cat
    esd-lora train emoji-twemoji -s train.steps=300 -o no-twemoji
    esd-lora train sdxl/fast concepts/van-gogh -o no-van-gogh
    """
    if not concepts and (not recipes or anchor is not None or erase_from is not None):
        raise EsdLoraError("nothing to erase: give a RECIPE or --concept TEXT; --anchor and --erase-from go with --concept.")
    fields: dict[str, Any] = {"base": base, "base_config": base_config, "scope": scope}
    fields = {key: value for key, value in fields.items() if value}
    if concepts:
        fields["concepts"] = [{"name": name, "anchor": anchor, "erase_from": erase_from} for name in concepts]
    if negative_guidance is not None:
        # concept - g (concept - null) is anchor - (g - 1) (concept - null) for the empty anchor; erase_from is its own anchor.
        fields["eta"] = negative_guidance - (erase_from is None)
        measured = "the concept" if erase_from is None else "the prompt it is erased from"
        click.echo(f"negative guidance {negative_guidance:g}, measured from {measured}, is eta {fields['eta']:g}")
    loaded = load_recipe(recipes or "fast", overrides(settings), **fields)
    from esd_lora.training import train as run

    try:
        eraser = run(loaded, out=out, resume=resume, force=force, device=device, dtype=dtype, track=track)
    except KeyboardInterrupt:
        raise EsdLoraError(f"interrupted; go on with the same command and --resume (checkpoint in {out}).") from None
    if kohya:
        from esd_lora.formats.exporting import export
        from esd_lora.wording import slug

        # In a folder of its own: load_lora_weights takes a directory with one file in it.
        file = export(eraser, out / "kohya" / f"{slug('no ' + ' '.join(eraser.names))}.safetensors", layout="kohya", force=True)
        click.echo(f"kohya LoRA: {file}")
    cost = eraser.header.cost
    click.echo(
        f"erased {', '.join(eraser.names)} in {cost['seconds']:.0f} s, {cost['steps']:.0f} steps,"
        f" {cost['sample_evaluations']:.0f} sample evaluations: {out}"
    )


@click.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@base_option("emoji")
@click.option("--eraser", "erasers", multiple=True, type=ERASER, help="Eraser to apply; may be given several times.")
@click.option("--compare", is_flag=True, help="Also write comparison.png: base above, erased below.")
@click.option("--strengths", metavar="LIST", help="Also write strengths.png, a row for each: 0,0.5,1,1.5.")
@click.option("--gate", is_flag=True, help="Have each eraser on for prompts near its concepts alone; writes gates.json.")
@click.option("--gate-threshold", type=float, metavar="X", help="Similarity up to which --gate keeps an eraser off: 0.95.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the first picture.")
@click.option("-n", "count", default=1, show_default=True, type=click.IntRange(min=1), help="Pictures a prompt.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps.")
@click.option("--guidance", type=float, help="Classifier-free guidance scale.")
@device_options
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory for the pictures.")
@force_option
def generate(
    prompts: tuple[str, ...],
    base: str,
    base_config: str | None,
    erasers: tuple[Weighted, ...],
    compare: bool,
    strengths: str | None,
    gate: bool,
    gate_threshold: float | None,
    seed: int,
    count: int,
    steps: int | None,
    guidance: float | None,
    device: str,
    dtype: str | None,
    out: Path,
    force: bool,
) -> None:
    """Generate pictures of PROMPTs, with erasers on.

    \b
    esd-lora generate "a cat" "a dog" --eraser no-cat:0.8 --compare -o pictures
    esd-lora generate "a cat" --eraser no-cat:1,mid=0 --strengths=-1,0,0.5,1,1.5 -o pictures
    esd-lora generate "a cat" "a dog" --eraser no-cat --eraser no-car --gate -o pictures
    """
    from esd_lora.bases.loading import load_base
    from esd_lora.erasers.manifests import load_eraser
    from esd_lora.files import prepare_directory, write_atomically
    from esd_lora.gating import THRESHOLD, Gate
    from esd_lora.pictures import grid
    from esd_lora.sampling import sweep

    paths, weights = unweighted(erasers)
    loaded = [load_eraser(path) for path in paths]
    if strengths is not None and not loaded:
        raise EsdLoraError("--strengths needs an --eraser whose strength to change.")
    if (gate or gate_threshold is not None) and not loaded:
        raise EsdLoraError("--gate needs an --eraser to switch by prompt.")
    rows = numbers("--strengths", strengths) if strengths is not None else []
    seeds = range(seed, seed + count)
    names = [f"{i:03d}_seed{s}.png" for i in range(len(prompts)) for s in seeds]
    model = load_base(base, device=device, dtype=dtype, config=base_config)
    opened = Gate(model, loaded, threshold=gate_threshold or THRESHOLD) if gate or gate_threshold is not None else None
    prepare_directory(out, force, [*names, "comparison.png", "strengths.png", "gates.json"])
    if opened:
        write_atomically(out / "gates.json", json.dumps(opened.record(prompts), indent=1, ensure_ascii=False).encode())
    asked: dict[str, Any] = {"seeds": seeds, "steps": steps, "guidance": guidance}
    wanted = [1.0, *rows, *([0.0] if compare else [])]
    found = sweep(model, prompts, wanted, erasers=loaded, weights=weights, gate=opened, **asked)
    for picture, name in zip(found[1.0], names, strict=True):
        picture.save(out / name)
    columns = [prompt for prompt in prompts for _ in seeds]
    if compare:
        grid({"base": found[0.0], "erased": found[1.0]}, columns).save(out / "comparison.png")
    if rows:
        labels = {0.0: "0 (base)"} | {value: f"{value:g} (amplified)" for value in rows if value < 0}
        grid({labels.get(value, f"{value:g}"): found[value] for value in rows}, columns).save(out / "strengths.png")
    sheets = ["comparison.png"] * compare + ["strengths.png"] * bool(rows)
    click.echo(f"{len(names)} pictures in {out}" + (f", {' and '.join(sheets)} among them" if sheets else ""))


@click.command()
@click.option(
    "-o", "--out", default="out/demo", show_default=True, type=click.Path(path_type=Path), help="Directory for everything."
)
@force_option
def demo(out: Path, force: bool) -> None:
    """Erase an object and a style on the built-in base, stack, merge, and measure what happened."""
    from esd_lora.demo import demo as run

    click.echo(run(out, force=force))
