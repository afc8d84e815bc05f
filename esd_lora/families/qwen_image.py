"""Qwen-Image: an MM-DiT of double blocks that predicts the flow from the text of Qwen2.5-VL.

The pipeline puts every prompt into a chat template and drops the tokens of its first part; texts are as long as their words,
so a condition is padded and carries a mask. Guidance is true, and against a space where there is no negative prompt, as the
pipeline's documentation has it; its scale is `true_cfg_scale`. After guidance the pipeline rescales every token of the
prediction to the norm of the prompted one. Trainings take single predictions, which are never rescaled, and walk by plain
guidance, so their latents come of somewhat longer steps than those of pictures, which are painted by the pipeline.

`xattn` is where text enters (`txt_in`) and its stream in the joint attention, as in `sd3`; what the last block makes of the
text reaches no output.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import pad

from esd_lora.families.family import CheckpointKind, ModelFamily, PublishedModel
from esd_lora.families.layer_names import OriginalLayer, bare_shapes
from esd_lora.families.sd3 import MM_DIT_BLOCKS, MM_DIT_SCOPES, TEXT_STREAM
from esd_lora.trajectory import Condition

_QWEN_IMAGE = CheckpointKind("Qwen-Image")
_NO_PROMPT = " "  # what the pipeline's call documents as the empty negative prompt that turns guidance on
_TEXT_LAYERS = r"^txt_in$"


class QwenImage(ModelFamily):
    """60 double blocks with 241 linears where text enters and in its stream."""

    name = "qwen-image"
    pipelines = ("QwenImagePipeline",)
    denoiser = "transformer"
    tags = ("qwen-image",)
    text_layers = _TEXT_LAYERS
    text_widths = frozenset({3584})
    scopes: ClassVar[Mapping[str, str]] = {
        **MM_DIT_SCOPES,
        "xattn": rf"{TEXT_STREAM}|{_TEXT_LAYERS}",
        "full": rf"^transformer_blocks\.|{_TEXT_LAYERS}",
    }
    fixed_prediction_type = "flow"
    even_sigmas = True
    multiple = 2
    normalises_latents = True
    published = (PublishedModel("qwen_image", "Qwen-Image", "1024x1024"),)  # as kohya-ss/musubi-tuner writes them
    preset = "flux/fast"  # of half the native side; there is no distilled guidance for it to set
    metadata_pattern = "(?i)qwen.image"
    checkpoints = (_QWEN_IMAGE,)

    def channels(self, pipe: Any) -> int:
        return pipe.transformer.config.in_channels // 4  # a token is a patch of 2 x 2

    def needs_own_scheduler(self, pipe: Any) -> bool:  # noqa: ARG002
        return True  # the pipeline hands it noise levels and a shift, whatever it is, and others mind

    def default_sampling(self, pipe: Any) -> tuple[int, float]:
        defaults = signature(pipe.__call__).parameters
        return defaults["num_inference_steps"].default, defaults["true_cfg_scale"].default

    def guidance_kwargs(self, scale: float, pictures: int) -> dict[str, Any]:
        return {"true_cfg_scale": scale, **({"negative_prompt": [_NO_PROMPT] * pictures} if scale > 1 else {})}

    def vae_latents(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)  # a video of one frame

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        return self.encode_text(pipe, [prompt or _NO_PROMPT for prompt in prompts])

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        tokens = self.prompt_tokens(pipe)
        text, mask = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device, max_sequence_length=tokens)
        mask = text.new_ones(text.shape[:2]).long() if mask is None else mask  # which it is where texts are of one length
        missing = tokens - text.shape[1]
        return {"prompt_embeds": pad(text, (0, 0, 0, missing)), "prompt_embeds_mask": pad(mask, (0, missing))}

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        tokens = self.prompt_tokens(pipe)
        return {"prompt_embeds": (tokens, pipe.transformer.config.joint_attention_dim), "prompt_embeds_mask": (tokens,)}

    def as_read(self, pipe: Any, condition: Condition) -> Condition:
        norm = pipe.transformer.txt_norm
        return {**condition, "prompt_embeds": norm(condition["prompt_embeds"].to(norm.weight))}

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        n, channels, height, width = x_t.shape
        text, mask = _without_common_padding(condition)
        packed = pipe.transformer(
            hidden_states=pipe._pack_latents(x_t, n, channels, height, width),
            timestep=t.to(x_t.dtype) / 1000,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * n,
            return_dict=False,
        )[0]
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(packed, height * scale, width * scale, scale).squeeze(2)

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        return _original_layers()

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        own = bare_shapes(shapes)
        if not {"txt_norm.weight", "transformer_blocks.0.txt_mod.1.weight"} <= own.keys():
            return None
        # As comfyanonymous/ComfyUI, comfy/model_detection.py, tells them.
        if "time_text_embed.addition_t_embedding.weight" in own:
            return CheckpointKind("Qwen-Image-Layered, which draws layers of a picture that it is given", supported=False)
        if "__index_timestep_zero__" in own:
            return CheckpointKind("Qwen-Image-Edit, which does not draw from text alone", supported=False)
        return _QWEN_IMAGE


def _without_common_padding(condition: Condition) -> tuple[Tensor, Tensor | None]:
    """Return texts as long as the longest of them, and a mask where one is shorter; as they come where there are no values."""
    text, mask = condition["prompt_embeds"], condition["prompt_embeds_mask"]
    if mask.is_meta:
        return text, mask
    lengths = mask.sum(1).long().tolist()
    longest = max(lengths)
    return text[:, :longest], mask[:, :longest] if min(lengths) < longest else None


@cache
def _original_layers() -> Mapping[str, OriginalLayer]:
    """Return the places of layers in QwenLM/Qwen-Image, whose names diffusers and ComfyUI keep."""
    ends = ("img_in", "txt_in", "norm_out.linear", "proj_out")
    times = (f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2))
    attention = (*(f"to_{part}" for part in ("q", "k", "v", "out.0", "add_out")), *(f"add_{part}_proj" for part in "qkv"))
    streams = (f"{stream}_{part}" for stream in ("img", "txt") for part in ("mod.1", "mlp.net.0.proj", "mlp.net.2"))
    block = [*(f"attn.{part}" for part in attention), *streams]
    blocks = (f"transformer_blocks.{i}.{part}" for i in range(MM_DIT_BLOCKS) for part in block)
    return {module: OriginalLayer(module) for module in (*ends, *times, *blocks)}
