"""`emoji-flow`: SD3's classes: an MM-DiT with joint attention, two CLIP encoders and T5; flow matching."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from captions import token_ids
from emoji import text_config

LR, TRAINED = 7e-4, ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
TOKENS, WIDTHS = 20, (128, 256)
READS_SIZES, CALL = False, {"max_sequence_length": TOKENS}
T5 = {"d_model": sum(WIDTHS), "d_kv": 32, "d_ff": 768, "num_layers": 2, "num_heads": 4}
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "caption_projection_dim": 192,
    "joint_attention_dim": sum(WIDTHS),
    "pooled_projection_dim": sum(WIDTHS),
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
}


def make_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """The pipeline with transformer and text encoders fresh from seed 0; blocks begin as the identity (adaLN-zero)."""
    vae.register_to_config(shift_factor=0.0)  # SD3's pipeline shifts latents
    torch.manual_seed(0)
    first, second = (CLIPTextModelWithProjection(text_config(tokenizer, width, 2)) for width in WIDTHS)
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **T5))
    transformer = SD3Transformer2DModel(**TRANSFORMER)
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and (
            name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out"
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), vae, first, tokenizer, second, tokenizer, t5, tokenizer
    )


def losses(
    pipe: StableDiffusion3Pipeline, x_0: Tensor, captions: list[str], sizes: Tensor, generator: torch.Generator
) -> Tensor:
    """The loss of each picture, [N]: squared error of the flow at logit-normal times (arXiv:2403.03206); see `emoji.losses`."""
    noise = torch.randn(x_0.shape, generator=generator)
    sigma = torch.randn(len(x_0), generator=generator).sigmoid()
    ids = token_ids(pipe.tokenizer, captions)
    read = [encoder(ids, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    text = torch.cat([each.hidden_states[-2] for each in read], -1)
    text = torch.cat([text, pipe.text_encoder_3(ids).last_hidden_state], 1)
    pooled = torch.cat([each.text_embeds for each in read], -1)
    x_t = torch.lerp(x_0, noise, sigma[:, None, None, None])
    prediction = pipe.transformer(x_t, text, pooled, sigma * 1000).sample
    return (prediction - (noise - x_0)).square().mean((1, 2, 3))
