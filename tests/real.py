"""Denoisers of published models at their real size, without weights: configurations where they are not diffusers' defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

_SD = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
_SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
}
DENOISERS: dict[str, tuple[str, Callable[..., nn.Module], dict[str, Any]]] = {
    # unet/config.json of stable-diffusion-v1-5/stable-diffusion-v1-5
    "sd15": ("sd", UNet2DConditionModel, {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8}),
    # stabilityai/stable-diffusion-2-1
    "sd21": (
        "sd",
        UNet2DConditionModel,
        {
            **_SD,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
    ),
    # stabilityai/stable-diffusion-xl-base-1.0
    "sdxl": (
        "sdxl",
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    # stabilityai/stable-diffusion-3-medium-diffusers
    "sd3": ("sd3", SD3Transformer2DModel, {**_SD3, "pos_embed_max_size": 192}),
    # stabilityai/stable-diffusion-3.5-medium
    "sd35-medium": (
        "sd3",
        SD3Transformer2DModel,
        {**_SD3, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    ),
    # black-forest-labs/FLUX.1-dev; schnell lacks guidance_embeds
    "flux": ("flux", FluxTransformer2DModel, {"guidance_embeds": True}),
    # Efficient-Large-Model/Sana_1600M_1024px_diffusers
    "sana": ("sana", SanaTransformer2DModel, {}),
}
"""Model to (family, class, configuration)."""


def denoiser(name: str) -> nn.Module:
    """A published model's denoiser on the meta device."""
    _, make, config = DENOISERS[name]
    with torch.device("meta"):
        return make(**config)
