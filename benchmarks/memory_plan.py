"""Prints the memory that trainings are planned to take on cards, and how far plans are from what happens on the CPU.

    python benchmarks/memory_plan.py            # the table, from published configurations; no weights are needed
    python benchmarks/memory_plan.py --check    # one step on the size of SD 1.5, random weights in float32: planned, taken
    python benchmarks/memory_plan.py --int8     # an eraser made beside the built-in base in int8, judged on the whole base

What CUDA's context takes and its allocator loses is an allowance (`memory_plans.with_allowances`), for it was run on no card.
`--check` compares with the most that the process held while it trained, beyond what it held with the base loaded (Linux).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from tables import add_publish, show

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.bases.outlines import outline_published
from esd_lora.memory_plans import GIB, fit, plans
from esd_lora.recipe_files import load_recipe

CARDS = [("SD 1.5", 6), ("SDXL", 10), ("SD 3.5 medium", 12), ("Flux.1 dev", 16), ("Flux.1 dev", 24)]
CARDS += [("PixArt-Sigma", 12), ("Lumina 2", 12), ("Lumina 2", 16), ("Qwen-Image", 24), ("Kolors", 16)]
CARDS += [("Wan 2.1 1.3B", 16)]
PHASES = ("text", "closed form", "walk", "step", "painting")
SETTINGS = {
    "train.steps": 2,
    "train.trajectories": 1,
    "train.preserve_trajectories": 1,
    "train.resolution": 256,
    "train.trajectory_steps": 2,
    "train.preserve_steps": 2,
    "train.preview_every": 0,
    "train.checkpoint_every": 0,
    "train.lr": 1e-3,
    "train.preserve_weight": 1.0,
}
"""Two steps on 256 x 256 pixels, with numbers: on random weights there is nothing to measure."""


def print_table(publish: bool) -> None:
    """Print a row for each model and card: the setting, and the planned GiB of every phase."""
    rows: list[list[str]] = []
    for model, size in CARDS:
        base = outline_published(model)
        plan = fit(base, load_recipe(base.family.preset, concepts=["a cat"]), size * GIB)
        phases = {name.partition(",")[0]: bytes_ / GIB for name, bytes_ in plan.phases.items()}
        cells = [model, f"{size} GB", plan.setting.describe(), *(f"{phases[name]:.1f}" for name in PHASES)]
        rows.append([*cells, f"{plan.needed / GIB:.1f}"])
    note = "The family's preset; GiB of tensors in each phase, and of the card with allowances."
    show("memory-plan", ["model", "card", "setting", *PHASES, "planned"], rows, note, publish=publish)


def memory(key: str) -> int:
    """Return a figure of this process's memory in bytes, as Linux has it: VmRSS now, VmHWM the most since it was reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return int(lines[key].split()[0]) * 1024


def random_base() -> Base:
    """Return SD 1.5 with random weights in float32; the text encoder's are read from nowhere, so prompts mean nothing."""
    from real_size import fill
    from transformers import CLIPTokenizer

    from esd_lora.bases.single_file import unpacked_config

    base = outline_published("SD 1.5", torch.float32)
    for part in ("unet", "text_encoder"):
        setattr(base.pipe, part, fill(getattr(base.pipe, part), torch.float32).requires_grad_(False).eval())
    base.pipe.vae = None
    with unpacked_config("sd1") as folder:
        base.pipe.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return base


def check(publish: bool) -> None:
    """Print what two steps were planned to take beside the loaded base, and what they took."""
    from esd_lora.training import train

    rows: list[list[str]] = []
    before = memory("VmRSS")
    base = random_base()
    base.pipe.text_encoder.requires_grad_(False)
    for checkpointing in (True, False):
        settings = {**SETTINGS, "train.gradient_checkpointing": checkpointing}
        fields = {"concepts": [{"name": "a cat", "anchor": "a dog"}], "preserve": ["a hat"], "base": base.id}
        recipe = load_recipe("sd/fast", settings, scope="noxattn", frames=(), eta=0.0, anchor=None, closed_form=None, **fields)
        phases = next(plans(outline_published("SD 1.5", torch.float32), recipe, ("float32",))).phases
        encoder = sum(weight.nbytes for weight in base.pipe.text_encoder.parameters())
        planned = max(phases["walk"], phases["step"]) + encoder  # which stays on a base that is given
        Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
        train(recipe, base=base, progress=False)
        taken = memory("VmHWM") - before
        rows.append([str(checkpointing), f"{planned / GIB:.2f}", f"{taken / GIB:.2f}", f"{planned / taken:.2f}"])
    head = ["gradient checkpointing", "planned, GiB", "taken, GiB", "ratio"]
    show("memory-plan-check", head, rows, "SD 1.5, random weights, 256 x 256 pixels.", publish=publish)


def judge_int8(publish: bool) -> None:
    """Print how far the built-in base in int8 is from itself, and what erasers made beside it leave on the whole base."""
    from counting import SHOTS, Yardstick

    from esd_lora.training import train

    whole, quantized = load_base("emoji"), load_base("emoji", dtype="int8")
    x_t = torch.randn(64, *whole.latent_shape(), generator=torch.Generator().manual_seed(0))
    t, prompts = torch.arange(10, 1000, 990 // 64)[:64], [*whole.keep[:63], ""]
    with torch.no_grad():
        exact, near = (base.predict(x_t, t, base.encode(prompts)) for base in (whole, quantized))
    error = float((near - exact).norm() / exact.norm())
    yardstick, rows = Yardstick(whole, Path("out/memory_plan")), list[list[str]]()
    fixed = {"train.steps": 60, "train.preview_every": 0}
    for preset, scope, settings in (("instant", "xattn", {"train.preview_every": 0}), ("fast", "noxattn", fixed)):
        recipe = load_recipe(preset, settings, concepts=[{"name": "a cat", "anchor": "a dog"}], scope=scope)
        for dtype in ("float32", "int8"):
            eraser = train(recipe, dtype=dtype, progress=False)
            measured = yardstick.measure([eraser], {"cat"}, set())
            cells = [measured[name] for name in ("object_left", "kept", "kept_unlisted", "kept_bare")]
            shares = [f"{statistics.mean(cell) if isinstance(cell, list) else cell:.1%}" for cell in cells]
            rows.append([f"`{preset}`", f"`{scope}`", dtype, *shares])
    head = ["preset", "scope", "made in", "left", "kept", "kept, in no list", "kept, no style named"]
    note = f"Cats, {SHOTS} pictures; predictions in int8 are off by {error:.2%} of their size, over 64 latents."
    show("int8", head, rows, note, publish=publish)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true")
    what.add_argument("--int8", action="store_true")
    add_publish(parser)
    options = parser.parse_args()
    (check if options.check else judge_int8 if options.int8 else print_table)(options.publish)


if __name__ == "__main__":
    main()
