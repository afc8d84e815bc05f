"""Prints what the README's quick starts are expected to take: minutes, memory of the card, disk. Estimates; no card was there.

    python benchmarks/quick_starts.py [--rate 20]

Work is what `train --dry-run` counts for the family's preset beside the package's keep list: rehearsed on a toy of the
family, for how many latents and texts go through a model does not depend on its size. What one of each costs is counted on
the published configuration, in floating-point operations, on the meta device. Both together, divided by `--rate`, are
minutes: the rate is an assumption, to be replaced by one's own. Memory is `train --fit`'s plan (`esd_lora.memory_plans`);
disk is the weights in 16 bits. Loading, previews and solving the layers in closed form are left out: the last takes 20 s on
SD 1.5 and 150 s on SDXL, on two CPU cores, text included (`real_size.py`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from tables import add_publish, show
from torch.utils.flop_counter import FlopCounterMode

from esd_lora.adapter import add_adapter
from esd_lora.bases.base import Base
from esd_lora.bases.outlines import outline_published
from esd_lora.estimates.estimate import Work
from esd_lora.estimates.training import estimate_training
from esd_lora.memory_plans import GIB, fit
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe
from esd_lora.teacher import latent_shapes
from toys import load_toy, save_toy

QUICK_STARTS = {"SD 1.5": ("sd", 6), "SDXL": ("sdxl", 12), "Flux.1 dev": ("flux-dev", 24)}
"""Published model to the toy of its family, and the GB of the card in README's command."""
SETTINGS = {"train.preview_every": 0}


def rehearse(toy: str, preset: str) -> tuple[Work, Work]:
    """Return the work of a preset at least, where the closed form does all there is to do, and at most."""
    with tempfile.TemporaryDirectory() as folder:
        base = load_toy(save_toy(toy, Path(folder) / toy))
        estimate = estimate_training(load_recipe(preset, SETTINGS, concepts=["a cat"], base=base.id), base, written=False)
    return estimate.least, estimate.most


def operations(base: Base, recipe: Recipe) -> dict[str, float]:
    """Return the floating-point operations of one text, one evaluation and one training sample of an outlined base."""
    shapes = base.family.condition_shapes(base.pipe)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as denoising:
        condition = {name: torch.zeros(1, *shape, dtype=base.model.dtype) for name, shape in shapes.items()}
        if base.family.takes_guidance(base.pipe):
            condition["guidance"] = torch.ones(1)
        base.predict(torch.zeros(1, *latent_shapes(base, recipe.train)[0]), torch.zeros(1), condition)
    longest = base.family.call_kwargs(base.pipe).get("max_sequence_length", shapes["prompt_embeds"][0])
    encoders = [part for name, part in base.pipe.components.items() if name.startswith("text_encoder") and part is not None]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as encoding:
        for encoder in encoders:
            places = min(longest, getattr(encoder.config, "max_position_embeddings", longest))
            encoder(input_ids=torch.zeros(1, places, dtype=torch.long))
    evaluation = denoising.get_total_flops()
    forward_and_backward = 4 if recipe.train.gradient_checkpointing else 3  # in units of a forward pass
    return {
        "text": encoding.get_total_flops(),
        "evaluation": evaluation,
        "student sample": forward_and_backward * evaluation,
    }


def total(work: Work, each: dict[str, float]) -> float:
    """Return the floating-point operations of some work."""
    return work.texts * each["text"] + work.evaluations * each["evaluation"] + work.student_samples * each["student sample"]


def row(model: str, toy: str, card: int, rate: float) -> list[str]:
    """Return a model's row: card, setting, memory, work, minutes, disk."""
    base = outline_published(model)
    recipe = load_recipe(base.family.preset, concepts=["a cat"])
    plan = fit(base, recipe, card * GIB)
    chosen = plan.setting.applied(recipe)
    each = operations(base, chosen)
    least, most = (total(work, each) for work in rehearse(toy, base.family.preset))
    weights = 2 * sum(
        weight.numel()
        for part in base.pipe.components.values()
        if isinstance(part, torch.nn.Module)
        for weight in part.parameters()
    )
    trained = add_adapter(base, base.family.modules(base.model, recipe.scope), recipe.lora, 0)
    size = sum(4 * parameter.numel() for parameter in trained)
    minutes = [f"{count / rate / 60:.0f}" if count > 60 * rate else "under 1" for count in (least, most)]
    return [
        model,
        f"{card} GB",
        plan.setting.describe(),
        f"{plan.needed / GIB:.1f} GiB",
        f"{least / 1e15:.1f} to {most / 1e15:.0f} PFLOP",
        " to ".join(minutes),
        f"{weights / 1e9:.1f} GB",
        f"{size / 1e6:.1f} MB",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=20, help="TFLOP/s that the card does in practice")
    add_publish(parser)
    options = parser.parse_args()
    rows = [row(model, *rest, rate=options.rate * 1e12) for model, rest in QUICK_STARTS.items()]
    head = ["model", "card", "setting", "memory", "work", f"minutes at {options.rate:g} TFLOP/s", "base on disk", "eraser"]
    note = (
        "Estimates: work as `--dry-run` counts it, from what the closed form alone needs to 450 steps; memory as `--fit`"
        " plans it; the speed is an assumption. Beside loading, and solving in closed form."
    )
    show("quick-starts", head, rows, note, publish=options.publish)


if __name__ == "__main__":
    main()
