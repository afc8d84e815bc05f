"""The command line: parses, calls one public function, prints where the result is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from esd_lora import __version__
from esd_lora.errors import EsdLoraError
from esd_lora.recipe_files import dump_recipe, kind_of, load_recipe, recipe_names, recipe_path, recipe_schema
from esd_lora.shell import ERASER, Commands, Weighted, base_option, device_options, force_option, overrides


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="esd-lora")
def main() -> None:
    """Erase concepts from text-to-image diffusion models with small LoRA files."""


@main.command()
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
    cost = eraser.header.cost
    click.echo(
        f"erased {', '.join(eraser.names)} in {cost['seconds']:.0f} s, {cost['steps']:.0f} steps,"
        f" {cost['sample_evaluations']:.0f} sample evaluations: {out}"
    )


@main.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@base_option("emoji")
@click.option("--eraser", "erasers", multiple=True, type=ERASER, help="Eraser to apply; may be given several times.")
@click.option("--compare", is_flag=True, help="Also write comparison.png: base above, erased below.")
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
    seed: int,
    count: int,
    steps: int | None,
    guidance: float | None,
    device: str,
    dtype: str | None,
    out: Path,
    force: bool,
) -> None:
    """Generate pictures of PROMPTs, with erasers on."""
    from esd_lora.eraser import Eraser, clear_output
    from esd_lora.families import load_base
    from esd_lora.pictures import grid
    from esd_lora.sampling import generate as run

    loaded, weights = [Eraser.load(path) for path, _ in erasers], [weight for _, weight in erasers]
    seeds = range(seed, seed + count)
    names = [f"{i:03d}_seed{s}.png" for i in range(len(prompts)) for s in seeds]
    model = load_base(base, device=device, dtype=dtype, config=base_config)
    clear_output(out, force, [*names, "comparison.png"])
    asked: dict[str, Any] = {"seeds": seeds, "steps": steps, "guidance": guidance}
    pictures = run(model, prompts, erasers=loaded, weights=weights, **asked)
    for picture, name in zip(pictures, names, strict=True):
        picture.save(out / name)
    if compare:
        rows = {"base": run(model, prompts, **asked), "erased": pictures}
        grid(rows, [prompt for prompt in prompts for _ in seeds]).save(out / "comparison.png")
    click.echo(f"{len(pictures)} pictures in {out}" + (", comparison.png among them" if compare else ""))


@main.command()
@click.argument("erasers", nargs=-1, required=True, type=ERASER)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory for the stack.")
@force_option
def stack(erasers: tuple[Weighted, ...], out: Path, force: bool) -> None:
    """Stack erasers into one, exactly: rank concatenation, weights folded in."""
    from esd_lora.eraser import RUN_FILES, Eraser, clear_output
    from esd_lora.stacking import stack as run

    stacked = run([Eraser.load(path) for path, _ in erasers], [weight for _, weight in erasers])
    clear_output(out, force, RUN_FILES)
    stacked.save(out)
    click.echo(f"stack of {', '.join(stacked.names)}: {out}")


@main.command()
@click.argument("erasers", nargs=-1, required=True, type=ERASER)
@click.option("--base", required=True, help="Built-in base, diffusers directory or Hub id.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Diffusers directory to make.")
@force_option
def merge(erasers: tuple[Weighted, ...], base: str, out: Path, force: bool) -> None:
    """Merge erasers into a base for good, as a new diffusers directory."""
    from esd_lora.merging import merge as run

    run([path for path, _ in erasers], base, out, weights=[weight for _, weight in erasers], force=force)
    click.echo(f"merged pipeline: {out}")


@main.command()
@click.argument("eraser", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the whole header as JSON.")
def inspect(eraser: str, as_json: bool) -> None:
    """Show what an eraser removes and where it came from."""
    from esd_lora.cards import describe
    from esd_lora.eraser import Eraser

    loaded = Eraser.load(eraser)
    if as_json:
        click.echo(json.dumps(loaded.header.model_dump(mode="json"), indent=2))
        return
    for name, value in describe(loaded).items():
        click.echo(f"{name:>10}  {value}")


@main.group()
def recipes() -> None:
    """List, show, copy and check recipes."""


@recipes.command("list")
def recipes_list() -> None:
    """List the built-in recipes."""
    width = max(map(len, recipe_names())) + 2
    for name in recipe_names():
        first = recipe_path(name).read_text("utf-8").splitlines()[0]
        click.echo(f"{name:<{width}}{first.lstrip('# ')}")


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Print a recipe as it stands in its file."""
    click.echo(recipe_path(name).read_text("utf-8"), nl=False)


@recipes.command("copy")
@click.argument("name")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write; NAME.yaml here by default.")
@force_option
def recipes_copy(name: str, out: Path | None, force: bool) -> None:
    """Copy a built-in recipe to a file of your own."""
    source = recipe_path(name)
    out = out or Path(f"{source.stem}.yaml")
    if out.exists() and not force:
        raise EsdLoraError(f"{out} already exists. Choose another with -o, or add --force.")
    if not out.parent.is_dir():
        raise EsdLoraError(f"no directory {out.parent} to copy {out} into. Make it first.")
    out.write_text(source.read_text("utf-8"), "utf-8")
    click.echo(f"recipe: {out}")


@recipes.command("check")
@click.argument("names", nargs=-1, required=True, metavar="RECIPE...")
@click.option("-s", "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a recipe field.")
@click.option("--resolved", is_flag=True, help="Print the recipe with everything it extends.")
def recipes_check(names: tuple[str, ...], settings: tuple[str, ...], resolved: bool) -> None:
    """Check recipes and report every fault with its line."""
    for name in names:
        kind = kind_of(name)
        sources = ["fast", name] if kind == "concept" else [name]
        recipe = load_recipe(sources, overrides(settings), **({"concepts": ["CONCEPT"]} if kind == "preset" else {}))
        use = {"preset": "a preset, give it a --concept", "concept": "a concept, give it a preset"}
        erased = use.get(kind, f"erases {', '.join(concept.name for concept in recipe.concepts)}")
        click.echo(dump_recipe(recipe) if resolved else f"{name}: good, {erased}")


@recipes.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipe files, for editors that check YAML."""
    click.echo(recipe_schema(), nl=False)


@main.command()
@click.option(
    "-o", "--out", default="out/demo", show_default=True, type=click.Path(path_type=Path), help="Directory for everything."
)
@force_option
def demo(out: Path, force: bool) -> None:
    """Erase an object and a style on the built-in base, stack, merge, and measure what happened."""
    from esd_lora.demo import demo as run

    click.echo(run(out, force=force))
