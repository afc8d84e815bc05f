"""Stable Diffusion 3 and 3.5: an MM-DiT that predicts the flow from two CLIP encoders and T5.

Text and image tokens meet in one attention, so there is no cross-attention. `xattn` is the text stream of that attention
(`add_{q,k,v}_proj`, `to_add_out`), `selfattn` its image stream; SD 3.5 medium has further image-only `attn2` layers, which
are self-attention despite the name. The two kinds together are as near to ESD-x and its opposite as the architecture allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from esd_lora.families.family import ModelFamily
from esd_lora.trajectory import Condition

TEXT_STREAM = r"\.(add_[qkv]_proj|to_add_out)$"
MM_DIT_SCOPES: Mapping[str, str] = {
    "xattn": TEXT_STREAM,
    "xattn-kv": r"\.add_[kv]_proj$",
    "selfattn": r"\.attn2?\.to_(q|k|v|out\.0)$",
    "noxattn": rf"^(single_)?transformer_blocks\.(?!.*{TEXT_STREAM})",
    "full": r"^(single_)?transformer_blocks\.",
}
"""Embedders and the last projection, outside the blocks, stay as they are."""


class StableDiffusion3(ModelFamily):
    """SD 3 medium: 24 blocks, 95 linears in the text stream (the last block drops its text output)."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    denoiser = "transformer"
    scopes: ClassVar[Mapping[str, str]] = MM_DIT_SCOPES
    multiple = 2

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        ask = {"device": pipe.transformer.device, "do_classifier_free_guidance": False}
        text, _, pooled, _ = pipe.encode_prompt(list(prompts), None, None, **ask)
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return pipe.transformer(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
