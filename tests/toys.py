"""Toy-size pipelines of every model family: the real diffusers and transformers classes, random weights, latents of 8 x 8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
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


def byte_tokenizer(*markers: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer for T5 and language models with a token a byte, and one for every marker of a chat template."""
    tokens = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *markers]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(markers))
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


def _with_random_weights(model: nn.Module) -> Any:
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


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte tokenizer with the turns of Qwen 3's chat template, and the empty thoughts of one that is not to think."""
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    tokenizer.model_max_length = 64
    return tokenizer


def qwen3(model: Any, tokenizer: PreTrainedTokenizerFast, layers: int, width: int = WIDTH) -> Any:
    """Return a model of one of Qwen 3's classes."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"hidden_size": width, "intermediate_size": 2 * WIDTH, "num_hidden_layers": layers}
    return _with_random_weights(model(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads)))


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte tokenizer with the turns of Mistral 3's chat template; its processor's class needs torchvision."""
    # The pipeline's instruction is as long as a page, so here it is one token.
    tokenizer = byte_tokenizer(SYSTEM_MESSAGE, "<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]")
    tokenizer.chat_template = (
        "<s>{% for turn in messages %}{% set text = turn.content[0].text %}"
        "{% if turn.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]{% endif %}"
        "{% endfor %}"
    )
    tokenizer.model_max_length = 64
    return tokenizer


def mistral3(tokenizer: Any, layers: int, width: int = WIDTH) -> Mistral3ForConditionalGeneration:
    """Return a text encoder of Mistral 3's class."""
    heads = {"num_attention_heads": 2, "head_dim": 8}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width}
    text = {"num_hidden_layers": layers, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **text, **sizes, **heads},
        vision_config={"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 32, **sizes, **heads},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return _with_random_weights(Mistral3ForConditionalGeneration(config))


def _flux2(dev: bool) -> Any:
    width = 8  # of three layers, whose outputs stand beside each other
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=dev,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    shifting = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(**shifting), "vae": vae}
    parts["transformer"] = _with_random_weights(transformer)
    if dev:
        tokenizer = mistral_tokenizer()
        return Flux2Pipeline(text_encoder=mistral3(tokenizer, 30, width), tokenizer=tokenizer, **parts)
    tokenizer = qwen3_tokenizer()
    return Flux2KleinPipeline(text_encoder=qwen3(Qwen3ForCausalLM, tokenizer, 27, width), tokenizer=tokenizer, **parts)


def _z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[4, 6, 6]
    )
    tokenizer, scheduler = qwen3_tokenizer(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, _vae(), qwen3(Qwen3Model, tokenizer, 2), tokenizer, _with_random_weights(transformer))


_BUILDERS: dict[str, Callable[[], Any]] = {
    "sd": tiny_pipeline,
    "sd2-v": _sd2_v,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "sd35": lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "flux-dev": lambda: _flux(dev=True),
    "flux-schnell": lambda: _flux(dev=False),
    "sana": _sana,
    "flux2-klein": lambda: _flux2(dev=False),
    "flux2-dev": lambda: _flux2(dev=True),
    "z-image": _z_image,
}
TOYS = tuple(_BUILDERS)
SIZE_IN_CODE = ("flux", "flux2", "z-image")
"""Families whose native size stands in the code of their pipeline."""


def make_toy(name: str, seed: int = 0) -> Any:
    """Return the toy pipeline of one family; the seed decides its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _BUILDERS[name]()


def load_toy(folder: Path, **options: Any) -> Base:
    """Return a saved toy as a base. Where the native size stands in the pipeline's code, it is set to the toy's."""
    base = load_base(folder, device="cpu", **options)
    set_toy_size(base)
    return base


def set_toy_size(base: Base) -> None:
    """Have a base whose native size is in its pipeline's code draw 8 x 8 latents by default."""
    if base.family.name in SIZE_IN_CODE:
        base.pipe.default_sample_size = 8


def save_toy(name: str, folder: Path) -> Path:
    """Save the toy pipeline of one family and return its directory."""
    make_toy(name).save_pretrained(folder)
    return folder
