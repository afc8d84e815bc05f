"""The demo: erase an object and a style on the built-in base, stack, merge, and measure all of it.

It stands on top, beside the command line: the one place that strings the verbs together.
"""

from __future__ import annotations

import time
from pathlib import Path

from esd_lora.adapter import applied
from esd_lora.bases.loading import load_base
from esd_lora.erasers.stacking import stack
from esd_lora.evaluation.evaluating import evaluate
from esd_lora.files import check_directory, write_atomically
from esd_lora.formats.cards import save_with_card
from esd_lora.pictures import grid, paint, png
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train
from esd_lora.weights.merging import merge

OBJECT, STYLE = "cat", "twemoji"
MEASURED = "measured"
"""Folder of the evaluation below the demo's."""
_COLUMNS = (
    f"a {OBJECT} in ink style",
    f"a picture of a {OBJECT} in blob style",
    f"an apple, {STYLE} style",
    f"a {STYLE} drawing of a house",
    "a dog in fluent style",
    "a rocket in noto style",
    "blob owl",
    "a car in ink style",
)


def demo(out: str | Path, *, force: bool = False) -> str:
    """Run the demo and return what it prints.

    Writes the two erasers, their stack, the merged pipeline, `grid.png`, and an evaluation of all of them in `measured`.

    Args:
        out: Directory to make.
        force: Write over an earlier demo in it.

    Raises:
        EsdLoraError: If `out` is not empty and `force` is not set.
    """
    started, out = time.monotonic(), Path(out)
    check_directory(out, force)
    base = load_base("emoji")
    erasers = [train(load_recipe(f"emoji-{name}"), base=base, out=out / f"no-{name}", force=True) for name in (OBJECT, STYLE)]
    save_with_card(stack(erasers), out / "stack")
    merged = load_base(merge([out / "stack"], "emoji", out / "merged", force=True))
    rows = {}
    for name, on in {"base": [], f"no {OBJECT}": erasers[:1], f"no {STYLE}": erasers[1:], "stack": erasers}.items():
        with applied(base, on):
            rows[name] = paint(base, _COLUMNS, range(len(_COLUMNS)))
    # The merged pipeline is a directory like any other and has no defaults of its own.
    rows["merged"] = paint(merged, _COLUMNS, range(len(_COLUMNS)), steps=base.steps, guidance=base.guidance)
    write_atomically(out / "grid.png", png(grid(rows, _COLUMNS)))
    measured = out / MEASURED
    evaluate(base, "emoji-demo", measured, erasers=erasers, stack=True, against=[str(out / "merged")], force=force)
    text = (measured / "table.md").read_text("utf-8")
    return f"{text}\n{time.monotonic() - started:.0f} s. Look at {measured / 'report.html'} and {out / 'grid.png'}."
