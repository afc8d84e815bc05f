"""Sana: a linear-attention DiT that predicts the flow, with true cross-attention on Gemma."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor

from esd_lora.families.family import ModelFamily
from esd_lora.trajectory import Condition, concatenate


class Sana(ModelFamily):
    """Sana 1.6B: 20 blocks with four cross-attention linears each; depth-wise convolutions have no LoRA."""

    name = "sana"
    pipelines = ("SanaPipeline",)
    denoiser = "transformer"
    scopes: ClassVar[Mapping[str, str]] = {
        "xattn": r"\.attn2\.",
        "xattn-kv": r"\.attn2\.to_[kv]$",
        "selfattn": r"\.attn1\.",
        "noxattn": r"^transformer_blocks\.(?!.*\.attn2\.)",
        "full": r"^transformer_blocks\.",
    }
    fixed_prediction_type = "flow"
    even_sigmas = True
    multiple = 1

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"use_resolution_binning": False}  # sizes are already those the model takes

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        # The pipeline puts a long instruction to the language model before every prompt, but not before the negative one.
        return concatenate(*(_encode_prompt(pipe, prompt, instructed=prompt != "") for prompt in prompts))

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        return concatenate(*(_encode_prompt(pipe, prompt, instructed=True) for prompt in prompts))

    def encode_opposite(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        return concatenate(*(_encode_prompt(pipe, prompt, instructed=False) for prompt in prompts))

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        tokens = self.prompt_tokens(pipe)
        return {
            "prompt_embeds": (tokens, pipe.transformer.config.caption_channels),
            "prompt_attention_mask": (tokens,),
        }

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        flow = pipe.transformer(
            x_t,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=t * pipe.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return flow[:, : x_t.shape[1]]  # some variants predict a variance beside the flow


def _encode_prompt(pipe: Any, prompt: str, *, instructed: bool) -> Condition:
    """Return the condition of one prompt, with or without the pipeline's instruction before it."""
    instruction = signature(pipe.__call__).parameters["complex_human_instruction"].default
    text, mask, _, _ = pipe.encode_prompt(
        prompt,
        do_classifier_free_guidance=False,
        device=pipe.text_encoder.device,
        complex_human_instruction=instruction if instructed else None,
    )
    return {"prompt_embeds": text, "prompt_attention_mask": mask}
