"""Prints the tables of README.md and docs/choosing.md: what each recipe leaves of a concept, what it keeps, what it costs.

    python benchmarks/erasing.py [--out out/benchmark] [--only object,style,paper,paper-style,stack] [--seeds 0]
    python benchmarks/erasing.py --only method,scope,anchor,rank --sheets docs

Every run is made from scratch on the built-in base and judged on prompts it was not made with; runs in `--out` already are not
repeated. Seconds are those of one run beside whatever else the machine does. `--sheets` also paints each choice side by side,
as docs/choosing.md shows them. Settings were chosen on cat, rocket, pizza and twemoji; the others came after.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

from counting import Scored, count, kept, object_of, score

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import stack
from esd_lora.evaluation.cases import Case, fill_template, object_cases, pair_cases, style_cases
from esd_lora.evaluation.detectors.judge import Judge
from esd_lora.pictures import grid, paint
from esd_lora.recipe import SCOPES
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

OBJECTS, STYLE, SHOTS = ("cat", "rocket", "pizza"), "twemoji", 120
UNSEEN = ("guitar", "penguin", "car", "cactus", "key", "bee", "owl", "tiger")
STYLES = tuple(domain("emoji")["styles"])
GROUPS = ("object", "style", "paper", "paper-style", "stack")
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


def every_object() -> list[Case]:
    """Return three cases of every object, no style named: a neighbour has least to hold on to there."""
    names = domain("emoji")["objects"]
    return [Case(f"{name}-{seed}", "general", fill_template("{a}", name), seed, name) for name in names for seed in (7, 8, 9)]


def measure(
    base: Base,
    judge: Judge,
    erasers: list[Eraser],
    before: list[Scored],
    bare: list[Scored],
    objects: set[str],
    styles: set[str],
) -> dict[str, Any]:
    """Erased and kept shares of erasers on the base."""
    known = domain("emoji")
    listed = {name for name in known["objects"] if f"a {name}" in known["keep"] or f"an {name}" in known["keep"]}
    trained = {prompt for eraser in erasers for concept in eraser.header.concepts for prompt, _ in concept.pairs}
    cases = [s.case for s in before]
    with applied(base, erasers):
        scored, scored_bare = score(base, judge, cases), score(base, judge, [s.case for s in bare])
        of_objects = [score(base, judge, object_cases(name, trained, SHOTS)) for name in sorted(objects)]
        of_styles = [score(base, judge, style_cases(name, trained, SHOTS)) for name in sorted(styles)]
    unlisted = [i for i, case in enumerate(cases) if object_of(case) not in listed]
    anchors = {
        anchor.rpartition(" ")[2] for eraser in erasers for concept in eraser.header.concepts for _, anchor in concept.pairs
    }
    shown = anchors & set(known["objects"]) if objects and not styles else set()  # a style's prompts are anchored on objects
    return {
        "anchor_shown": [count(s.verdict.object in shown for s in part).share for part in of_objects] if shown else [],
        "object_left": [count(s.object_right for s in part).share for part in of_objects],
        "style_left": [count(s.style_right for s in part).share for part in of_styles],
        "object_right": [count(s.object_right for s in part).share for part in of_styles],
        "kept": kept(scored, before, objects, styles),
        "kept_bare": kept(scored_bare, bare, objects, styles),
        "kept_unlisted": kept([scored[i] for i in unlisted], [before[i] for i in unlisted], objects, styles),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/benchmark"))
    parser.add_argument("--only", default=",".join(GROUPS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sheets", type=Path, help="directory for a sheet of pictures of each choice")
    options = parser.parse_args()
    seeds, groups = [int(seed) for seed in options.seeds.split(",")], options.only.split(",")
    options.out.mkdir(parents=True, exist_ok=True)
    base, judge = load_base("emoji"), Judge("emoji")
    before, bare = score(base, judge, pair_cases(), desc="the base"), score(base, judge, every_object())
    results: dict[str, list[dict[str, Any]]] = {}

    def record(label: str, key: str, erasers: list[Eraser], objects: set[str], styles: set[str], size: int, cost: dict) -> None:
        cache = options.out / f"{key}.json"
        if not cache.exists():
            cache.write_text(json.dumps({**measure(base, judge, erasers, before, bare, objects, styles), "size": size, **cost}))
        results.setdefault(label, []).append(json.loads(cache.read_text()))

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
            record(label, key, [eraser], objects, styles, size, eraser.header.cost)
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
                record(f"{name} and {STYLE} style, stacked", f"stack-{name}-{seed}", [both], {name}, {STYLE}, size, {})

    right = count(s.right for s in before)
    print(
        f"\n{datetime.date.today()}; seeds {options.seeds}; base: {right.hits} of {right.of} pairs right; "
        f"{SHOTS} pictures of what is erased, {len(before)} of everything; mean (worst);"
        " evaluations: latents through the denoiser without + with gradients\n"
    )
    head = [
        "erased",
        "object left",
        "style left",
        "object right",
        "anchor shown",
        "kept",
        "kept, not in keep list",
        "kept, no style named",
        "steps",
        "seconds",
        "evaluations",
        "kB",
    ]
    table = [head]
    for label, rows in results.items():
        cells = [label]
        for name, worst in (
            ("object_left", max),
            ("style_left", max),
            ("object_right", min),
            ("anchor_shown", min),
            ("kept", min),
            ("kept_unlisted", min),
            ("kept_bare", min),
        ):
            cell = [row[name] for row in rows]
            values = [v for found in cell for v in (found if isinstance(found, list) else [found])]
            spread = f" ({worst(values):.1%})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1%}{spread}" if values else "")
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
    told = [column for column in zip(*table, strict=True) if any(column[1:])]
    for number, cells in enumerate(zip(*told, strict=True)):
        print("| " + " | ".join(cells) + " |" + ("\n|" + "---|" * len(told) if number == 0 else ""))


if __name__ == "__main__":
    main()
