"""Prints the tables of README.md and docs/choosing.md: what each recipe leaves of a concept, what it keeps, what it costs.

    python benchmarks/erasing.py [--out out/benchmark] [--only object,style,thorough,paper,paper-style,stack] [--seeds 0]
    python benchmarks/erasing.py --only method,scope,anchor,rank --sheets docs

Every run is made from scratch on the built-in base and judged on prompts it was not made with, at the base's guidance and at
1.9 times it; runs in `--out` already are not repeated, and what has the same weights is not judged twice. Seconds are those of
one run beside whatever else the machine does. `--sheets` also paints each choice side by side, as docs/choosing.md shows them.
Settings were chosen on cat, rocket, pizza and twemoji; the others came after.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

from counting import SHOTS, Yardstick, columns, count
from tables import add_publish, show

from esd_lora.adapter import applied
from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import stack
from esd_lora.evaluation.cases import fill_template
from esd_lora.pictures import grid, paint
from esd_lora.recipe import SCOPES
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

OBJECTS, STYLE = ("cat", "rocket", "pizza"), "twemoji"
HARDEST = ("guitar", "penguin", "tiger")
"""Objects of which `fast` costs most."""
UNSEEN = ("guitar", "penguin", "car", "cactus", "key", "bee", "owl", "tiger")
STYLES = tuple(domain("emoji")["styles"])
MEASURES = {
    "object_left": "object left",
    "object_left_high": "at high guidance",
    "style_left": "style left",
    "style_left_high": "style at high guidance",
    "object_right": "object right",
    "anchor_shown": "anchor shown",
    "kept": "kept",
    "kept_unlisted": "kept, in no list",
    "kept_bare": "kept, no style named",
    "kept_nearest": "kept, nearest",
}
GROUPS = ("object", "style", "thorough", "paper", "paper-style", "stack")
CHOICES = ("method", "scope", "anchor", "rank")
HELD_OUT = {tuple(pair) for pair in domain("emoji")["held_out"]}
CAT = {"name": "cat", "prompts": ["a cat"]}
SHEET = (
    "a cat",
    "a cat in ink style",
    "an emoji of a cat, drawn by noto",
    "a dog",
    "a fox in blob style",
    "a pizza in fluent style",
    "a house",
)
INK = {"name": "ink", "prompts": ["ink style"], "erase_from": "{x} in ink style"}
OF_INK = [
    f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in domain("emoji")["objects"] if (name, "ink") not in HELD_OUT
][::2]


def object_concept(name: str) -> dict[str, Any]:
    """Return an object as a concept of one prompt."""
    return {"name": name, "prompts": [fill_template("{a}", name)]}


def style_concept(name: str) -> dict[str, Any]:
    """Return a style as the recipe for twemoji has it, with another name."""
    return json.loads(load_recipe(f"emoji-{STYLE}").concepts[0].model_dump_json().replace(STYLE, name))


def runs(seeds: list[int]) -> dict[str, list[tuple[str, dict[str, Any], dict[str, Any]]]]:
    """Group -> (label, arguments of load_recipe) of each run."""
    out: dict[str, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {group: [] for group in (*GROUPS[:-1], *CHOICES)}
    for seed in seeds:
        settings = {"train.seed": seed}
        for preset in ("instant", "fast"):
            for kind, names in ((", ".join(OBJECTS), OBJECTS), (f"{len(UNSEEN)} more objects", UNSEEN)):
                fields = [{"source": preset, "concepts": [object_concept(name)]} for name in names]
                out["object"] += [(f"{kind}, `{preset}`", each, settings) for each in fields]
            for name in STYLES:
                fields = {"source": preset, "objective": "contrast", "concepts": [style_concept(name)]}
                out["style"].append((f"{len(STYLES)} styles, `{preset}`", fields, settings))
        objects = [{"source": "thorough", "concepts": [object_concept(name)]} for name in HARDEST]
        out["thorough"] += [(f"{', '.join(HARDEST)}, `thorough`", each, settings) for each in objects]
        for name in STYLES:
            fields = {"source": "thorough", "objective": "contrast", "concepts": [style_concept(name)]}
            out["thorough"].append((f"{len(STYLES)} styles, `thorough`", fields, settings))
        for name in OBJECTS:
            out["paper"].append((f"{name}, `paper`", {"source": "paper", "concepts": [object_concept(name)]}, settings))
        literal = {"concepts": [{"name": STYLE, "prompts": [f"{STYLE} style"]}]}
        out["paper-style"].append((f"{STYLE} style, `paper`", {"source": "paper", **literal}, settings))
        cat = {"source": "fast", "concepts": [CAT]}
        out["method"] += [
            ("cat, `instant`", {**cat, "source": "instant"}, settings),
            ("cat, `fast`", cat, settings),
            ("cat, `fast` from zero", {**cat, "closed_form": None}, settings),
            ("cat, `paper`", {**cat, "source": "paper"}, settings),
        ]
        for scope in SCOPES:
            out["scope"].append((f"cat, scope {scope}", cat, {**settings, "scope": scope}))
        for rank in (1, 4, 16):
            out["rank"].append((f"cat, rank {rank}", cat, {**settings, "lora.rank": rank, "lora.alpha": rank}))
        out["anchor"] += [
            ("cat, anchor chosen", cat, settings),
            ("cat, anchored on a house", {**cat, "concepts": [{**CAT, "anchor": "a house"}]}, settings),
            ("cat, anchor none", {**cat, "concepts": [{**CAT, "anchor": ""}]}, settings),
            ("cat, nothing preserved", cat, {**settings, "preserve": []}),
            ("ink style, erased from 20 prompts", {**cat, "concepts": [{**INK, "fill": OF_INK}]}, settings),
        ]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/benchmark"))
    parser.add_argument("--only", default=",".join(GROUPS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sheets", type=Path, help="directory for a sheet of pictures of each choice")
    add_publish(parser)
    options = parser.parse_args()
    seeds, groups = [int(seed) for seed in options.seeds.split(",")], options.only.split(",")
    options.out.mkdir(parents=True, exist_ok=True)
    base = load_base("emoji")
    yardstick = Yardstick(base, options.out / "measured")
    results: dict[str, list[dict[str, Any]]] = {}

    def record(label: str, eraser: Eraser, objects: set[str], styles: set[str], size: int, cost: dict[str, Any]) -> None:
        results.setdefault(label, []).append({**yardstick.measure([eraser], objects, styles), "size": size, **cost})

    for group, members in runs(seeds).items():
        if group not in groups:
            continue
        seeds_shown = [7] * len(SHEET)
        drawn = options.sheets if group in CHOICES else None
        rows = {"base": paint(base, SHEET, seeds_shown)} if drawn else {}
        for label, fields, settings in members:
            fields = dict(fields)
            recipe = load_recipe(fields.pop("source"), settings, **fields)
            name = recipe.concepts[0].name
            key = "-".join(filter(None, re.split(r"\W+", f"{group} {label} {name} {settings['train.seed']}")))
            folder = options.out / key
            if not (folder / "README.md").exists():
                train(recipe, base=base, out=folder, force=True)
            eraser = Eraser.load(folder)
            size = (folder / "pytorch_lora_weights.safetensors").stat().st_size
            objects, styles = (set(), {name}) if name in STYLES else ({name}, set())
            record(label, eraser, objects, styles, size, eraser.header.cost)
            if drawn:
                with applied(base, [eraser]):
                    rows[label.replace("cat, ", "").replace("`", "")] = paint(base, SHEET, seeds_shown)
        if drawn:
            grid(rows, SHEET, tile=96).save(drawn / f"choosing-{group}.png", optimize=True)
    if "stack" in groups:
        for seed in seeds:
            for name in OBJECTS:
                kinds = (f"object-cat-rocket-pizza-fast-{name}-{seed}", f"style-{len(STYLES)}-styles-fast-{STYLE}-{seed}")
                pair = [Eraser.load(options.out / kind) for kind in kinds]
                both = stack(pair)
                size = sum(tensor.nbytes for tensor in both.state_dict().values())
                record(f"{name} and {STYLE} style, stacked", both, {name}, {STYLE}, size, {})

    right = count(s.right for s in yardstick.before)
    note = (
        f"Training seeds {options.seeds}; base: {right.hits} of {right.of} pairs right; {SHOTS} pictures of what is erased,"
        f" {len(yardstick.before)} of everything; mean (worst);"
        " evaluations: latents through the denoiser without + with gradients."
    )
    head = [
        "erased",
        *MEASURES.values(),
        "steps",
        "seconds",
        "evaluations",
        "kB",
    ]
    table = [head]
    for label, rows in results.items():
        cells = [label, *columns(rows, MEASURES)]
        mean = {
            name: sum(row[name] for row in rows) / len(rows)
            for name in ("steps", "seconds", "sample_evaluations", "student_samples", "size")
            if name in rows[0]
        }
        trained = "seconds" in mean
        cells.append(f"{mean['steps']:.0f}" if trained else "")
        slowest = f" ({max(row['seconds'] for row in rows):.0f})" if trained and len(rows) > 1 else ""
        cells.append(f"{mean['seconds']:.0f}{slowest}" if trained else "")
        cells.append(f"{mean['sample_evaluations']:.0f} + {mean['student_samples']:.0f}" if trained else "")
        cells.append(f"{mean['size'] / 1000:.0f}")
        table.append(cells)
    used = [column for column in zip(*table, strict=True) if any(column[1:])]
    shown = list(zip(*used, strict=True))
    show(f"erasing-{'-'.join(groups)}", shown[0], shown[1:], note, publish=options.publish)


if __name__ == "__main__":
    main()
