"""Stable Diffusion 1.x and 2.x, their LCM distillates, and the built-in emoji base: a U-Net with cross-attention on CLIP."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor

from esd_lora.families.family import CheckpointKind, ModelFamily, PublishedModel
from esd_lora.families.layer_names import CHECKPOINT_PREFIX, OriginalLayer, unet_layers
from esd_lora.trajectory import Condition

# kohya's, A1111's and ComfyUI's loaders have no place for an update of these, so no scope touches them.
_OUTSIDE = r"conv_in|conv_out|time_embedding\.|add_embedding\."
_SD_1 = CheckpointKind("SD 1.x", config="sd1", prediction_type="epsilon")
_SD_2 = CheckpointKind("SD 2.x", config="sd2", v_side=96)  # those that predict v draw 768 pixels, the others 512
UNET_ALONE = CheckpointKind("a U-Net alone")
"""A checkpoint of the denoiser without text encoders."""


class StableDiffusion(ModelFamily):
    """64 cross-attention linears (`xattn`), 32 of them keys and values (`xattn-kv`); SD 2.x predicts noise or v."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    denoiser = "unet"
    clip_encoders = ("text_encoder",)
    clip_prefixes = ("cond_stage_model.",)
    clip_in_kohya = ("lora_te_",)
    tags = ("stable-diffusion", "stable-diffusion-diffusers")
    text_layers = r"\.attn2\.to_[kv]$"
    text_widths = frozenset({768, 1024})
    scopes: ClassVar[Mapping[str, str]] = {
        "xattn": r"\.attn2\.",
        "xattn-kv": r"\.attn2\.to_[kv]$",
        "selfattn": r"\.attn1\.",
        "noxattn": rf"^(?!{_OUTSIDE})(?!.*\.attn2\.)",
        "full": rf"^(?!{_OUTSIDE})",
    }
    published = (
        PublishedModel("sd_v1", "stable-diffusion-v1", "512x512", text_width=768),
        PublishedModel("sd_v2", "stable-diffusion-v2-768-v", "768x768", 1024, prediction_type="v_prediction", v2=True),
        PublishedModel("sd_v2", "stable-diffusion-v2-512", "512x512", text_width=1024, v2=True),
    )
    preset = "sd/fast"
    metadata_pattern = r"^(?!.*(sdxl|-xl-)).*(sd_v|-v1|-v2)"
    kohya_keeps_diffusers_names = True
    checkpoints = (_SD_1, _SD_2)

    def needs_own_scheduler(self, pipe: Any) -> bool:
        return "original_inference_steps" in signature(pipe.__call__).parameters  # LCM's, which it hands to the scheduler

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        return {"prompt_embeds": pipe.encode_prompt(list(prompts), pipe.text_encoder.device, 1, False)[0]}

    def most_skipped(self, pipe: Any) -> int:
        return pipe.text_encoder.config.num_hidden_layers

    def encode_skipping(self, pipe: Any, prompts: Sequence[str], clip_skip: int) -> Condition:
        # diffusers 0.42 looks for the last norm where transformers 5 has it no longer, so it is not the pipeline that encodes.
        encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
        whole = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(list(prompts), **whole).to(encoder.device)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        layers = encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return {"prompt_embeds": getattr(encoder, "text_model", encoder).final_layer_norm(layers[-1 - clip_skip])}

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        return {"prompt_embeds": (pipe.text_encoder.config.max_position_embeddings, pipe.unet.config.cross_attention_dim)}

    def added_conditions(self, pipe: Any, x_t: Tensor, condition: Condition) -> dict[str, Tensor] | None:  # noqa: ARG002
        """Return the U-Net's conditions beside text and time."""
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
            added_cond_kwargs=self.added_conditions(pipe, x_t, condition),
            return_dict=False,
        )[0]

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:
        return unet_layers(4, (1, 2, 3), names)

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        if not has_unet(shapes, labels=False):
            return None
        if refused := refused_unet(shapes):
            return refused
        if any(name.startswith("cond_stage_model.transformer.") for name in shapes):  # OpenAI's CLIP
            return _SD_1
        return _SD_2 if any(name.startswith("cond_stage_model.model.") for name in shapes) else UNET_ALONE  # OpenCLIP


def has_unet(shapes: Mapping[str, Sequence[int]], *, labels: bool) -> bool:
    """Return whether a checkpoint holds a U-Net under CompVis' names, with or without labels beside text and time."""
    unet = CHECKPOINT_PREFIX
    return f"{unet}input_blocks.0.0.weight" in shapes and (f"{unet}label_emb.0.0.weight" in shapes) == labels


def refused_unet(shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
    """Return what a checkpoint with a U-Net holds if that draws from more than text, or by a schedule no family covers."""
    channels = shapes[f"{CHECKPOINT_PREFIX}input_blocks.0.0.weight"][1]
    if channels != 4:
        title = f"an inpainting, depth or editing model, its U-Net taking {channels} channels instead of 4"
    elif any(name.startswith("control_model.") for name in shapes):
        title = "a ControlNet"
    elif "edm_mean" in shapes:
        title = "Playground v2.5, whose noise schedule (EDM) no family covers"
    elif "edm_vpred.sigma_max" in shapes:  # as comfyanonymous/ComfyUI, comfy/supported_models.py, tells it
        title = "CosXL, whose noise schedule (EDM) no family covers"
    else:
        return None
    return CheckpointKind(title, supported=False)
