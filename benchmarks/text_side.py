"""Prints the table of docs/choosing.md on the built-in base: erasing in the text encoder beside erasing in cross-attention.

    python benchmarks/text_side.py [--base emoji] [--concepts cat,rocket] [--seeds 0,1,2]

Every eraser is `fast`, with nothing else changed but the scope; since no layer of a text encoder has a closed form, `xattn`
stands there from zero as well. Judged as `benchmarks/calibration.py` judges; runs that stand in `--out` already are not
repeated.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from calibration import MEASURES, concept_of, playground_base
from counting import Yardstick, columns
from tables import add_publish, show

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

WAYS: dict[str, dict[str, Any]] = {
    "`xattn`": {"scope": "xattn"},
    "`xattn`, from zero": {"scope": "xattn", "closed_form": None},
    "`text-encoder`": {"scope": "text-encoder"},
}


def erase(base: Base, out: Path, way: str, name: str, seed: int) -> Eraser:
    """Return the eraser of a cell, made unless it is there."""
    if not (out / "README.md").exists():
        settings = {"train.seed": seed, "train.preview_every": 0}
        train(load_recipe("fast", settings, base=base.id, **concept_of(name), **WAYS[way]), base=base, out=out, force=True)
    return Eraser.load(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/text-side"))
    parser.add_argument("--base", default="emoji")
    parser.add_argument("--concepts", default="cat,rocket")
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    parser.add_argument("--seeds", default="0,1,2")
    add_publish(parser)
    options = parser.parse_args()
    base = playground_base(options.base)
    yardstick = Yardstick(base, options.out / "measured")
    cells: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways.split(";")}
    for seed in map(int, options.seeds.split(",")):
        for name in options.concepts.split(","):
            for way, of in cells.items():
                key = "-".join("".join(c if c.isalnum() else " " for c in f"{way} {name} {seed}").split())
                eraser = erase(base, options.out / f"{options.base}-{key}", way, name, seed)
                measured = yardstick.measure([eraser], (name,), ())
                measured |= {"left": measured["object_left"], "left_high": measured["object_left_high"]}
                size = (options.out / f"{options.base}-{key}" / WEIGHTS_NAME).stat().st_size / 1000
                of.append({**measured, **eraser.header.cost, "size": size})
                print(options.base, key, {measure: measured[measure] for measure in MEASURES}, eraser.header.cost, flush=True)
    table: list[list[str]] = []
    for way, of in cells.items():
        shown = columns(of, MEASURES)
        costs = [f"{statistics.mean(cell[key] for cell in of):.0f}" for key in ("steps", "seconds", "size")]
        table.append([way, *shown, *costs, str(len(of))])
    head = ["scope", *MEASURES.values(), "steps", "seconds", "kB", "runs"]
    note = f"Base {options.base}; concepts {options.concepts}; training seeds {options.seeds}; mean (worst)."
    show(f"text-side-{options.base}", head, table, note, publish=options.publish)


if __name__ == "__main__":
    main()
