"""Prints the table of docs/choosing.md on a flow model: what each objective leaves of a concept and costs, by scope.

    python benchmarks/objectives.py [--base emoji-flow] [--concepts cat,rocket] [--seeds 0,1,2] [--scopes xattn,joint-qk,full]

Every eraser is `fast` from zero, without the closed form's start, so that the objectives alone differ, and of as many steps, so
that none is better for more work (`--steps auto`: as many as the probe asks for); a row of `instant`, the closed form alone,
stands beside them. The anchor is the one that `fast` chooses. `joint-qk` are the queries and keys of the joint blocks, the
layers that GEM trains (multimodal-ai-lab/GEM). Judged as `benchmarks/calibration.py` judges; runs that stand in `--out` already
are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from calibration import MEASURES, concept_of, playground_base
from counting import Yardstick, columns, count
from tables import add_publish, show

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

WAYS: dict[str, dict[str, Any]] = {
    "esd, eta auto": {"objective": "esd"},
    "esd, eta 0.5": {"objective": "esd", "eta": 0.5},
    "contrast, eta 0.5": {"objective": "contrast", "eta": 0.5},
    "hinge, eta 1": {"objective": "hinge", "eta": 1.0},
    "hinge, eta 0.5": {"objective": "hinge", "eta": 0.5},
}
STEPS = 10
"""Of painting: a small flow needs no more, as the judge's figure for the base in the note says."""
CLOSED_FORM = "closed form (`instant`)"


def erase(base: Base, out: Path, way: str, scope: str, name: str, seed: int, steps: str) -> Eraser:
    """Return the eraser of a cell, made unless it is there."""
    if not (out / "README.md").exists():
        settings = {"scope": scope, "train.seed": seed, "train.preview_every": 0}
        fields: dict[str, Any] = {}
        if way != CLOSED_FORM:
            fields = {**WAYS[way], "closed_form": None}
            settings["train.steps"] = steps if steps == "auto" else int(steps)
        preset = "instant" if way == CLOSED_FORM else "fast"
        recipe = load_recipe(preset, settings, base=base.id, **{**concept_of(name), **fields})
        train(recipe, base=base, out=out, force=True, teacher_cache=out.parent / "teacher")
    return Eraser.load(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/objectives"))
    parser.add_argument("--base", default="emoji-flow")
    parser.add_argument("--concepts", default="cat,rocket")
    parser.add_argument("--scopes", default="xattn,joint-qk,full")
    parser.add_argument("--ways", default=";".join([*WAYS, CLOSED_FORM]), help="separated by semicolons")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", default="60", help="of training; auto for as many as the probe asks for")
    add_publish(parser)
    options = parser.parse_args()
    base = dataclasses.replace(playground_base(options.base), steps=STEPS)
    yardstick = Yardstick(base, options.out / "measured")
    table: list[list[str]] = []
    for way in options.ways.split(";"):
        for scope in ["xattn"] if way == CLOSED_FORM else options.scopes.split(","):
            cells: list[dict[str, Any]] = []
            for name in options.concepts.split(","):
                for seed in map(int, options.seeds.split(",")):
                    words = f"{way} {scope} {name} {seed} {options.steps}"
                    key = "-".join("".join(c if c.isalnum() else " " for c in words).split())
                    eraser = erase(base, options.out / f"{options.base}-{key}", way, scope, name, seed, options.steps)
                    measured = yardstick.measure([eraser], (name,), ())
                    measured |= {"left": measured["object_left"], "left_high": measured["object_left_high"]}
                    cells.append({**measured, **eraser.header.cost})
                    print(
                        options.base, key, {measure: measured[measure] for measure in MEASURES}, eraser.header.cost, flush=True
                    )
            shown = columns(cells, MEASURES)
            costs = [f"{statistics.mean(cell[key] for cell in cells):.0f}" for key in ("steps", "seconds")]
            table.append([way, f"`{scope}`", *shown, *costs, str(len(cells))])
    head = ["objective", "scope", *MEASURES.values(), "steps", "seconds", "runs"]
    right = count(each.right for each in yardstick.before)
    note = (
        f"Base {options.base}, painting in {STEPS} steps: {right.hits} of {right.of} pairs right; concepts {options.concepts};"
        f" training seeds {options.seeds}; mean (worst)."
    )
    show(f"objectives-{options.base}", head, table, note, publish=options.publish)


if __name__ == "__main__":
    main()
