"""Erasers on the built-in base under attack: what is left, what is kept, and what each attack brings back.

    OMP_NUM_THREADS=1 python benchmarks/robustness.py [--seeds 0,1,2] [--concept cat] [--anchor dog]
        [--scopes xattn,noxattn,full] [--objectives esd,contrast] [--part 0/1]

Every eraser is trained by `fast`, with another scope and objective, and measured by the suite `emoji-attack`: 40 pictures on
prompts that it was not trained on, painted by the base, with the eraser, and under each attack, and all other objects and
styles. `esd` has the empty anchor and eta 3, `contrast` the anchor and eta 1 (with the empty one it would be `esd`). What lies
in `--out` is not made again; `--part 0/2` does every second.

- left: pictures of what was erased where the judge still names it; of the base, its own rate.
- kept: pictures of the rest with object and style right.
- the other columns: the same as left, with an attacker's help (`docs/evaluation.md`).
"""

from __future__ import annotations

import argparse
import datetime
from itertools import product
from pathlib import Path

from esd_lora.bases.loading import load_base
from esd_lora.erasers.measured import Number
from esd_lora.evaluation.cases import fill_template
from esd_lora.evaluation.evaluating import evaluate
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/robustness"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--anchor", default="dog", help="of `contrast`: what appears instead")
    parser.add_argument("--scopes", default="xattn,noxattn,full")
    parser.add_argument("--objectives", default="esd,contrast")
    parser.add_argument("--part", default="0/1", help="which of several processes this is")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    base, rows = load_base("emoji"), dict[tuple[str, ...], list[dict[str, Number]]]()
    choices = (options.scopes, options.objectives, options.seeds)
    for number, (scope, objective, seed) in enumerate(product(*(text.split(",") for text in choices))):
        if number % parts != part:
            continue
        folder = options.out / "-".join((options.concept, scope, objective, seed))
        if not (folder / "eraser" / "README.md").exists():
            settings = {"train.seed": int(seed), "train.preview_every": 0, "train.probe_every": 0}
            concept = {"name": options.concept, "prompts": [fill_template("{a}", options.concept)]}
            if objective == "contrast":
                concept, settings = concept | {"anchor": fill_template("{a}", options.anchor)}, settings | {"eta": 1.0}
            recipe = load_recipe("fast", settings, concepts=[concept], scope=scope, objective=objective)
            train(recipe, base=base, out=folder / "eraser", force=True)
        numbers = evaluate(base, "emoji-attack", folder / "measured", erasers=[folder / "eraser"]).variants
        columns = {"left": numbers["erased"]["target"]["accuracy"], "kept": numbers["erased"]["general"]["accuracy"]}
        columns["base"] = numbers["base"]["target"]["accuracy"]
        attacks = {name.removeprefix("attack-"): of["target"]["accuracy"] for name, of in numbers.items() if "attack" in name}
        rows.setdefault((scope, objective), []).append({**columns, **attacks})
    print(f"\n{datetime.date.today()}; training seeds {options.seeds}; shares over all, and of how many pictures\n")
    names = list(next(iter(rows.values()))[0])
    print(f"| scope | objective | {' | '.join(names)} |\n" + "|---" * (2 + len(names)) + "|")
    for row, runs in rows.items():
        counts = [(sum(run[name].hits or 0 for run in runs), sum(run[name].of for run in runs)) for name in names]
        print(f"| {' | '.join(row)} | {' | '.join(f'{hits / of:.1%} (of {of})' for hits, of in counts)} |")


if __name__ == "__main__":
    main()
