"""Prints the table of docs/your-model.md: one recipe, nothing in it tuned to a base, on learned bases that differ in kind.

    python benchmarks/calibration.py [--bases emoji,emoji-xl] [--scopes xattn,noxattn] [--concepts cat,rocket] [--seeds 0,1,2]

Every eraser is made from scratch and judged on prompts it was not made with, at the guidance that the base is sampled with and
at 1.9 times it; runs that stand in `--out` already are not repeated. `emoji` ships; the others stand in `playground/`, and are
sampled as `emoji` is but for the number of steps. Objects: cat, rocket and pizza, and four that no setting was chosen on.
*kept, nearest* are the four objects that the base's own text encoder puts nearest, with no style named and with and without
article, six seeds each: what shares of everything hide. `--recipe instant` measures the closed form alone, and `--left` says
which pictures of a style are left, and how many of them the base draws in it anyway where no style is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

from counting import SHOTS, Yardstick, columns, object_of, score
from tables import add_publish, show

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.evaluation.cases import fill_template, style_cases
from esd_lora.evaluation.detectors.judge import Judge
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

PLAYGROUND = Path(__file__).parent.parent / "playground"
SCOPES = {"emoji": ("xattn", "noxattn"), "emoji-xl": ("xattn", "noxattn"), "emoji-flow": ("xattn", "full")}
CHOSEN_ON, UNSEEN, STYLE = ("cat", "rocket", "pizza"), ("guitar", "penguin", "car", "cactus"), "twemoji"
MEASURES = {
    "left": "left",
    "left_high": "left, high guidance",
    "kept": "kept",
    "kept_unlisted": "kept, in no list",
    "kept_bare": "kept, no style named",
    "kept_nearest": "kept, nearest",
}


def playground_base(name: str) -> Base:
    """Return a learned base with what it knows: the keep list of its drawings, and how it is sampled."""
    if name == "emoji":
        return load_base(name)
    base = load_base(PLAYGROUND / name)
    return dataclasses.replace(
        base, keep=tuple(domain("emoji")["keep"]), steps=20, guidance=domain("emoji")["sampling"]["guidance"]
    )


def concept_of(name: str) -> dict[str, Any]:
    """Return the fields of a recipe that name the concept, and for a style its pool."""
    if name != STYLE:
        return {"concepts": [{"name": name, "prompts": [f"a {name}"]}]}
    recipe = load_recipe(f"emoji-{STYLE}")
    return {"concepts": [recipe.concepts[0].model_dump()], "objective": recipe.objective}


def erase(base: Base, out: Path, preset: str, scope: str) -> Eraser:
    """Return the eraser of a cell, made unless it is there.

    Args:
        base: To erase from.
        out: Its folder; the name ends in the concept and the training seed.
        preset: Recipe for everything else.
        scope: Layers.
    """
    if not (out / "README.md").exists():
        *_, name, seed = out.name.split("-")
        settings = {"scope": scope, "train.seed": int(seed), "train.preview_every": 0}
        train(load_recipe(preset, settings, base=base.id, **concept_of(name)), base=base, out=out, force=True)
    return Eraser.load(out)


def what_is_left(base: Base, judge: Judge, eraser: Eraser) -> str:
    """Return a line on the pictures of the style that an eraser of it leaves."""
    made_with = {prompt for concept in eraser.header.concepts for prompt, _ in concept.pairs}
    cases = style_cases(STYLE, made_with, SHOTS)
    unnamed = [case._replace(prompt=fill_template("{a}", str(object_of(case)))) for case in cases]
    anyway = [scored.style_right for scored in score(base, judge, unnamed)]
    with applied(base, [eraser]):
        left = [i for i, scored in enumerate(score(base, judge, cases)) if scored.style_right]
    objects = Counter(object_of(cases[i]) for i in left)
    return (
        f"{len(left)} of {SHOTS} left ({', '.join(f'{n} {name}' for name, n in objects.most_common())});"
        f" {sum(anyway[i] for i in left)} of them, and {sum(anyway)} of all, are {STYLE} where no style is named"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/calibration"))
    parser.add_argument("--bases", default=",".join(SCOPES))
    parser.add_argument("--scopes", help="default: those of each base")
    parser.add_argument("--concepts", default=",".join([*CHOSEN_ON, *UNSEEN, STYLE]))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--left", action="store_true", help="say which pictures of the style are left")
    add_publish(parser)
    options = parser.parse_args()
    rows: list[tuple[str, str, str, list[dict[str, Any]]]] = []
    for base_name in options.bases.split(","):
        base = playground_base(base_name)
        yardstick = Yardstick(base, options.out / "measured")
        for scope in options.scopes.split(",") if options.scopes else SCOPES[base_name]:
            cells: dict[str, list[dict[str, Any]]] = {}
            for name in options.concepts.split(","):
                for seed in options.seeds.split(","):
                    eraser = erase(
                        base, options.out / f"{options.recipe}-{base_name}-{scope}-{name}-{seed}", options.recipe, scope
                    )
                    measured = yardstick.measure([eraser], *(((), (name,)) if name == STYLE else ((name,), ())))
                    what = "style" if name == STYLE else "object"
                    measured |= {"left": measured[f"{what}_left"], "left_high": measured[f"{what}_left_high"]}
                    cells.setdefault(what, []).append({**measured, **eraser.header.cost})
                    if options.left and name == STYLE:
                        print(f"{base_name}, {scope}, seed {seed}: {what_is_left(base, yardstick.judge, eraser)}", flush=True)
            rows += [(base_name, scope, kind, of) for kind, of in cells.items()]
    table: list[list[str]] = []
    for base_name, scope, kind, of in rows:
        shown = columns(of, MEASURES)
        costs = [f"{statistics.mean(cell[key] for cell in of):.0f}" for key in ("steps", "seconds")]
        table.append([base_name, f"`{scope}`", kind, *shown, *costs, str(len(of))])
    head = ["base", "scope", "erased", *MEASURES.values(), "steps", "seconds", "runs"]
    name = "-".join(["calibration", *(options.scopes or "all").split(",")])
    note = f"Concepts {options.concepts}; training seeds {options.seeds}; recipe `{options.recipe}`; mean (worst)."
    show(name, head, table, note, publish=options.publish)


if __name__ == "__main__":
    main()
