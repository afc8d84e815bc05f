"""Stable Diffusion XL, base and turbo: SD's U-Net grown; two CLIP encoders, pooled text and picture size beside time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esd_lora.families.family import CheckpointKind, PublishedModel
from esd_lora.families.layer_names import OriginalLayer, unet_layers
from esd_lora.families.sd import UNET_ALONE, StableDiffusion, has_unet, refused_unet
from esd_lora.trajectory import Condition

_SDXL = CheckpointKind("SDXL", config="sdxl", prediction_type="epsilon")


class StableDiffusionXL(StableDiffusion):
    """280 cross-attention linears, 140 of them keys and values."""

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    clip_encoders = ("text_encoder", "text_encoder_2")
    clip_prefixes = ("conditioner.embedders.0.", "conditioner.embedders.1.")
    clip_in_kohya = ("lora_te1_", "lora_te2_")
    tags = ("stable-diffusion-xl",)
    text_widths = frozenset({2048})
    normalises_latents = True
    published = (PublishedModel("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "1024x1024"),)
    preset = "sdxl/fast"
    metadata_pattern = "sdxl|-xl-"
    kohya_keeps_diffusers_names = False
    checkpoints = (_SDXL,)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        return _encoded(pipe, prompts)

    def most_skipped(self, pipe: Any) -> int:
        encoders = (pipe.text_encoder, pipe.text_encoder_2)
        return min(encoder.config.num_hidden_layers for encoder in encoders) - 1  # counted from the last layer but one

    def encode_skipping(self, pipe: Any, prompts: Sequence[str], clip_skip: int) -> Condition:
        return _encoded(pipe, prompts, clip_skip=clip_skip)

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        condition = self.encode_text(pipe, prompts)
        if pipe.config.force_zeros_for_empty_prompt:  # guidance is then against zeros, not against an encoded ""
            empty = torch.tensor([prompt == "" for prompt in prompts], device=pipe.text_encoder.device)
            condition = {
                name: value.masked_fill(empty.view(-1, *[1] * (value.dim() - 1)), 0) for name, value in condition.items()
            }
        return condition

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        return {**super().condition_shapes(pipe), "pooled_prompt_embeds": (pipe.text_encoder_2.config.projection_dim,)}

    def added_conditions(self, pipe: Any, x_t: Tensor, condition: Condition) -> dict[str, Tensor] | None:
        """Return the pooled text; original size, crop and target size in pixels, as for a whole picture."""
        height, width = (side * pipe.vae_scale_factor for side in x_t.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=x_t.dtype, device=x_t.device)
        return {"text_embeds": condition["pooled_prompt_embeds"], "time_ids": sizes.expand(len(x_t), -1)}

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:
        return unet_layers(3, (0, 1), names)

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        if not has_unet(shapes, labels=True):
            return None
        if refused := refused_unet(shapes):
            return refused
        if any(name.startswith("conditioner.embedders.1.") for name in shapes):
            return _SDXL
        if any(name.startswith(("conditioner.", "cond_stage_model.model.")) for name in shapes):
            return CheckpointKind("the SDXL refiner or an unCLIP model, which do not draw from text alone", supported=False)
        return UNET_ALONE


def _encoded(pipe: Any, prompts: Sequence[str], **kwargs: Any) -> Condition:
    """Return the condition of N prompts as the pipeline encodes them, with further arguments of its method."""
    device = pipe.text_encoder.device
    text, _, pooled, _ = pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False, **kwargs)
    return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
