"""Between pictures and latents, as the pipelines of Stable Diffusion's kind go."""

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


def require_readable(base: Base) -> None:
    """Refuses bases that pictures cannot be encoded for.

    Raises:
        EsdLoraError: If the base's VAE is of another kind than that of Stable Diffusion.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if not isinstance(base.pipe.vae, AutoencoderKL):
        raise EsdLoraError(
            f"base {base.id!r} has a VAE of kind {type(base.pipe.vae).__name__}, and pictures are encoded with AutoencoderKL"
            " alone. Leave attacks that learn from pictures out of the suite."
        )


@torch.no_grad()
def to_latents(base: Base, pictures: Sequence[Image.Image]) -> Tensor:
    """Encodes pictures, cut to the model's native size, as float32 latents [N, ...]; each by itself, at its most likely."""
    mean, scale = _normalising(base)
    _, height, width = base.latent_shape()
    size = width * base.pipe.vae_scale_factor, height * base.pipe.vae_scale_factor
    found: list[Tensor] = []
    with _precise(base.pipe.vae) as vae:
        for picture in pictures:
            pixels = np.asarray(ImageOps.fit(picture.convert("RGB"), size), dtype=np.float32) / 127.5 - 1
            x = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(vae.device, vae.dtype)
            found.append((vae.encode(x).latent_dist.mode() - mean) * scale)
    return torch.cat(found)


@torch.no_grad()
def to_pictures(base: Base, latents: Tensor) -> list[Image.Image]:
    """Decodes latents [N, ...], one by one."""
    mean, scale = _normalising(base)
    pictures: list[Image.Image] = []
    with _precise(base.pipe.vae) as vae:
        for one in latents.split(1):
            x = vae.decode((one / scale + mean).to(vae.dtype)).sample
            pictures += base.pipe.image_processor.postprocess(x, output_type="pil")
    return pictures


@contextmanager
def _precise(vae: Any) -> Generator[Any]:
    """A VAE in float32 or better: SDXL's overflows in float16. The way back is exact."""
    dtype = vae.dtype
    precise = torch.promote_types(dtype, torch.float32)
    if precise == dtype:
        yield vae
        return
    with quiet_libraries():  # diffusers tells of every change
        vae.to(precise)
        try:
            yield vae
        finally:
            vae.to(dtype)


def _normalising(base: Base) -> tuple[Any, Any]:
    """What a VAE's own latents are shifted and multiplied by on their way to the denoiser, as the pipelines do."""
    vae = base.pipe.vae
    own: Any = vae.config
    if base.family.normalises_latents and own.latents_mean and own.latents_std:
        mean, std = (torch.tensor(value, device=vae.device).view(1, -1, 1, 1) for value in (own.latents_mean, own.latents_std))
        return mean, own.scaling_factor / std
    return (own.shift_factor or 0.0) if base.prediction_type == "flow" else 0.0, own.scaling_factor
