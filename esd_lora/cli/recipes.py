"""`esd-lora recipes`: what ships, and what a recipe of one's own lacks."""

from __future__ import annotations

from pathlib import Path

import click

from esd_lora.cli.options import force_option, overrides
from esd_lora.errors import EsdLoraError
from esd_lora.recipe_files import dump_recipe, kind_of, load_recipe, recipe_names, recipe_path, recipe_schema


@click.group()
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
