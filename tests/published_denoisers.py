"""Denoisers of published models at their real size, without weights: configurations where they are not diffusers' defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from esd_lora.bases.single_file import CONFIGS


def shipped_config(name: str) -> dict[str, Any]:
    """Return the configurations that ship for single files, by component (counted in test_single_file.py)."""
    return json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))


def build_component(parts: dict[str, Any], part: str) -> Any:
    """Return a component made from its configuration, wherever torch's default device is."""
    config = {key: value for key, value in parts[part].items() if key != "_class_name"}
    library, name = parts["model_index"][part]
    if library == "diffusers":
        return getattr(diffusers, name)(**config)
    return getattr(transformers, name)(transformers.CLIPTextConfig(**config))


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
_KLEIN = {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
_WAN_5B = {"in_channels": 48, "out_channels": 48}
DENOISERS: dict[str, tuple[str, Callable[..., nn.Module], dict[str, Any]]] = {
    "sd15": ("sd", UNet2DConditionModel, shipped_config("sd1")["unet"]),
    "sd21": ("sd", UNet2DConditionModel, {**shipped_config("sd2")["unet"], "sample_size": 96}),
    "sdxl": ("sdxl", UNet2DConditionModel, shipped_config("sdxl")["unet"]),
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
    # PixArt-alpha/PixArt-Sigma-XL-2-1024-MS
    "pixart-sigma": ("pixart", PixArtTransformer2DModel, shipped_config("pixart-sigma")["transformer"]),
    # Alpha-VLLM/Lumina-Image-2.0
    "lumina2": ("lumina2", Lumina2Transformer2DModel, shipped_config("lumina2")["transformer"]),
    # Qwen/Qwen-Image: diffusers' defaults
    "qwen-image": ("qwen-image", QwenImageTransformer2DModel, shipped_config("qwen-image")["transformer"]),
    # Kwai-Kolors/Kolors-diffusers: SDXL's, with ChatGLM3's width (4096) where text enters
    "kolors": ("kolors", UNet2DConditionModel, shipped_config("kolors")["unet"]),
    # black-forest-labs/FLUX.2-dev: diffusers' defaults are its own
    "flux2-dev": ("flux2", Flux2Transformer2DModel, {}),
    # black-forest-labs/FLUX.2-klein-4B and 9B, distilled and base; sizes as in kohya-ss/musubi-tuner, flux_2/flux2_models.py
    "flux2-klein-4b": ("flux2", Flux2Transformer2DModel, {**_KLEIN, "num_layers": 5, "num_single_layers": 20}),
    "flux2-klein-9b": (
        "flux2",
        Flux2Transformer2DModel,
        {**_KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    ),
    # Tongyi-MAI/Z-Image and Z-Image-Turbo: diffusers' defaults are theirs
    "z-image": ("z-image", ZImageTransformer2DModel, {}),
    # Wan-AI/Wan2.1-T2V-1.3B-Diffusers, Wan2.2-TI2V-5B-Diffusers, Wan2.1-T2V-14B-Diffusers: the sizes stand in wan/configs of
    # Wan-Video/Wan2.1 and Wan2.2, the channels of 5B in its VAE's configuration
    "wan-1.3b": ("wan", WanTransformer3DModel, {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}),
    "wan-5b": ("wan", WanTransformer3DModel, {**_WAN_5B, "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336}),
    "wan-14b": ("wan", WanTransformer3DModel, {}),
}
"""Model to (family, class, configuration)."""
SCOPE_COUNTS = {
    "sd15": {"xattn": 64, "xattn-kv": 32, "selfattn": 64, "noxattn": 214, "full": 278},
    "sd21": {"xattn": 64, "xattn-kv": 32, "selfattn": 64, "noxattn": 214, "full": 278},
    "sdxl": {"xattn": 280, "xattn-kv": 140, "selfattn": 280, "noxattn": 508, "full": 788},
    "sd3": {"xattn": 97, "xattn-kv": 48, "selfattn": 96, "noxattn": 238, "full": 335},
    "sd35-medium": {"xattn": 97, "xattn-kv": 48, "selfattn": 148, "noxattn": 290, "full": 387},
    "flux": {"xattn": 78, "xattn-kv": 38, "selfattn": 190, "noxattn": 418, "full": 496},
    "pixart-sigma": {"xattn": 114, "xattn-kv": 56, "selfattn": 112, "noxattn": 168, "full": 282},
    "lumina2": {"xattn": 15, "xattn-kv": 4, "selfattn": 112, "noxattn": 224, "full": 239},
    "sana": {"xattn": 80, "xattn-kv": 40, "selfattn": 80, "noxattn": 120, "full": 200},
    "qwen-image": {"xattn": 241, "xattn-kv": 120, "selfattn": 240, "noxattn": 600, "full": 841},
    "kolors": {"xattn": 281, "xattn-kv": 140, "selfattn": 280, "noxattn": 508, "full": 789},
    "flux2-dev": {"xattn": 33, "xattn-kv": 16, "selfattn": 128, "noxattn": 160, "full": 193},
    "flux2-klein-4b": {"xattn": 21, "xattn-kv": 10, "selfattn": 60, "noxattn": 80, "full": 101},
    "flux2-klein-9b": {"xattn": 33, "xattn-kv": 16, "selfattn": 80, "noxattn": 112, "full": 145},
    "z-image": {"xattn": 15, "xattn-kv": 4, "selfattn": 128, "noxattn": 256, "full": 271},
    "wan-1.3b": {"xattn": 122, "xattn-kv": 60, "selfattn": 120, "noxattn": 180, "full": 302},
    "wan-5b": {"xattn": 122, "xattn-kv": 60, "selfattn": 120, "noxattn": 180, "full": 302},
    "wan-14b": {"xattn": 162, "xattn-kv": 80, "selfattn": 160, "noxattn": 240, "full": 402},
}
"""Number of layers that each scope holds on the published models."""


def denoiser(name: str) -> nn.Module:
    """Return a published model's denoiser on the meta device."""
    _, model_class, config = DENOISERS[name]
    with torch.device("meta"):
        return model_class(**config)
