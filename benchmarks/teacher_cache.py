"""Prints what `--teacher-cache` saves: a training without it, one that fills it, and one with another rank that finds it.

OMP_NUM_THREADS=1 python benchmarks/teacher_cache.py [--recipe thorough] [--concept "a cat"]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

from tables import add_publish, show

from esd_lora.bases.loading import load_base
from esd_lora.prediction_cache import FILE_NAME
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="thorough")
    parser.add_argument("--concept", default="a cat")
    add_publish(parser)
    options = parser.parse_args()
    base = load_base("emoji")
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for run, cache, settings in (
            ("without a cache", None, {}),
            ("with an empty one", folder, {}),
            ("with it filled, rank 8", folder, {"lora.rank": 8, "lora.alpha": 8}),
        ):
            started = time.process_time()
            recipe = load_recipe(options.recipe, settings, concepts=[options.concept])
            cost = train(recipe, base=base, progress=False, teacher_cache=cache).header.cost
            size = (Path(folder) / FILE_NAME).stat().st_size / 1e6 if cache else 0.0
            work = [f"{cost['sample_evaluations']:,.0f}", f"{cost['student_samples']:,.0f}"]
            rows.append([run, *work, f"{time.process_time() - started:.1f}", f"{size:.1f}"])
    head = ["run", "evaluations", "student samples", "CPU s", "cache, MB"]
    show("teacher-cache", head, rows, f"`{options.recipe}`, {options.concept}.", publish=options.publish)


if __name__ == "__main__":
    main()
