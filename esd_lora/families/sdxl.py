"""Stable Diffusion XL, base and turbo: SD's U-Net grown; two CLIP encoders, pooled text and picture size beside time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esd_lora.families.sd import StableDiffusion
from esd_lora.trajectory import Condition


class StableDiffusionXL(StableDiffusion):
    """280 cross-attention linears, 140 of them keys and values."""

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        text, _, pooled, _ = pipe.encode_prompt(list(prompts), device=pipe.unet.device, do_classifier_free_guidance=False)
        condition = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
        if pipe.config.force_zeros_for_empty_prompt:  # guidance is then against zeros, not against an encoded ""
            empty = torch.tensor([prompt == "" for prompt in prompts], device=text.device)
            condition = {
                name: value.masked_fill(empty.view(-1, *[1] * (value.dim() - 1)), 0) for name, value in condition.items()
            }
        return condition

    def added(self, pipe: Any, x_t: Tensor, condition: Condition) -> dict[str, Tensor] | None:
        """The pooled text; original size, crop and target size in pixels, as for a whole picture."""
        height, width = (side * pipe.vae_scale_factor for side in x_t.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=x_t.dtype, device=x_t.device)
        return {"text_embeds": condition["pooled_prompt_embeds"], "time_ids": sizes.expand(len(x_t), -1)}
