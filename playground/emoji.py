"""`emoji`: Stable Diffusion's classes, noise prediction. It ships in the package."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from captions import token_ids

LR, TRAINED = 1e-3, ("unet", "text_encoder")
TOKENS, WIDTH = 32, 96
READS_SIZES, CALL = False, {}
UNET = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (80, 160),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, **more: object) -> CLIPTextConfig:
    """The configuration of a CLIP text encoder of heads of 32 channels, or of four heads where it is narrow."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(4, width // 32),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def make_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The pipeline with U-Net and text encoder fresh from seed 0."""
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(text_config(tokenizer, WIDTH, 2))
    unet = UNet2DConditionModel(**UNET)
    scheduler = DDIMScheduler(**SCHEDULER)
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


def losses(
    pipe: StableDiffusionPipeline, x_0: Tensor, captions: list[str], sizes: Tensor, generator: torch.Generator
) -> Tensor:
    """The loss of each picture, [N]: squared error of the noise, weighted min-SNR-5 (arXiv:2303.09556).

    Args:
        pipe: From `make_pipeline`.
        x_0: Scaled latents, [N, 8, 8, 8].
        captions: N prompts.
        sizes: Pixels a side of the picture before it was enlarged, [N]; SD does not read them.
        generator: Of noise and timesteps.
    """
    noise = torch.randn(x_0.shape, generator=generator)
    t = torch.randint(1000, (len(x_0),), generator=generator)
    text = pipe.text_encoder(token_ids(pipe.tokenizer, captions)).last_hidden_state
    prediction = pipe.unet(pipe.scheduler.add_noise(x_0, noise, t), t, text).sample
    snr = signal_to_noise(pipe.scheduler, t)
    return (prediction - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr


def signal_to_noise(scheduler: DDIMScheduler, t: Tensor) -> Tensor:
    """The signal-to-noise ratio at timesteps, [N]."""
    return (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod))[t]
