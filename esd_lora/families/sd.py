"""Stable Diffusion 1.x and the built-in emoji base: a U-Net with cross-attention on one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from esd_lora.families._base import ModelFamily
from esd_lora.trajectory import Condition

# kohya's, A1111's and ComfyUI's loaders have no place for an update of these four, so no scope touches them.
_OUTSIDE = r"conv_in|conv_out|time_embedding\.|add_embedding\."


class StableDiffusion(ModelFamily):
    """SD 1.x: 64 cross-attention linears (`xattn`), 32 of them keys and values (`xattn-kv`)."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline",)
    denoiser = "unet"
    scopes: ClassVar[Mapping[str, str]] = {
        "xattn": r"\.attn2\.",
        "xattn-kv": r"\.attn2\.to_[kv]$",
        "selfattn": r"\.attn1\.",
        "noxattn": rf"^(?!{_OUTSIDE})(?!.*\.attn2\.)",
        "full": rf"^(?!{_OUTSIDE})",
    }

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        tokens = pipe.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {"text": pipe.text_encoder(tokens.input_ids.to(pipe.text_encoder.device))[0]}

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return model(x_t, t, encoder_hidden_states=condition["text"], return_dict=False)[0]

    def latent_shape(self, pipe: Any) -> tuple[int, ...]:
        size = pipe.unet.config.sample_size
        return (pipe.unet.config.in_channels, size, size)

    def scheduler(self, pipe: Any) -> Any:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        return DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)

    def prediction_type(self, pipe: Any) -> str:
        return pipe.scheduler.config.prediction_type
