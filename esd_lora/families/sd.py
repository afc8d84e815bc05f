"""Stable Diffusion 1.x and 2.x, their LCM distillates, and the built-in emoji base: a U-Net with cross-attention on CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from esd_lora.families.family import ModelFamily
from esd_lora.trajectory import Condition

# kohya's, A1111's and ComfyUI's loaders have no place for an update of these, so no scope touches them.
_OUTSIDE = r"conv_in|conv_out|time_embedding\.|add_embedding\."


class StableDiffusion(ModelFamily):
    """64 cross-attention linears (`xattn`), 32 of them keys and values (`xattn-kv`); SD 2.x predicts noise or v."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    denoiser = "unet"
    text_layers = r"\.attn2\.to_[kv]$"
    scopes: ClassVar[Mapping[str, str]] = {
        "xattn": r"\.attn2\.",
        "xattn-kv": r"\.attn2\.to_[kv]$",
        "selfattn": r"\.attn1\.",
        "noxattn": rf"^(?!{_OUTSIDE})(?!.*\.attn2\.)",
        "full": rf"^(?!{_OUTSIDE})",
    }

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        return {"prompt_embeds": pipe.encode_prompt(list(prompts), pipe.unet.device, 1, False)[0]}

    def added(self, pipe: Any, x_t: Tensor, condition: Condition) -> dict[str, Tensor] | None:  # noqa: ARG002
        """What the U-Net is told beside text and time."""
        return None

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        scale = None
        if self.takes_guidance(pipe):  # LCM: the scale that is distilled in, embedded as its pipeline does
            width = pipe.unet.config.time_cond_proj_dim
            scale = pipe.get_guidance_scale_embedding(condition["guidance"] - 1, width, x_t.dtype).to(x_t.device)
        return pipe.unet(
            x_t,
            t,
            encoder_hidden_states=condition["prompt_embeds"],
            timestep_cond=scale,
            added_cond_kwargs=self.added(pipe, x_t, condition),
            return_dict=False,
        )[0]
