"""A Stable Diffusion pipeline of real diffusers classes at toy size, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe


def tiny_tokenizer(length: int = 16) -> CLIPTokenizer:
    """Return CLIP's tokenizer over bytes, without merges."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length)


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    """Return a U-Net of two levels; `changes` are fields of its configuration."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes})


def tiny_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Return a pipeline with latents of 8 x 8; the seed decides its weights."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                projection_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=16,
        )
        unet = tiny_unet()
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """Save a tiny pipeline and return its directory."""
    tiny_pipeline(seed).save_pretrained(folder)
    return folder


def tiny_recipe(base: Path | str, preset: str = "fast", concepts: Sequence[object] = ("a cat",), **settings: object) -> Recipe:
    """Return a preset cut down to run in a moment; `settings` are fields of `train`, but for those of the recipe itself."""
    small: dict[str, object] = {"steps": 4, "trajectory_steps": 4, "preview_every": 0, "checkpoint_every": 0, "probe_every": 0}
    fixed: dict[str, object] = {}
    if preset == "fast":  # with numbers, so that nothing has to be measured
        small |= {"trajectories": 2, "preserve_trajectories": 2, "preserve_batch": 2, "preserve_steps": None, "null_batch": 0}
        small |= {"lr": 4e-3, "lr_schedule": "cosine", "warmup": 0, "preserve_weight": 1.5}
        fixed = {"eta": 3.0, "anchor": None, "frames": (), "closed_form": None}
    names = ("scope", "objective", "eta", "anchor", "frames", "closed_form", "preserve", "lora", "allow_code")
    own = {**fixed, **{key: settings.pop(key) for key in names if key in settings}}
    overrides = {f"train.{key}": value for key, value in {**small, **settings}.items()}
    return load_recipe(preset, overrides, base=str(base), concepts=list(concepts), **{"preserve": ["a dog", "a hat"], **own})
