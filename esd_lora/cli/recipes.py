"""`esd-lora recipes`: what ships, and what a recipe of one's own lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from esd_lora.cli.commands import Commands
from esd_lora.cli.completing import complete_recipes
from esd_lora.cli.options import allow_code_option, force_option, overrides
from esd_lora.cli.printing import say
from esd_lora.cli.results import RecipeChecked, RecipeCopied, RecipeLine, Recipes, RecipesChecked, RecipeText
from esd_lora.files import reserve_file, write_atomically

_HEADINGS = {
    "preset": "presets: how to train; give one a --concept, or a concept after it",
    "concept": "concepts: what to erase; give one after a preset, or name it with a base",
    "recipe": "recipes: both",
    "fuse": "how to fuse a stack",
    "harmonise": "how to harmonise a stack",
}


@click.group(cls=Commands)
def recipes() -> None:
    """List, show, copy and check recipes."""


@recipes.command("list")
def recipes_list() -> Recipes:
    """List the built-in recipes: presets, concepts, complete recipes, and how stacks are made."""
    from esd_lora.recipe_files import recipe_bases, recipe_title, recipes_by_kind

    lines: list[RecipeLine] = []
    for kind, names in recipes_by_kind().items():
        titles = {name: recipe_title(name) for name in names}
        lines += [RecipeLine(name=name, kind=kind, title=title) for name, title in titles.items()]
        if kind == "recipe":
            titles |= {f"{base}/CONCEPT": f"{base}/fast with any of the concepts: {base}/van-gogh" for base in recipe_bases()}
        say(f"{_HEADINGS[kind]}:")
        for name, title in titles.items():
            say(f"  {name:<36}{title}")
    return {"recipes": lines, "bases": recipe_bases()}


@recipes.command("show")
@click.argument("name", shell_complete=complete_recipes)
def recipes_show(name: str) -> RecipeText:
    """Print a recipe as it stands in its file."""
    from esd_lora.recipe_files import recipe_text

    text = recipe_text(name)
    say(*text.rstrip("\n").split("\n"))
    return {"name": name, "text": text}


@recipes.command("copy")
@click.argument("name", shell_complete=complete_recipes)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write; NAME.yaml here by default.")
@force_option
def recipes_copy(name: str, out: Path | None, force: bool) -> RecipeCopied:
    """Copy a built-in recipe to a file of your own."""
    from esd_lora.recipe_files import recipe_text

    text = recipe_text(name)
    out = out or Path(f"{Path(name).stem}.yaml")
    with reserve_file(out, force, [name]):
        write_atomically(out, text.encode())
    say(f"recipe: {out}")
    return {"recipe": str(out)}


@recipes.command("check")
@click.argument("names", nargs=-1, required=True, metavar="RECIPE...", shell_complete=complete_recipes)
@click.option("-s", "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a recipe field.")
@allow_code_option
@click.option("--resolved", is_flag=True, help="Print the recipe with everything it extends.")
def recipes_check(
    names: tuple[str, ...], settings: tuple[str, ...], allow_code: tuple[str, ...], resolved: bool
) -> RecipesChecked:
    """Check recipes and report every fault with its line."""
    from esd_lora.recipe_files import dump_recipe, load_fuse_spec, load_harmonise_spec, load_recipe, recipe_kind

    checked: list[RecipeChecked] = []
    for name in names:
        kind, over = recipe_kind(name), overrides(settings)
        if kind == "fuse":
            recipe, purpose = load_fuse_spec(name, over), "says how to fuse a stack"
        elif kind == "harmonise":
            recipe, purpose = load_harmonise_spec(name, over), "says how to harmonise a stack"
        elif kind == "concept":
            recipe, purpose = load_recipe(["fast", name], over, allow_code=allow_code), "a concept, give it a preset"
        elif kind == "preset":
            recipe, purpose = (
                load_recipe(name, over, allow_code=allow_code, concepts=["CONCEPT"]),
                "a preset, give it a --concept",
            )
        else:
            recipe = load_recipe(name, over, allow_code=allow_code)
            purpose = f"erases {', '.join(concept.name for concept in recipe.concepts)}"
        say(*(dump_recipe(recipe).split("\n") if resolved else [f"{name}: good, {purpose}"]))
        checked.append({"name": name, "kind": kind, "resolved": recipe.model_dump(mode="json")})
    return {"recipes": checked}


@recipes.command("schema")
def recipes_schema() -> dict[str, Any]:
    """Print the JSON schema of recipe files, for editors that check YAML; with --json or without, it is the same."""
    from esd_lora.recipe_files import recipe_schema

    schema = recipe_schema()
    say(*schema.rstrip("\n").split("\n"))
    return json.loads(schema)
