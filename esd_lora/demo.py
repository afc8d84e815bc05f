"""The demo: erase an object and a style on the built-in base, stack, merge, and measure all of it.

At floor 4 beside the command line: the one place that strings the verbs together.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from esd_lora.applying import applied
from esd_lora.eraser import Eraser
from esd_lora.evaluation.domain_suite import Scored, count, every_pair, kept, of_object, of_style, score
from esd_lora.evaluation.judge import Judge
from esd_lora.evaluation.report import table, write_report
from esd_lora.families import Base, load_base
from esd_lora.merging import merge
from esd_lora.outputs import clear_output
from esd_lora.pictures import grid, paint
from esd_lora.recipe_files import load_recipe
from esd_lora.stacking import stack
from esd_lora.training import train

OBJECT, STYLE = "cat", "twemoji"
_SHOTS = 60
_FILES = ("summary.json", "report.html", "grid.png")


def demo(out: str | Path, *, force: bool = False) -> str:
    """Runs the demo and returns the table it prints.

    Writes the two erasers, their stack, the merged pipeline, `grid.png`, `report.html` and `summary.json` into `out`.

    Args:
        out: Directory to make.
        force: Write over an earlier demo in it.

    Raises:
        EsdLoraError: If `out` is not empty and `force` is not set.
    """
    started, out = time.monotonic(), Path(out)
    clear_output(out, force, _FILES)
    base, judge = load_base("emoji"), Judge("emoji")
    object_eraser = train(load_recipe(f"emoji-{OBJECT}"), base=base, out=out / f"no-{OBJECT}", force=True)
    style_eraser = train(load_recipe(f"emoji-{STYLE}"), base=base, out=out / f"no-{STYLE}", force=True)
    both = stack([object_eraser, style_eraser])
    both.save(out / "stack")
    merged = load_base(merge([out / "stack"], "emoji", out / "merged", force=True))

    variants: dict[str, tuple[Base, list[Eraser], set[str], set[str]]] = {
        "base": (base, [], set(), set()),
        f"no {OBJECT}": (base, [object_eraser], {OBJECT}, set()),
        f"no {STYLE}": (base, [style_eraser], set(), {STYLE}),
        "stack": (base, [both], {OBJECT}, {STYLE}),
        "merged": (merged, [], {OBJECT}, {STYLE}),
    }
    trained = {prompt for eraser in (object_eraser, style_eraser) for c in eraser.header.concepts for prompt, _ in c.pairs}
    suites = {"pairs": every_pair(), "object": of_object(OBJECT, trained, _SHOTS), "style": of_style(STYLE, trained, _SHOTS)}
    shots = [shot for suite in suites.values() for shot in suite]
    columns = [f"a {OBJECT} in ink style", f"a picture of a {OBJECT} in blob style", f"an apple, {STYLE} style"]
    columns += [
        f"a {STYLE} drawing of a house",
        "a dog in fluent style",
        "a rocket in noto style",
        "blob owl",
        "a car in ink style",
    ]
    scores: dict[str, dict[str, list[Scored]]] = {}
    rows: dict[str, Any] = {}
    for name, (model, erasers, _, _) in variants.items():
        with applied(model, erasers):
            # The merged pipeline is a directory like any other and has no habits of its own.
            habits: dict[str, Any] = {"steps": base.steps, "guidance": base.guidance}
            scored = score(model, judge, shots, desc=f"measuring {name}", **habits)
            rows[name] = paint(model, columns, range(len(columns)), **habits)
        scores[name], at = {}, 0
        for suite, members in suites.items():
            scores[name][suite] = scored[at : at + len(members)]
            at += len(members)

    summary: dict[str, Any] = {
        "erased": {"object": OBJECT, "style": STYLE},
        "models": {
            name: _summarise(scores[name], scores["base"], objects, styles)
            for name, (_, _, objects, styles) in variants.items()
        },
        "merged_equals_stack": {
            "same_verdicts": count(
                a.verdict[:2] == b.verdict[:2]
                for suite in suites
                for a, b in zip(scores["merged"][suite], scores["stack"][suite], strict=True)
            ).as_json(),
            "mean_pixel_difference": round(_difference(rows["merged"], rows["stack"]), 4),
        },
        "training": {"object": object_eraser.header.cost, "style": style_eraser.header.cost},
        "seeds": {"training": 0, "pairs": [0, len(suites["pairs"]) - 1], "object": [0, _SHOTS - 1], "style": [0, _SHOTS - 1]},
        "sampling": {"steps": base.steps, "guidance": base.guidance},
        "versions": {name: version(name) for name in ("esd-lora", "torch", "diffusers", "peft", "transformers")},
        "seconds": round(time.monotonic() - started, 1),
    }
    grid(rows, columns).save(out / "grid.png")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    lines = table(summary)
    write_report(out / "report.html", out / "grid.png", lines, summary)
    text = "\n".join("  ".join(f"{cell:>14}" for cell in line) for line in lines)
    return f"{text}\n{summary['seconds']:.0f} s. Look at {out / 'report.html'} and {out / 'grid.png'}."


def _difference(some: list[Image], others: list[Image]) -> float:
    """Mean absolute difference of pixels, of 255."""
    pairs = zip(some, others, strict=True)
    return float(np.mean([np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean() for a, b in pairs]))


def _summarise(
    scored: dict[str, list[Scored]], before: dict[str, list[Scored]], objects: set[str], styles: set[str]
) -> dict[str, Any]:
    """One model's numbers: accuracy on what it erased and on the rest, and on every concept."""
    pairs = scored["pairs"]
    object_left, style_left = count(s.object_right for s in scored["object"]), count(s.style_right for s in scored["style"])
    left = [part.share for part, erased in ((object_left, objects), (style_left, styles)) if erased]
    return {
        "erased": round(sum(left) / len(left), 4) if left else None,
        "object_left": object_left.as_json(),
        "style_left": style_left.as_json(),
        "object_right_on_style_prompts": count(s.object_right for s in scored["style"]).as_json(),
        "kept": round(kept(pairs, before["pairs"], objects, styles), 4),
        "objects": {
            name: count(s.object_right for s in pairs if s.shot.object == name).as_json()
            for name in dict.fromkeys(str(s.shot.object) for s in pairs)
        },
        "styles": {
            name: count(s.style_right for s in pairs if s.shot.style == name).as_json()
            for name in dict.fromkeys(str(s.shot.style) for s in pairs)
        },
    }
