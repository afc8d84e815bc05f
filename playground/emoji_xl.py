"""`emoji-xl`: SDXL's classes: two text encoders, pooled text, size conditions, zeros for the empty prompt; v-prediction."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from captions import token_ids
from draw import SIZE
from emoji import SCHEDULER, UNET, signal_to_noise, text_config

LR, TRAINED = 1e-3, ("unet", "text_encoder", "text_encoder_2")
TOKENS, WIDTHS, TIME_WIDTH = 24, (128, 256), 32
READS_SIZES, CALL = True, {}
XL_UNET = UNET | {
    "cross_attention_dim": sum(WIDTHS),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_WIDTH,
    "projection_class_embeddings_input_dim": WIDTHS[1] + 6 * TIME_WIDTH,
}


def make_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    """The pipeline with U-Net and text encoders fresh from seed 0."""
    torch.manual_seed(0)
    first = CLIPTextModel(text_config(tokenizer, WIDTHS[0], 2))
    second = CLIPTextModelWithProjection(text_config(tokenizer, WIDTHS[1], 2))
    unet = UNet2DConditionModel(**XL_UNET)
    scheduler = DDIMScheduler(**SCHEDULER, prediction_type="v_prediction")
    return StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer, unet, scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False
    )


def losses(
    pipe: StableDiffusionXLPipeline, x_0: Tensor, captions: list[str], sizes: Tensor, generator: torch.Generator
) -> Tensor:
    """The loss of each picture, [N]: squared error of v, weighted min-SNR-5; arguments as in `emoji.losses`."""
    noise = torch.randn(x_0.shape, generator=generator)
    t = torch.randint(1000, (len(x_0),), generator=generator)
    ids = token_ids(pipe.tokenizer, captions)
    first = pipe.text_encoder(ids, output_hidden_states=True)
    second = pipe.text_encoder_2(ids, output_hidden_states=True)
    worded = torch.tensor([caption != "" for caption in captions]).float()
    text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1) * worded[:, None, None]
    pooled = second.text_embeds * worded[:, None]
    zero, whole = torch.zeros_like(sizes), torch.full_like(sizes, SIZE)
    added = {"text_embeds": pooled, "time_ids": torch.stack([sizes, sizes, zero, zero, whole, whole], 1).float()}
    x_t = pipe.scheduler.add_noise(x_0, noise, t)
    prediction = pipe.unet(x_t, t, text, added_cond_kwargs=added).sample
    snr = signal_to_noise(pipe.scheduler, t)
    target = pipe.scheduler.get_velocity(x_0, noise, t)
    return (prediction - target).square().mean((1, 2, 3)) * snr.clamp(max=5) / (snr + 1)
