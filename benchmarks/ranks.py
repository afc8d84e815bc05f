"""Prints what a second rank brings: training steps, their walks included, on two one-thread ranks beside one one-thread rank.

OMP_NUM_THREADS=1 python benchmarks/ranks.py [--recipe thorough] [--concept "a cat"] [--steps 60] [--batch 1] [--rounds 3]

One rank and two take turns, each in fresh processes, and medians are compared. What comes before the first step (texts encoded,
layers solved) every rank does for itself; it is timed apart. Beside the clock stands the CPU time of the slowest rank, which is
what the clock would show if nothing else ran on the machine. `--batch 2` doubles the batch of both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

from tables import add_publish, show

from esd_lora import ranks
from esd_lora.adapter import add_adapter
from esd_lora.bases.loading import load_base
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe
from esd_lora.training import prepare_prompts, run_steps, start

BATCHES = ("batch_size", "preserve_batch", "null_batch")


def read_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe with numbers where it would measure, so that all runs do the same."""
    fixed = {"train.steps": options.steps, "train.lr": 1e-3, "train.preserve_weight": 1.0, "train.preview_every": 0}
    recipe = load_recipe(options.recipe, {**fixed, "eta": 1.0}, concepts=[options.concept])
    spec = recipe.train.model_copy(update={name: getattr(recipe.train, name) * options.batch for name in BATCHES})
    return recipe.model_copy(update={"train": spec, "closed_form": None})


def train_once(options: argparse.Namespace) -> None:
    """Train as one of the ranks; the main one prints how long it took, as JSON."""
    base = load_base("emoji", device="cpu")
    began = time.monotonic()
    recipe = read_recipe(options)
    teacher, _, _, guard, _ = prepare_prompts(base, recipe, ())
    parameters = add_adapter(base, base.family.modules(base.model, recipe.scope), recipe.lora, recipe.train.seed)
    state = start(teacher, parameters, {}, None, ())
    ranks.anywhere(False)  # none begins before all are there
    clock, cpu = time.monotonic(), time.process_time()
    run_steps(teacher, state, [], None, guard)
    spent = ranks.merge({ranks.rank(): time.process_time() - cpu})
    if ranks.is_main():
        latents = teacher.evaluations + state.student_samples
        times = {"before": clock - began, "seconds": time.monotonic() - clock, "cpu": max(spent.values())}
        print(json.dumps({"latents": latents, **times}))


def measure(count: int) -> dict[str, float]:
    """Return what a training on so many ranks took."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), __file__, *sys.argv[1:], "--once"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="thorough")
    parser.add_argument("--concept", default="a cat")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    add_publish(parser)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        train_once(options)
        return
    batch = sum(getattr(read_recipe(options).train, name) for name in BATCHES)
    load = os.getloadavg()[0]
    runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for count, results in runs.items():
            results.append(measure(count))
    head = ["ranks", "latents", "s before the first step", "s", "latents a second", "CPU s, slowest rank"]
    rows: list[list[str]] = []
    middle = {n: {key: median(run[key] for run in results) for key in results[0]} for n, results in runs.items()}
    for count, m in middle.items():
        pace = [f"{m['seconds']:.1f}", f"{m['latents'] / m['seconds']:.1f}", f"{m['cpu']:.1f}"]
        rows.append([str(count), f"{m['latents']:,.0f}", f"{m['before']:.1f}", *pace])
    one, two = middle[1], middle[2]
    clock, cpu = (one[key] / two[key] for key in ("seconds", "cpu"))
    note = (
        f"`{options.recipe}`, {options.steps} steps of {batch} latents; load {load:.1f} before; medians of {options.rounds}."
        f" Two ranks are {clock:.2f} times as fast by the clock, {cpu:.2f} times by CPU time."
    )
    show("ranks", head, rows, note, publish=options.publish)


if __name__ == "__main__":
    main()
