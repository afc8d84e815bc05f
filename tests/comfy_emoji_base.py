"""A custom node for ComfyUI, for tests and pictures: the built-in base as MODEL, CLIP and VAE, in place of Load Checkpoint.

ComfyUI knows models by their published sizes, and this one has a size of its own: U-Net and text encoder are ComfyUI's classes
in that size, the tokenizer is the base's, and the VAE is diffusers'. EMOJI_PIPELINE, a variable of the environment, names the
base's folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import comfy.ops  # pyright: ignore[reportMissingImports]
import torch
from comfy import latent_formats, model_detection, sd1_clip, supported_models, supported_models_base  # pyright: ignore
from comfy.model_patcher import ModelPatcher  # pyright: ignore[reportMissingImports]
from comfy.sd import CLIP  # pyright: ignore[reportMissingImports]
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from original_checkpoints import unet as original_names

PIPELINE = Path(os.environ["EMOJI_PIPELINE"])
CPU = torch.device("cpu")


def config_of(part: str) -> dict[str, Any]:
    return json.loads((PIPELINE / part / "config.json").read_text("utf-8"))


class Operations(comfy.ops.disable_weight_init):
    """ComfyUI's layers, with as many groups in a norm as the base has."""

    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups: int, *args: Any, **options: Any):  # noqa: ARG002
            super().__init__(config_of("unet")["norm_num_groups"], *args, **options)


class Latents(latent_formats.LatentFormat):
    scale_factor = config_of("vae")["scaling_factor"]
    latent_channels = config_of("vae")["latent_channels"]


class Kind(supported_models.SD15):
    latent_format = Latents
    custom_operations = Operations
    unet_extra_config = {"num_heads": config_of("unet")["attention_head_dim"], "num_head_channels": -1}  # noqa: RUF012

    def inpaint_model(self) -> bool:
        return False  # its latents have eight channels


class Tokenizer(sd1_clip.SDTokenizer):
    def __init__(self, **options: Any):
        length, width = config_of("text_encoder")["max_position_embeddings"], config_of("text_encoder")["hidden_size"]
        sizes = {"max_length": length, "embedding_size": width}
        super().__init__(str(PIPELINE / "tokenizer"), tokenizer_class=PreTrainedTokenizerFast, **sizes, **options)


class TextEncoder(sd1_clip.SDClipModel):
    def __init__(self, **options: Any):
        config = config_of("text_encoder")
        special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}
        length = config["max_position_embeddings"]
        super().__init__(max_length=length, textmodel_json_config=config, special_tokens=special, **options)
        words = self.operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=torch.float32)
        self.transformer.set_input_embeddings(words)


class BothTokenizers(sd1_clip.SD1Tokenizer):
    def __init__(self, **options: Any):
        super().__init__(tokenizer=Tokenizer, **options)


class BothEncoders(sd1_clip.SD1ClipModel):
    def __init__(self, **options: Any):
        super().__init__(clip_model=TextEncoder, **options)


class Vae:
    """What VAE Decode calls."""

    def __init__(self):
        self._vae = AutoencoderKL.from_pretrained(PIPELINE / "vae", torch_dtype=torch.float32)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (self._vae.decode(latents.float()).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)


class EmojiBase:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {}}

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "esd-lora"

    def load(self) -> tuple[Any, Any, Any]:
        prefix = "model.diffusion_model."
        denoiser = UNet2DConditionModel.from_pretrained(PIPELINE / "unet", torch_dtype=torch.float32)
        weights = {name: tensor.float() for name, tensor in original_names(denoiser).items()}
        model = Kind(model_detection.detect_unet_config(weights, prefix)).get_model({}, "", device=CPU)
        model.diffusion_model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
        text = load_file(PIPELINE / "text_encoder" / "model.safetensors")
        text = {f"text_model.{name.removeprefix('text_model.')}": tensor.float() for name, tensor in text.items()}
        target = supported_models_base.ClipTarget(BothTokenizers, BothEncoders)
        clip = CLIP(target, model_options={"dtype": torch.float32, "load_device": CPU, "offload_device": CPU})
        missing, unexpected = clip.load_sd(text)
        assert set(missing) <= {"text_projection.weight"}, missing
        assert not unexpected, unexpected
        return ModelPatcher(model, CPU, CPU), clip, Vae()


NODE_CLASS_MAPPINGS = {"EmojiBase": EmojiBase}
NODE_DISPLAY_NAME_MAPPINGS = {"EmojiBase": "Built-in base of esd-lora"}
