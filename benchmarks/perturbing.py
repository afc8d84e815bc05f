"""Prints what a change of scales, and longer walks, do to an erasure by `auto` and by fixed numbers.

    OMP_NUM_THREADS=1 python benchmarks/perturbing.py [--concepts rocket,cat] [--seeds 0] [--recipes "fixed numbers"]

Every text embedding of the built-in base is made larger or smaller, and all weights that read it the other way, which changes
no picture, only gradients; or trajectories are walked in 50 steps instead of 12. *Fixed numbers* are those of the untouched
base: a rate of 4e-3, 250 steps, eta 0, kept prompts weighing 1.5. Settings that carry over from one model to the next leave the
same and keep the same in every row of a recipe.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

import torch
from counting import SHOTS, Yardstick, columns
from tables import add_publish, show

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.evaluation.cases import fill_template
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

PERTURBATIONS: dict[str, tuple[float, dict[str, Any]]] = {
    "as it is": (1.0, {}),
    "text 4 times as large": (4.0, {}),
    "text a fourth as large": (0.25, {}),
    "text 16 times as large": (16.0, {}),
    "text a sixteenth as large": (1 / 16, {}),
    "walks of 50 steps": (1.0, {"train.trajectory_steps": 50}),
}
"""Name to the factor of text embeddings and to settings."""
FIXED = {"train.lr": 4e-3, "train.steps": 250, "train.preserve_weight": 1.5, "eta": 0.0}
RECIPES: dict[str, dict[str, Any]] = {
    "`fast`": {},
    "`fast` from zero": {"closed_form": None},
    "fixed numbers": {"closed_form": None, **FIXED},
}
MEASURES = ("object_left", "kept", "kept_unlisted", "kept_bare")


def scaled(factor: float) -> Base:
    """Return the built-in base with text embeddings scaled and the weights that read them scaled back: the same pictures."""
    base = load_base("emoji")
    with torch.no_grad():
        for parameter in base.pipe.text_encoder.final_layer_norm.parameters():
            parameter.mul_(factor)
        for path, layer in base.model.named_modules():
            if base.family.text_read_by(path) == "prompt_embeds":
                layer.weight.div_(factor)
    return base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/perturbing"))
    parser.add_argument("--concepts", default="rocket,cat")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    add_publish(parser)
    options = parser.parse_args()
    rows: list[list[str]] = []
    for name in options.recipes.split(","):
        recipe = RECIPES[name]
        for number, (change, (factor, settings)) in enumerate(PERTURBATIONS.items()):
            base = scaled(factor)
            yardstick = Yardstick(base, options.out / "measured")
            cells: list[dict[str, Any]] = []
            for concept in options.concepts.split(","):
                for seed in options.seeds.split(","):
                    out = options.out / f"{name.strip('`').replace('` ', '-').replace(' ', '-')}-{number}-{concept}-{seed}"
                    if not (out / "README.md").exists():
                        concepts = [{"name": concept, "prompts": [fill_template("{a}", concept)]}]
                        fixed = {**recipe, **settings, "train.seed": int(seed), "train.preview_every": 0}
                        train(load_recipe("fast", fixed, concepts=concepts), base=base, out=out, force=True)
                    eraser = Eraser.load(out)
                    cells.append({**yardstick.measure([eraser], [concept], []), **eraser.header.cost})
            shown = columns(cells, MEASURES)
            rows.append([name, change, *shown, f"{sum(cell['steps'] for cell in cells) / len(cells):.0f}"])
    head = ["recipe", "base", "left", "kept", "kept, in no list", "kept, no style named", "steps"]
    note = f"{options.concepts}; training seeds {options.seeds}; {SHOTS} pictures of what is erased; mean (worst)."
    show("perturbing", head, rows, note, publish=options.publish)


if __name__ == "__main__":
    main()
