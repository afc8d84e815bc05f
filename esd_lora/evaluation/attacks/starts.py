"""Attacks on the start: from a picture of the concept instead of noise alone."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks.latents import to_latents, to_pictures
from esd_lora.evaluation.attacks.learning import hashes, pictures_in, require_stable_diffusion, seeded
from esd_lora.evaluation.attacks.victim import Victim
from esd_lora.evaluation.picture_files import open_picture
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.variants import Painter, Variant, painter
from esd_lora.trajectory import concatenate, latents_per_batch


def latent_start(victim: Victim, *, strength: float = 0.7, folder: str | Path | None = None, seed: int = 0) -> Variant:
    """Pictures that start from one of the concept, noised, and go on under the prompt with the erased model.

    Meng et al., *SDEdit*, ICLR 2022, arXiv:2108.01073: noise a picture to a time within the trajectory, and denoise from there.
    Lu et al., *When Are Concepts Erased From Diffusion Models?*, NeurIPS 2025, arXiv:2505.17013, probe erased models so: their
    diffusion completion (kevinlu4588/WhenAreConceptsErased, `src/probes/diffusion_completion_probe.py`) has the base do the
    first 5 or 10 steps and the erased model the others. Here the base finishes its picture first, which is then noised afresh,
    so that an attacker's own pictures can take its place.

    At a low strength the start is still there whatever the model: on the built-in base at 0.5, a cat's picture stayed a cat in
    11 of 20 even where the base itself was told to paint a dog, and at 0.7 in 5. Success there is no sign of a concept left.

    Args:
        victim: Stable Diffusion or SDXL. Sampled by DDIM, with steps and guidance as asked.
        strength: Share of the steps that are gone again: near 0 the picture stays as it is, at 1 of it is left what the last
            time of the base's schedule lets through. 0.5 to 0.9 typically.
        folder: Pictures of the attacker's own; without it each prompt starts from the base's picture for it.
        seed: Of the noise, and of which picture of the folder; together with each prompt's case.

    Raises:
        EsdLoraError: If the strength is not between 0 and 1, there are no pictures, or the base is of another family.
    """
    if not 0 < strength <= 1:
        raise EsdLoraError(f"strength of an attack is {strength:g}, expected more than 0 and at most 1.")
    base, files = victim.base, pictures_in(folder, victim)
    require_stable_diffusion(base, "a start from a picture")
    shape, device = base.latent_shape(), base.model.device

    def started(some: Sequence[Asked]) -> Tensor:
        """Latents of the picture that each starts from."""
        if files:
            drawn = [files[seeded("picture", seed, one.case) % len(files)] for one in some]
            return to_latents(base, list(map(open_picture, drawn)))
        return to_latents(base, painter(base, victim.steps, victim.guidance)(some))

    @torch.no_grad()
    def denoised(some: Sequence[Asked], x_0: Tensor) -> list[Image.Image]:
        scheduler: Any = base.family.scheduler(base.pipe, victim.steps, shape, device)
        times = scheduler.timesteps[victim.steps - round(strength * victim.steps) :]
        seeds = [seeded("noise", seed, one.case) for one in some]
        noise = torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(own)) for own in seeds]).to(device)
        scales = [victim.guidance if one.guidance is None else one.guidance for one in some]
        guidance = torch.tensor(scales, device=device).view(-1, 1, 1, 1)
        both = concatenate(base.encode([""] * len(some)), base.encode([one.prompt for one in some]))
        x = scheduler.add_noise(x_0, noise, times[:1].expand(len(some))) if len(times) else x_0
        for t in times:
            null, prompted = base.predict(torch.cat([x, x]), t.expand(2 * len(x)), both).chunk(2)
            x = scheduler.step(null + guidance * (prompted - null), t, x).prev_sample
        return to_pictures(base, x)

    def painted(some: Sequence[Asked]) -> list[Image.Image]:
        x_0 = started(some)
        with victim.erased.on():
            parts = [slice(i, i + latents_per_batch(shape)) for i in range(0, len(some), latents_per_batch(shape))]
            return [picture for part in parts for picture in denoised(some[part], x_0[part])]

    @contextmanager
    def on() -> Generator[Painter]:
        yield painted

    record = {"strength": strength, "files": hashes(files), "seed": seed, "victim": victim.erased.record}
    return Variant("attack-latent-start", record, on)
