"""Prints what `--teacher-cache` saves: a training without it, one that fills it, and one with another rank that finds it.

OMP_NUM_THREADS=1 python benchmarks/teacher_cache.py [--recipe thorough] [--concept "a cat"]
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

from esd_lora.bases.loading import load_base
from esd_lora.prediction_cache import FILE_NAME
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="thorough")
    parser.add_argument("--concept", default="a cat")
    options = parser.parse_args()
    base = load_base("emoji")
    print(f"{datetime.date.today()}; {options.recipe}, {options.concept}\n")
    print("| run | evaluations | student samples | CPU s | cache, MB |\n|---|---|---|---|---|")
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
            work = f"{cost['sample_evaluations']:,.0f} | {cost['student_samples']:,.0f}"
            print(f"| {run} | {work} | {time.process_time() - started:.1f} | {size:.1f} |", flush=True)


if __name__ == "__main__":
    main()
