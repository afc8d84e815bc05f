"""Latents of pictures, and pictures of latents, as a base's own pipeline has them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.bases.loading import quiet_libraries
from esd_lora.errors import EsdLoraError


def require_encodable(base: Base, otherwise: str) -> None:
    """Refuse bases that pictures cannot be encoded for.

    Args:
        base: From `load_base`, with its VAE.
        otherwise: What to do instead, in a sentence.

    Raises:
        EsdLoraError: If the base's VAE is of another kind than that of Stable Diffusion.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    if not isinstance(base.pipe.vae, AutoencoderKL | AutoencoderKLFlux2):
        raise EsdLoraError(
            f"base {base.id!r} has a VAE of kind {type(base.pipe.vae).__name__}, and pictures are encoded with AutoencoderKL"
            f" alone. {otherwise}"
        )


@torch.no_grad()
def to_latents(base: Base, pictures: Sequence[Image.Image], size: tuple[int, int] | None = None) -> Tensor:
    """Encode pictures as float32 latents [N, ...]; each by itself, at its most likely.

    Args:
        base: From `load_base`, with its VAE.
        pictures: Of any size, in RGB.
        size: Width and height that they are cut to around their middle and scaled to; the model's native ones unless given.
    """
    mean, scale = _latent_scale(base)
    size = size or base.picture_size()
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
