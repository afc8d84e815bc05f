"""Attacks on the start: from a picture of the concept instead of noise alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks.victim import Victim, concept_pictures, require_stable_diffusion
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.picture_files import hash_by_name
from esd_lora.evaluation.variants import Variant, make_painter
from esd_lora.latents import to_latents, to_pictures
from esd_lora.pictures import open_picture
from esd_lora.seeds import text_seed
from esd_lora.trajectory import concatenate, latents_per_batch


def latent_start(victim: Victim, *, strength: float = 0.7, folder: str | Path | None = None, seed: int = 0) -> Variant:
    """Start from a picture of the concept, noised, and go on under the prompt with the erased model.

    Meng et al., *SDEdit*, ICLR 2022, arXiv:2108.01073: noise a picture to a time within the trajectory, and denoise from there.
    Lu et al., *When Are Concepts Erased From Diffusion Models?*, NeurIPS 2025, arXiv:2505.17013, probe erased models so: their
    diffusion completion (kevinlu4588/WhenAreConceptsErased, `src/probes/diffusion_completion_probe.py`) has the base do the
    first 5 or 10 steps and the erased model the others. Here the base finishes its picture first, which is then noised afresh,
    so that an attacker's own pictures can take its place.

    At a low strength the start is still there whatever the model: on the built-in base at 0.5, a cat's picture stayed a cat in
    11 of 20 even where the base itself had a dog for its prompt, and at 0.7 in 5. Success there is no sign of a concept left.

    Args:
        victim: Stable Diffusion or SDXL. Sampled by DDIM, with the victim's steps and guidance.
        strength: Share of the steps that are gone again: near 0 the picture stays as it is, at 1 of it is left what the last
            time of the base's schedule lets through. 0.5 to 0.9 typically.
        folder: Pictures of the attacker's own; without it each prompt starts from the base's picture for it.
        seed: Of the noise, and of which picture of the folder; together with each prompt's case.

    Raises:
        EsdLoraError: If the strength is not between 0 and 1, there are no pictures, or the base is of another family.
    """
    if not 0 < strength <= 1:
        raise EsdLoraError(f"strength of an attack is {strength:g}, expected more than 0 and at most 1.")
    base, files = victim.base, concept_pictures(folder, victim)
    require_stable_diffusion(base, "a start from a picture")
    shape, device = base.latent_shape(), base.model.device

    def start_latents(cases: Sequence[Case]) -> Tensor:
        """Return latents of the picture that each case starts from."""
        if files:
            drawn = [files[text_seed("picture", seed, case.id) % len(files)] for case in cases]
            return to_latents(base, list(map(open_picture, drawn)))
        return to_latents(base, make_painter(base, victim.steps, victim.guidance)(cases))

    @torch.no_grad()
    def denoise(cases: Sequence[Case], x_0: Tensor) -> list[Image.Image]:
        scheduler: Any = base.family.scheduler(base.pipe, victim.steps, shape, device)
        times = scheduler.timesteps[victim.steps - round(strength * victim.steps) :]
        generators = [torch.Generator().manual_seed(text_seed("noise", seed, case.id)) for case in cases]
        noise = torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators]).to(device)
        scales = [victim.guidance if case.guidance is None else case.guidance for case in cases]
        guidance = torch.tensor(scales, device=device).view(-1, 1, 1, 1)
        both = concatenate(base.encode([""] * len(cases)), base.encode([case.prompt for case in cases]))
        x = scheduler.add_noise(x_0, noise, times[:1].expand(len(cases))) if len(times) else x_0
        for t in times:
            null, prompted = base.predict(torch.cat([x, x]), t.expand(2 * len(x)), both).chunk(2)
            x = scheduler.step(null + guidance * (prompted - null), t, x).prev_sample
        return to_pictures(base, x)

    def paint(cases: Sequence[Case]) -> list[Image.Image]:
        x_0, size = start_latents(cases), latents_per_batch(shape)
        with victim.erased.on():
            parts = [slice(i, i + size) for i in range(0, len(cases), size)]
            return [picture for part in parts for picture in denoise(cases[part], x_0[part])]

    record = {"strength": strength, "files": hash_by_name(files) or None, "seed": seed, "victim": victim.erased.record}
    return Variant("attack-latent-start", record, lambda: nullcontext(paint))
