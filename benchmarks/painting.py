"""Pictures per second of an evaluation beside a bare diffusers loop: the same base, prompts and seeds, PNG files on the disk.

    OMP_NUM_THREADS=2 python benchmarks/painting.py [--only emoji,sd15] [--rounds 5] [--out out/painting]

- `bare loop`: `pipe(prompt, generator=...)` for one prompt at a time, each picture saved: what a model card shows.
- `bare batches`: the same with as many prompts a call as esd-lora takes.
- `esd-lora`: `paint_missing`, which is all that `evaluate` does between its plan and its detectors.

Ways take turns, in the other order each round, in one process; a ratio is the median of those within a round. `emoji` is the
built-in base: 64 pictures, 12 steps. `sd15` is a Stable Diffusion 1.5 of random weights in float32 that paints 256 x 256 pixels
in 2 steps, which takes minutes a round on two cores. CPU seconds count all threads, and say what other work on the machine
hides. After the rounds come shares of esd-lora's time by what it does, and how many pictures differ from the bare loop's, and
by how much at most: a batch of another size adds floating-point numbers in another order.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
import torch
from tables import add_publish, show
from timing import timed

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.evaluation import scoring
from esd_lora.evaluation.cases import Case, pair_cases
from esd_lora.evaluation.picture_files import painted_file
from esd_lora.evaluation.variants import bare
from esd_lora.pictures import open_picture, pictures_at_once

PICTURES = {"emoji": 64, "sd15": 2}
SIDE = 256  # pixels of a picture of sd15


def load(name: str, folder: Path) -> Base:
    """Return the base, and of `sd15` one that paints small pictures in few steps."""
    if name == "emoji":
        return load_base("emoji", device="cpu")
    from real_size import write_single_file

    file = folder / f"{name}.safetensors"
    base = load_base(file if file.is_file() else write_single_file(name, folder), device="cpu", dtype=torch.float32)
    base.model.register_to_config(sample_size=SIDE // base.pipe.vae_scale_factor)
    base.steps = 2
    return base


def paint_bare(base: Base, cases: list[Case], folder: Path, batch: int) -> None:
    """Paint and save as a user of diffusers would."""
    folder.mkdir(parents=True)
    side = base.latent_shape()[1] * base.pipe.vae_scale_factor
    for first in range(0, len(cases), batch):
        part = cases[first : first + batch]
        images = base.pipe(
            [case.prompt for case in part],
            height=side,
            width=side,
            num_inference_steps=base.steps,
            guidance_scale=base.guidance,
            generator=[torch.Generator().manual_seed(case.seed) for case in part],
        ).images
        for case, image in zip(part, images, strict=True):
            image.save(folder / f"{case.id}.png")


def paint_ours(base: Base, cases: list[Case], folder: Path) -> None:
    scoring.paint_missing(folder, [bare(base, base.steps, base.guidance)], cases, progress=False)


def shares(base: Base, cases: list[Case], folder: Path) -> dict[str, float]:
    """Return what part of esd-lora's time each kind of work takes; writing runs beside the others."""
    spent = dict.fromkeys(("encoding text", "denoising", "decoding", "writing, beside"), 0.0)

    with ExitStack() as stack:
        stack.enter_context(timed(spent, "encoding text", base.pipe, "encode_prompt"))
        stack.enter_context(timed(spent, "denoising", base.model, "forward"))
        stack.enter_context(timed(spent, "decoding", base.pipe.vae, "decode"))
        stack.enter_context(timed(spent, "writing, beside", scoring, "_write_painted"))
        started = time.perf_counter()
        paint_ours(base, cases, folder)
        whole = time.perf_counter() - started
    return {label: seconds / whole for label, seconds in spent.items()}


def differences(cases: list[Case], ours: Path, theirs: Path) -> str:
    """Return how many pictures differ, and by how much at most of 255."""
    pairs = [(painted_file(ours, "base", case.id), theirs / f"{case.id}.png") for case in cases]
    apart = [int(np.abs(np.subtract(*(np.asarray(open_picture(p), np.int16) for p in pair))).max()) for pair in pairs]
    return f"{sum(map(bool, apart))} of {len(apart)} differ, by {max(apart)} of 255 at most"


def measure(name: str, folder: Path, rounds: int) -> tuple[list[list[str]], str]:
    """Return the rows of a base, and a line on batches, shares of the time, and pixels."""
    base = load(name, folder)
    cases = pair_cases()[: PICTURES[name]]
    batch = pictures_at_once(base)
    ways: dict[str, Callable[[Path], None]] = {
        "bare loop": lambda place: paint_bare(base, cases, place, 1),
        "bare batches": lambda place: paint_bare(base, cases, place, batch),
        "esd-lora": lambda place: paint_ours(base, cases, place),
    }
    places = {way: folder / f"{name}-{way.replace(' ', '-')}" for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    work: dict[str, list[float]] = {way: [] for way in ways}
    paint_bare(base, cases[:1], folder / "warm", 1)  # what is done once is done
    shutil.rmtree(folder / "warm")
    for i in range(rounds):
        for way in sorted(ways, reverse=bool(i % 2)):
            shutil.rmtree(places[way], ignore_errors=True)
            started, before = time.perf_counter(), time.process_time()
            ways[way](places[way])
            seconds[way].append(time.perf_counter() - started)
            work[way].append(time.process_time() - before)
    rows: list[list[str]] = []
    for way, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(times, seconds["esd-lora"], strict=True)]
        cells = [name, way, f"{len(cases) / statistics.median(times):.3g}", f"{statistics.median(work[way]) / len(cases):.3g}"]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        rows.append(cells)
    apart = differences(cases, places["esd-lora"], places["bare loop"])
    shutil.rmtree(places["esd-lora"])
    parts = ", ".join(f"{label} {share:.1%}" for label, share in shares(base, cases, places["esd-lora"]).items())
    return rows, f"{name}, {len(cases)} pictures, batches of {batch}: {parts}; beside the bare loop's {apart}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PICTURES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/painting"))
    add_publish(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table: list[list[str]] = []
    notes = [f"{torch.get_num_threads()} threads, {options.rounds} rounds."]
    for name in options.only.split(","):
        rows, note = measure(name, options.out, options.rounds)
        table += rows
        notes.append(note)
    head = ["base", "way", "pictures a second", "CPU s a picture", "esd-lora is faster by"]
    show(f"painting-{options.only.replace(',', '-')}", head, table, " ".join(notes), publish=options.publish)


if __name__ == "__main__":
    main()
