"""Prints the table of docs/choosing.md: an object erased by eight pictures of it, its name never given.

    python benchmarks/from_pictures.py [--concepts cat,rocket] [--lists all,without] [--seeds 0] [--plain] [-s pictures.words=1]

The built-in base draws the pictures, three with no style named and one in each of its styles (with `--plain` all eight with no
style named), from seeds that nothing else has;
the eraser is trained from that folder alone, under a label that says nothing. `all` is the keep list as it is, which may name
the object; `without` is the same without the prompts that do, so that its name is in no list at all. The judge looks at
pictures of prompts with the object's real name, none of which the eraser was made with. Settings were chosen on cat and rocket
alone. Runs that stand in `--out` already are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

import yaml
from counting import SHOTS, Yardstick, columns
from tables import add_publish, show

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.evaluation.cases import fill_template
from esd_lora.pictures import paint
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train
from esd_lora.wording import mentions

CHOSEN_ON, UNSEEN = ("cat", "rocket"), ("pizza", "guitar", "penguin", "umbrella")
LISTS = {"all": "as it is", "without": "without its name"}
MEASURES = {
    "object_left": "object left",
    "object_left_high": "at high guidance",
    "kept": "kept",
    "kept_unlisted": "kept, in no list",
    "kept_bare": "kept, no style named",
}
_FIRST_SEED = 5000  # of the pictures that are shown; the judge's prompts have those from 0 on


def draw(base: Base, name: str, folder: Path, *, plain: bool) -> Path:
    """Write eight pictures of an object, all with no style named where they are to be plain, and return their folder."""
    if not folder.exists():
        styles = () if plain else domain("emoji")["styles"]
        prompts = [fill_template("{a} in {style} style", name, style) for style in styles]
        prompts = [fill_template("{a}", name)] * (8 - len(prompts)) + prompts
        folder.mkdir(parents=True)
        for i, picture in enumerate(paint(base, prompts, range(_FIRST_SEED, _FIRST_SEED + len(prompts)))):
            picture.save(folder / f"{i}.png")
    return folder


def erase(base: Base, pictures: Path, out: Path, preset: str, seed: int, further: dict[str, Any]) -> Eraser:
    """Return the eraser of what a folder shows, made unless it is there."""
    if not (out / "README.md").exists():
        concepts = [{"name": "a thing in pictures", "images": str(pictures)}]
        settings = {"train.seed": seed, "train.preview_every": 0, **further}
        train(load_recipe(preset, settings, base=base.id, concepts=concepts), base=base, out=out, force=True, progress=False)
    return Eraser.load(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/from-pictures"))
    parser.add_argument("--concepts", default=",".join([*CHOSEN_ON, *UNSEEN]))
    parser.add_argument("--lists", default=",".join(LISTS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the recipe")
    parser.add_argument("--plain", action="store_true", help="show no picture in a style")
    add_publish(parser)
    options = parser.parse_args()
    base = load_base("emoji")
    further = {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in options.set)}
    yardstick = Yardstick(base, options.out / "measured")
    variant = "plain-pictures" if options.plain else "pictures"
    rows: list[list[str]] = []
    for kind in options.lists.split(","):
        for name in options.concepts.split(","):
            keep = base.keep if kind == "all" else tuple(prompt for prompt in base.keep if not mentions(prompt, [name]))
            pictures = draw(base, name, options.out / variant / name, plain=options.plain)
            cells: list[dict[str, Any]] = []
            for seed in options.seeds.split(","):
                place = options.out / "-".join([options.recipe, variant, kind, name, seed, *options.set])
                fresh = dataclasses.replace(base, keep=keep, words={})
                eraser = erase(fresh, pictures, place, options.recipe, int(seed), further)
                (concept,) = eraser.header.concepts
                assert concept.shown is not None
                named = ", ".join(f"{text} {share:.0%}" for text, share in concept.shown.explained_by.items())
                anchor = concept.pairs[0][1]
                cells.append(yardstick.measure([eraser], [name], []) | eraser.header.cost | {"named": named, "anchor": anchor})
                print(
                    f"{kind}, {name}, seed {seed}: " + str({key: cells[-1][key] for key in (*MEASURES, "lost_bare")}),
                    flush=True,
                )
            shown = columns(cells, MEASURES)
            costs = [f"{sum(cell[key] for cell in cells) / len(cells):.0f}" for key in ("steps", "seconds")]
            texts = ["; ".join(dict.fromkeys(cell[key] for cell in cells)) for key in ("anchor", "named")]
            rows.append([name, LISTS[kind], *shown, *texts, *costs])
    head = ["shown", "keep list", *MEASURES.values(), "anchor", "not preserved", "steps", "seconds"]
    note = (
        f"Eight pictures each; {SHOTS} pictures of the object by name, {len(yardstick.before)} of everything, three of every"
        f" object bare; training seeds {options.seeds}, mean (worst)."
    )
    show("-".join([f"from-{variant}", *options.lists.split(",")]), head, rows, note, publish=options.publish)


if __name__ == "__main__":
    main()
