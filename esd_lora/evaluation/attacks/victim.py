"""The victim of an attack, and the attacker's pictures of the concept, with their latents."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.bases.notices import quiet_libraries
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.erasers.stacking import Strength
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.picture_files import SUFFIXES, picture_paths
from esd_lora.evaluation.variants import Variant, make_painter
from esd_lora.families.sd import StableDiffusion
from esd_lora.pictures import open_picture
from esd_lora.seeds import text_seed


class Victim(NamedTuple):
    """An erased model under attack."""

    base: Base
    """As it is before erasing; an attacker is thought to have pictures of the concept, and these are the base's."""
    erased: Variant
    """The base with erasers on, within `with erased.on()`."""
    concepts: Sequence[ErasedConcept]
    """What was erased."""
    cases: Sequence[Case]
    """Prompts about the concepts, which the attacker wants painted."""
    steps: int
    """Denoising steps."""
    guidance: float
    erasers: Sequence[Eraser]
    """Those that `erased` has on."""
    weights: Sequence[Strength]
    """Strength of each."""


def require_at_least(least: int, **settings: int) -> None:
    """Refuse settings of an attack that are too small.

    Raises:
        EsdLoraError: With the first one.
    """
    for name, value in settings.items():
        if value < least:
            raise EsdLoraError(f"{name} of an attack is {value}, expected {least} or more.")


def require_stable_diffusion(base: Base, attack: str) -> None:
    """Refuse bases with other text encoders or another guidance than Stable Diffusion and SDXL have.

    Raises:
        EsdLoraError: With what the base is.
    """
    if not isinstance(base.family, StableDiffusion) or base.family.takes_guidance(base.pipe):
        raise EsdLoraError(
            f"base {base.id!r} is a {type(base.pipe).__name__}, and {attack} is made for Stable Diffusion and SDXL, not"
            " distilled for guidance. Leave this attack out of the suite."
        )


def require_encodable(base: Base) -> None:
    """Refuse bases that pictures cannot be encoded for.

    Raises:
        EsdLoraError: If the base's VAE is of another kind than that of Stable Diffusion.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    if not isinstance(base.pipe.vae, AutoencoderKL | AutoencoderKLFlux2):
        raise EsdLoraError(
            f"base {base.id!r} has a VAE of kind {type(base.pipe.vae).__name__}, and pictures are encoded with AutoencoderKL"
            " alone. Leave attacks that learn from pictures out of the suite."
        )


def concept_pictures(folder: str | Path | None, victim: Victim, count: int | None = None) -> list[Path]:
    """Return the first `count` pictures of an attacker's folder, by name, or all of them; none without a folder.

    Raises:
        EsdLoraError: If there is no such folder or no picture in it, or what was erased is more than one concept, so that
            nobody could say which of them the pictures show.
    """
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise EsdLoraError(f"there is no folder {folder}. Expected one with pictures of the concept.")
    files = picture_paths(Path(folder))
    if not files:
        raise EsdLoraError(f"{folder} holds no picture. Expected some of the concept, as {', '.join(SUFFIXES)}.")
    if len(victim.concepts) != 1:
        raise EsdLoraError(
            f"the pictures in {folder} can show one concept, and {len(victim.concepts)} were erased. Attack one at a time, or"
            " leave the folder out."
        )
    return files[:count]


def captioned_latents(victim: Victim, count: int, files: Sequence[Path], seed: int) -> tuple[Tensor, list[str]]:
    """Return latents [N, ...] of pictures of the concept, and their captions.

    Args:
        victim: Its base must be as it is before erasing.
        count: Pictures to paint, evenly spaced among the victim's cases, with other seeds than those.
        files: Pictures to read instead; their caption is the concept's name.
        seed: Of what is painted.
    """
    if files:
        return to_latents(victim.base, list(map(open_picture, files))), [victim.concepts[0].name] * len(files)
    chosen = [victim.cases[i * len(victim.cases) // count] for i in range(count)]
    cases = [case._replace(seed=text_seed("picture", seed, i, case.seed)) for i, case in enumerate(chosen)]
    pictures = make_painter(victim.base, victim.steps, victim.guidance)(cases)
    return to_latents(victim.base, pictures), [case.prompt for case in cases]


@torch.no_grad()
def to_latents(base: Base, pictures: Sequence[Image.Image]) -> Tensor:
    """Encode pictures, cut to the model's native size, as float32 latents [N, ...]; each by itself, at its most likely."""
    mean, scale = _latent_scale(base)
    size = base.picture_size()
    latents: list[Tensor] = []
    with _precise(base.pipe.vae) as vae:
        for picture in pictures:
            pixels = np.asarray(ImageOps.fit(picture.convert("RGB"), size), dtype=np.float32) / 127.5 - 1
            x = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(vae.device, vae.dtype)
            latents.append((vae.encode(x).latent_dist.mode() - mean) * scale)
    return torch.cat(latents)


@torch.no_grad()
def to_pictures(base: Base, latents: Tensor) -> list[Image.Image]:
    """Decode latents [N, ...], one by one."""
    mean, scale = _latent_scale(base)
    pictures: list[Image.Image] = []
    with _precise(base.pipe.vae) as vae:
        for latent in latents.split(1):
            x = vae.decode((latent / scale + mean).to(vae.dtype)).sample
            pictures += base.pipe.image_processor.postprocess(x, output_type="pil")
    return pictures


@contextmanager
def _precise(vae: Any) -> Generator[Any]:
    """Have a VAE in float32 or better: SDXL's overflows in float16. The way back is exact."""
    dtype = vae.dtype
    precise = torch.promote_types(dtype, torch.float32)
    if precise == dtype:
        yield vae
        return
    with quiet_libraries():  # diffusers warns of every change
        vae.to(precise)
        try:
            yield vae
        finally:
            vae.to(dtype)


def _latent_scale(base: Base) -> tuple[Any, Any]:
    """Return what a VAE's own latents are shifted and multiplied by on their way to the denoiser, as the pipelines do."""
    vae = base.pipe.vae
    config: Any = vae.config
    if own := base.family.latent_statistics(base.pipe, base.latent_shape()):
        mean, std = (each.to(vae.device) for each in own)
        return mean, 1 / std
    if base.family.normalises_latents and config.latents_mean and config.latents_std:
        mean, std = (torch.tensor(x, device=vae.device).view(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std))
        return mean, config.scaling_factor / std
    return (config.shift_factor or 0.0) if base.prediction_type == "flow" else 0.0, config.scaling_factor
