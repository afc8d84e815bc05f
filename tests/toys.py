"""Toy-size pipelines of every model family: the real diffusers and transformers classes, random weights, latents of 8 x 8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from tiny import tiny_pipeline, tiny_tokenizer, tiny_unet

WIDTH = 16  # of every text encoder but SDXL's second
_LDM_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def clip(projected: bool = False, width: int = WIDTH) -> Any:
    """Return a text encoder of CLIP's kind for `tiny_tokenizer`."""
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for T5 and Gemma with a token a byte."""
    tokens = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **specials)


def _t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    sizes = {"d_model": WIDTH, "d_ff": 2 * WIDTH, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))


def _vae(channels: int = 4) -> AutoencoderKL:
    """Return a VAE with eight pixels to a latent, as in every family of these."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=64,
        shift_factor=0.1,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def _with_random_weights(model: nn.Module) -> nn.Module:
    """Fill what starts at zero or nearly so, so that text, time and latents all matter to the prediction."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / fan_in) ** 0.5)
    return model


def _sd2_v() -> StableDiffusionPipeline:
    pipe = tiny_pipeline()
    unet = tiny_unet(attention_head_dim=[2, 4], use_linear_projection=True)
    scheduler = DDIMScheduler(
        **_LDM_BETAS,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    parts = {**pipe.components, "unet": unet, "vae": _vae(), "scheduler": scheduler}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def _sdxl() -> StableDiffusionXLPipeline:
    unet = tiny_unet(
        attention_head_dim=[2, 4],
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2],
        cross_attention_dim=3 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 2 * WIDTH,
    )
    scheduler = EulerDiscreteScheduler(**_LDM_BETAS, timestep_spacing="leading", steps_offset=1)
    texts = (clip(), clip(projected=True, width=2 * WIDTH), tiny_tokenizer(), tiny_tokenizer())
    return StableDiffusionXLPipeline(_vae(), *texts, unet, scheduler, add_watermarker=False)


def _sd3(**changes: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=32,
        **changes,
    )
    t5, scheduler = byte_tokenizer(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    long = T5EncoderModel(T5Config(vocab_size=len(t5), d_model=2 * WIDTH, d_ff=WIDTH, d_kv=8, num_heads=2, num_layers=1))
    texts = (clip(True), tiny_tokenizer(), clip(True), tiny_tokenizer(), long, t5)
    return StableDiffusion3Pipeline(_with_random_weights(transformer), scheduler, _vae(8), *texts)


def _flux(dev: bool) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),
    )
    shifting = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0} if dev else {"shift": 1.0}
    scheduler, t5 = FlowMatchEulerDiscreteScheduler(**shifting), byte_tokenizer()
    return FluxPipeline(scheduler, _vae(), clip(), tiny_tokenizer(), _t5(t5), t5, _with_random_weights(transformer))


def _sana() -> SanaPipeline:
    tokenizer = byte_tokenizer()
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 4,
        decoder_block_types=("ResBlock",) * 4,
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(tokenizer, _with_random_weights(Gemma2Model(gemma)), vae, _with_random_weights(transformer), scheduler)


def wan(**changes: Any) -> WanPipeline:
    """Return Wan 2.1, or with `expand_timesteps` Wan 2.2's TI2V-5B, of four channels; its tokenizer ends every text."""
    tokenizer = byte_tokenizer()
    end = ("</s>", tokenizer.convert_tokens_to_ids("</s>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    sizes = {"d_model": WIDTH, "d_ff": 2 * WIDTH, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes))
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    with torch.no_grad():
        for block in transformer.blocks:
            block.attn2.norm_q.weight.fill_(4.0)  # sharp enough for a few words to count among 500 places of padding
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 1.5, 1.0, 0.8],
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    models = _with_random_weights(encoder), vae, scheduler, _with_random_weights(transformer)
    return WanPipeline(tokenizer, *models, **changes)


_BUILDERS: dict[str, Callable[[], Any]] = {
    "sd": tiny_pipeline,
    "sd2-v": _sd2_v,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "sd35": lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "flux-dev": lambda: _flux(dev=True),
    "flux-schnell": lambda: _flux(dev=False),
    "sana": _sana,
    "wan": wan,
}
TOYS = tuple(_BUILDERS)


def make_toy(name: str, seed: int = 0) -> Any:
    """Return the toy pipeline of one family; the seed decides its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _BUILDERS[name]()


def load_toy(folder: Path, **options: Any) -> Base:
    """Return a saved toy as a base, with a toy's native size."""
    return with_toy_size(load_base(folder, device="cpu", **options))


def with_toy_size(base: Base) -> Base:
    """Return a base, its native size a toy's where that stands in the pipeline's code and not in a configuration."""
    if base.family.name == "flux":
        base.pipe.default_sample_size = 8
    if base.family.name == "wan":
        base.pipe.__call__ = partial(base.pipe.__call__, height=64, width=64)  # of which the family reads the defaults
    return base


def save_toy(name: str, folder: Path) -> Path:
    """Save the toy pipeline of one family and return its directory."""
    make_toy(name).save_pretrained(folder)
    return folder
