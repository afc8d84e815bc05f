"""Prints the table of docs/your-model.md: one recipe, nothing in it tuned to a base, on learned bases that differ in kind.

    python benchmarks/calibration.py [--bases emoji,emoji-xl] [--scopes xattn,noxattn] [--concepts cat,rocket] [--seeds 0,1,2]

Every eraser is made from scratch and judged on prompts it was not made with, at the guidance that the base is sampled with and
at 1.9 times it; runs that stand in `--out` already are not repeated. `emoji` ships; the others stand in `playground/`, and are
sampled as `emoji` is but for the number of steps. Objects: cat, rocket and pizza, and four that no setting was chosen on.
*kept, nearest* are the four objects that the base's own text encoder puts nearest, with no style named and with and without
article, six seeds each: what shares of everything hide. `--recipe instant` measures the closed form alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

from counting import Scored, kept, score
from erasing import every_object, measure

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.evaluation.cases import Case, fill_template, pair_cases
from esd_lora.evaluation.detectors.judge import Judge
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

PLAYGROUND = Path(__file__).parent.parent / "playground"
SCOPES = {"emoji": ("xattn", "noxattn"), "emoji-xl": ("xattn", "noxattn"), "emoji-flow": ("xattn", "full")}
CHOSEN_ON, UNSEEN, STYLE = ("cat", "rocket", "pizza"), ("guitar", "penguin", "car", "cactus"), "twemoji"
HIGH = 1.9
NEAREST, SHOTS_OF_NEAREST = 4, 6
MEASURES = ("left", "left, high guidance", "kept", "kept_unlisted", "kept_bare", "kept_nearest")


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


def left(base: Base, judge: Judge, eraser: Any, name: str, before: Sequence[Scored], bare: Sequence[Scored]) -> dict[str, Any]:
    """Return what a run left and kept at the base's guidance, and what it left at a high one."""
    objects, styles = (set(), {name}) if name == STYLE else ({name}, set())
    low = measure(base, judge, [eraser], list(before), list(bare), objects, styles)
    louder = dataclasses.replace(base, guidance=HIGH * base.guidance)
    high = measure(louder, judge, [eraser], [], [], objects, styles)
    what = "style_left" if styles else "object_left"
    result = {"left": low[what][0], "left, high guidance": high[what][0], **{key: low[key] for key in MEASURES[2:5]}}
    if not styles:
        cases = nearest(base, name)
        drawn = score(base, judge, cases)
        with applied(base, [eraser]):
            result["kept_nearest"] = kept(score(base, judge, cases), drawn, objects, styles)
    return result


def nearest(base: Base, name: str) -> list[Case]:
    """Return cases of the objects whose prompts the base's text encoder puts nearest to that of an erased one."""
    prompts = {other: fill_template("{a}", other) for other in domain("emoji")["objects"] if other != name}
    likeness = (base.directions([fill_template("{a}", name)]) @ base.directions(list(prompts.values())).T)[0]
    others = [list(prompts)[i] for i in likeness.argsort(descending=True)[:NEAREST].tolist()]
    return [
        Case(f"{other}-{number}-{seed}", "neighbour", prompt, seed, other)
        for other in others
        for number, prompt in enumerate((prompts[other], other))
        for seed in range(SHOTS_OF_NEAREST)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/calibration"))
    parser.add_argument("--bases", default=",".join(SCOPES))
    parser.add_argument("--scopes", help="default: those of each base")
    parser.add_argument("--concepts", default=",".join([*CHOSEN_ON, *UNSEEN, STYLE]))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipe", default="fast")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    judge, rows = Judge("emoji"), []
    for base_name in options.bases.split(","):
        base = playground_base(base_name)
        before, bare = score(base, judge, pair_cases(), desc=base_name), score(base, judge, every_object())
        for scope in options.scopes.split(",") if options.scopes else SCOPES[base_name]:
            cells: dict[str, list[dict[str, Any]]] = {}
            for name in options.concepts.split(","):
                for seed in options.seeds.split(","):
                    cache = options.out / f"{options.recipe}-{base_name}-{scope}-{name}-{seed}.json"
                    if not cache.exists():
                        recipe = load_recipe(
                            options.recipe,
                            {"scope": scope, "train.seed": int(seed), "train.preview_every": 0},
                            base=base.id,
                            **concept_of(name),
                        )
                        eraser = train(recipe, base=base)
                        eraser.save(cache.with_suffix(""))
                        result = left(base, judge, eraser, name, before, bare)
                        record = [each.model_dump() for each in eraser.header.calibrations]
                        cache.write_text(json.dumps({**result, "cost": eraser.header.cost, "calibrations": record}))
                    cells.setdefault("style" if name == STYLE else "objects", []).append(json.loads(cache.read_text()))
            rows += [(base_name, scope, kind, of) for kind, of in cells.items()]
    print(f"\n{datetime.date.today()}; {options.concepts}; seeds {options.seeds}; recipe {options.recipe}; mean (worst)\n")
    print(f"| base | scope | erased | {' | '.join(MEASURES)} | steps | seconds | runs |")
    print("|---|---|---|" + "---|" * (len(MEASURES) + 3))
    for base_name, scope, kind, of in rows:
        shown: list[str] = []
        for measured in MEASURES:
            values = [cell[measured] for cell in of if measured in cell]
            if not values:
                shown.append("")
                continue
            worst = max(values) if measured.startswith("left") else min(values)
            shown.append(f"{statistics.mean(values):.1%} ({worst:.1%})")
        costs = [f"{statistics.mean(cell['cost'][key] for cell in of):.0f}" for key in ("steps", "seconds")]
        print(f"| {base_name} | `{scope}` | {kind} | {' | '.join([*shown, *costs])} | {len(of)} |")


if __name__ == "__main__":
    main()
