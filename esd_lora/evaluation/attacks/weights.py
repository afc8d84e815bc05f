"""Attacks on weights, by those who hold the model or the file: taking the eraser off, and teaching the concept again."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from esd_lora.adapter import add_adapter, load_adapter, remove_adapter
from esd_lora.erasers.stacking import stack
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks.victim import (
    Victim,
    captioned_latents,
    concept_pictures,
    require_at_least,
)
from esd_lora.evaluation.picture_files import hash_by_name
from esd_lora.evaluation.variants import Painter, Variant
from esd_lora.latents import require_encodable
from esd_lora.noising import BATCH, learn
from esd_lora.recipe import LoraSpec
from esd_lora.trajectory import pick


def negative_weight(victim: Victim, *, weight: float = -1.0) -> Variant:
    """Load the erasers once more on the erased model, at a negative weight.

    Whoever holds the eraser file can do this, in any program that loads LoRA files, merged or not: an eraser is removable by
    design, and at -1 what is left is the base. So no number below that of the base is expected here. It shows what an eraser is
    not for: keeping a concept from those who have both the model and the file.

    Args:
        victim: With the erasers that are on.
        weight: Times each eraser's own; -1 takes it off, below that the concept is amplified. Typically -1 to -2.

    Raises:
        EsdLoraError: If the weight is not negative, or no erasers are given.
    """
    if not weight < 0:
        raise EsdLoraError(f"the weight is {weight:g}, and this attack takes an eraser off. Give one below 0, such as -1.")
    if not victim.erasers:
        raise EsdLoraError("no eraser is given whose weight could be negative. Leave this attack out of the suite.")
    again = stack(victim.erasers, [strength._replace(weight=weight * strength.weight) for strength in victim.weights])

    @contextmanager
    def on() -> Generator[Painter]:
        with victim.erased.on() as paint:
            load_adapter(victim.base, again.pairs)
            try:
                yield paint
            finally:
                remove_adapter(victim.base)

    return Variant("attack-negative-weight", {"weight": weight, "victim": victim.erased.record}, on)


def fine_tune(
    victim: Victim,
    *,
    pictures: int = 8,
    folder: str | Path | None = None,
    steps: int = 50,
    rank: int = 4,
    lr: float = 1e-3,
    seed: int = 0,
) -> Variant:
    """Train a LoRA on every layer of the erased model, on a few pictures of the concept.

    The loss is the plain one, as anyone's fine-tuning script has it. That erased concepts come back so is known: Gao et al.,
    *Meta-Unlearning on Diffusion Models*, ICCV 2025, arXiv:2410.12777, train on pictures of the concept, as here; Liu and
    Zhang, *Erased or Dormant?*, arXiv:2505.16174, personalise on a few; Suriyakumar et al., *Unstable Unlearning*,
    arXiv:2410.08074, see concepts return when fine-tuning on something else altogether.

    Args:
        victim: With the prompts whose pictures the base paints to train on.
        pictures: Number of pictures; 4 to 30 typically.
        folder: Pictures of the attacker's own instead, with the concept's name for a caption.
        steps: Of the optimiser, `BATCH` points in each.
        rank: Of the LoRA.
        lr: Learning rate; 1e-4 for large models to 2e-3 for small ones.
        seed: Of pictures, LoRA and noise.

    Raises:
        EsdLoraError: If a setting is too small, there are no pictures, or the base's VAE is of another kind.
    """
    require_at_least(1, pictures=pictures, steps=steps, rank=rank)
    require_encodable(victim.base, "Leave attacks that learn from pictures out of the suite.")
    base, files = victim.base, concept_pictures(folder, victim, pictures)

    @contextmanager
    def on() -> Generator[Painter]:
        latents, captions = captioned_latents(victim, pictures, files, seed)
        with victim.erased.on() as paint:
            conditions = base.encode(captions, victim.guidance)
            layers = base.family.modules(base.model, "full")
            parameters = add_adapter(base, layers, LoraSpec(rank=rank, alpha=rank), seed)
            try:
                condition_of = partial(pick, conditions)
                options = {"times": victim.steps, "steps": steps, "lr": lr, "seed": seed, "desc": "fine-tuning"}
                learn(base, parameters, latents, condition_of, **options)
                yield paint
            finally:
                remove_adapter(base)

    record = {"pictures": pictures, "files": hash_by_name(files) or None, "steps": steps, "rank": rank, "lr": lr, "seed": seed}
    return Variant("attack-fine-tune", {**record, "batch": BATCH, "victim": victim.erased.record}, on)
