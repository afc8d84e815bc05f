"""Prints what `--dry-run` says beside what then happens: seconds and memory, each run in processes of its own.

    python benchmarks/estimates.py [--only fast,paper,sd15-instant,sd15-steps,sdxl-steps] [--out out/estimates]

The built-in base, and whole models of the size of SD 1.5 and SDXL with random weights (`real_size.py` writes them), in bfloat16
on latents of 256 x 256 pixels. Loading the base counts in neither column of seconds, and in both of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from real_size import SETTINGS, write_single_file
from tables import add_publish, show

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.estimates.estimate import Estimate, peak_memory
from esd_lora.estimates.pictures import estimate_evaluation, estimate_pictures
from esd_lora.estimates.stacking import estimate_fusing, estimate_harmonising
from esd_lora.estimates.training import estimate_training
from esd_lora.evaluation.evaluating import evaluate
from esd_lora.evaluation.preparing import prepare_evaluation
from esd_lora.fusing.closed_form import fuse
from esd_lora.fusing.harmonising import harmonise
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe
from esd_lora.sampling import generate
from esd_lora.training import train

STEPS: dict[str, Any] = {**SETTINGS, "train.trajectories": 2, "train.steps": 6}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "instant": ("emoji", "instant", {}),
    "fast": ("emoji", "fast", {}),
    "thorough": ("emoji", "thorough", {}),
    "paper": ("emoji", "paper", {"train.steps": 40}),
    "noxattn": ("emoji", "fast", {"scope": "noxattn", "train.steps": 60}),
    "pictures": ("emoji", "", {}),
    "evaluation": ("emoji", "", {"suite": "emoji-object"}),
    "fusing": ("emoji", "", {"stack": "fuse"}),
    "harmonising": ("emoji", "", {"stack": "harmonise"}),
    "sd15-instant": ("sd15", "instant", {}),
    "sd15-steps": ("sd15", "sd/fast", STEPS),
    "sd15-pictures": ("sd15", "", {}),
    "sdxl-steps": ("sdxl", "sdxl/fast", STEPS),
}
PICTURES = {"emoji": (32, None), "sd15": (2, 5)}
"""Base to the number of pictures, and of denoising steps."""


def recipe_of(source: str, settings: dict[str, Any], base: str) -> Recipe:
    """Return what a run trains; on random weights nothing is left to a probe."""
    fixed = {} if base == "emoji" or source == "instant" else {"preserve": ["a dog"]}
    return load_recipe(source, {"train.preview_every": 0, **settings}, concepts=["a cat"], base=base, **fixed)


def run(name: str, folder: Path, stage: str) -> dict[str, Any]:
    """Return what a stage of a run says: the estimate, or what happened."""
    model, source, settings = RUNS[name]
    file = model if model == "emoji" else str(folder / f"{model}.safetensors")
    dtype = None if model == "emoji" else torch.bfloat16
    base = load_base(file, device="cpu", dtype=dtype, vae=not source)
    if suite := settings.get("suite"):
        return evaluation(base, suite, stage)
    if how := settings.get("stack"):
        return stacking(base, how, stage)
    if source:
        recipe = recipe_of(source, settings, file)
        if stage == "estimate":
            return row_of(estimate_training(recipe, base, written=False))
        started = time.monotonic()
        train(recipe, base=base, progress=False)
    else:
        count, steps = PICTURES[model]
        if stage == "estimate":
            return row_of(estimate_pictures(base, count, steps=steps))
        started = time.monotonic()
        generate(base, ["a photograph of a dog"], seeds=range(count), steps=steps)
    return {"seconds": time.monotonic() - started, "memory": peak_memory(base)}


def evaluation(base: Base, suite: str, stage: str) -> dict[str, Any]:
    """Return what a stage of an evaluation of the base alone says, as far as the cat goes."""
    with tempfile.TemporaryDirectory() as folder:
        if stage == "estimate":
            return row_of(estimate_evaluation(prepare_evaluation(base, suite, folder, concepts=["a cat"])))
        started = time.monotonic()
        evaluate(base, suite, Path(folder) / "measured", concepts=["a cat"], progress=False)
        return {"seconds": time.monotonic() - started, "memory": peak_memory(base)}


def stacking(base: Base, how: str, stage: str) -> dict[str, Any]:
    """Return what a stage of stacking two erasers by `instant` says."""
    recipes = [load_recipe("instant", concepts=[name]) for name in ("a cat", "a rocket")]
    members = [train(recipe, base=base, progress=False) for recipe in recipes]
    estimate, work = (estimate_fusing, fuse) if how == "fuse" else (estimate_harmonising, harmonise)
    if stage == "estimate":
        return row_of(estimate(members, base))
    started = time.monotonic()
    work(members, base, progress=False)
    return {"seconds": time.monotonic() - started, "memory": peak_memory(base)}


def row_of(estimate: Estimate) -> dict[str, Any]:
    """Return the seconds and the memory of an estimate; of a range its least, which is where these runs end."""
    return {"seconds": estimate.seconds()[0], "memory": estimate.memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--out", type=Path, default=Path("out/estimates"))
    parser.add_argument("--stage", choices=["write", "estimate", "run"], help=argparse.SUPPRESS)
    add_publish(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.only.split(",")
    if options.stage == "write":
        write_single_file(RUNS[names[0]][0], options.out)
        return
    if options.stage:
        print(json.dumps(run(names[0], options.out, options.stage)))
        return
    rows: list[list[str]] = []
    for name in names:
        command = [sys.executable, __file__, "--only", name, "--out", str(options.out), "--stage"]
        model = RUNS[name][0]
        if model != "emoji" and not (options.out / f"{model}.safetensors").exists():
            subprocess.run([*command, "write"], check=True, stderr=subprocess.DEVNULL)
        before, after = (
            json.loads(subprocess.run([*command, stage], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            for stage in ("estimate", "run")
        )
        cells = [name]
        for key, unit in (("seconds", 1), ("memory", 2**30)):
            cells += [f"{before[key] / unit:.1f}", f"{after[key] / unit:.1f}", f"{before[key] / after[key]:.2f}"]
        rows.append(cells)
    head = ["run", "seconds, said", "seconds", "ratio", "GiB, said", "GiB", "ratio"]
    show("estimates", head, rows, publish=options.publish)


if __name__ == "__main__":
    main()
