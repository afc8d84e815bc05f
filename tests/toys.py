"""Toy-size pipelines of every model family: the real diffusers and transformers classes, random weights, latents of 8 x 8."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    KolorsPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
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
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
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


def _initialised(model: nn.Module) -> nn.Module:
    """Fill every weight of a model that leaves its memory as it was."""
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    return _with_random_weights(model)


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


def _gemma(tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> nn.Module:
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        **sizes,
    )
    return _with_random_weights(Gemma2Model(config))


def _sana() -> SanaPipeline:
    tokenizer = byte_tokenizer()
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
    return SanaPipeline(tokenizer, _gemma(tokenizer, num_hidden_layers=1), vae, _with_random_weights(transformer), scheduler)


def _pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
    )
    tokenizer = byte_tokenizer()
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)  # as published
    return PixArtSigmaPipeline(tokenizer, _t5(tokenizer), _vae(), _with_random_weights(transformer), scheduler)


def _lumina2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    tokenizer = byte_tokenizer()
    gemma, scheduler = _gemma(tokenizer, num_hidden_layers=2), FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipe = Lumina2Pipeline(_with_random_weights(transformer), scheduler, _vae(), gemma, tokenizer)
    # The system prompt is 165 bytes, and would be most of every sequence.
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(pipe.system_prompt, "S")
    return pipe


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Return Qwen's tokenizer with a token a byte, and one for each word of the template that Qwen-Image drops."""
    words = (
        "Describe the image by detailing color shape size texture quantity text spatial relationships of objects and background"
    )
    letters = pre_tokenizers.ByteLevel.alphabet()
    whole = ["system", "user", "assistant", "Describe", *(f"Ġ{word}" for word in words.split()[1:])]
    merges = list(dict.fromkeys((word[:i], word[i]) for word in whole for i in range(1, len(word))))
    tokens = ["<|endoftext|>", *sorted(letters), *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Qwen2Tokenizer({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def _qwen_image() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    statistics = {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [1.5, 0.8, 1.2, 0.9]}
    vae = AutoencoderKLQwenImage(base_dim=4, z_dim=4, num_res_blocks=1, **statistics)
    shifting = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    scheduler = FlowMatchEulerDiscreteScheduler(**shifting, shift=1.0, shift_terminal=0.02)
    transformer = _with_random_weights(transformer)
    return QwenImagePipeline(scheduler, vae, _with_random_weights(encoder), tokenizer, transformer)


@cache
def _letters() -> Path:
    """Return a vocabulary of sentencepiece that lasts as long as the process: letters, and bytes for what they do not spell."""
    from sentencepiece import SentencePieceTrainer

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    SentencePieceTrainer.train(
        sentence_iterator=iter(["abcdefghijklmnopqrstuvwxyz ,."]),
        model_prefix=f"{folder}/tokenizer",
        model_type="char",
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return Path(folder) / "tokenizer.model"


def chat_glm(**sizes: int) -> tuple[ChatGLMModel, ChatGLMTokenizer]:
    """Return a text encoder of ChatGLM3's kind, and its tokenizer; `sizes` are fields of its configuration."""
    tokenizer = ChatGLMTokenizer(str(_letters()))
    config = ChatGLMConfig(
        padded_vocab_size=tokenizer.vocab_size,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        original_rope=True,
        **sizes,
    )
    return _initialised(ChatGLMModel(config)), tokenizer


def kolors_scheduler() -> EulerDiscreteScheduler:
    """Return the scheduler of Kwai-Kolors/Kolors-diffusers."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.014, "num_train_timesteps": 1100}
    return EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)


def _kolors() -> KolorsPipeline:
    sizes = {"hidden_size": WIDTH, "ffn_hidden_size": 2 * WIDTH, "kv_channels": 8, "num_attention_heads": 2, "num_layers": 2}
    glm, tokenizer = chat_glm(**sizes)
    unet = tiny_unet(
        attention_head_dim=[2, 4],
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return KolorsPipeline(_vae(), glm, tokenizer, _with_random_weights(unet), kolors_scheduler())


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
    "pixart": _pixart,
    "lumina2": _lumina2,
    "qwen-image": _qwen_image,
    "kolors": _kolors,
    "flux2-klein": lambda: _flux2(dev=False),
    "flux2-dev": lambda: _flux2(dev=True),
    "z-image": _z_image,
    "wan": wan,
}
TOYS = tuple(_BUILDERS)
SIZE_IN_CODE = ("flux", "qwen-image", "flux2", "z-image")
"""Families whose native size stands in the code of their pipeline."""


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
    if base.family.name in SIZE_IN_CODE:
        base.pipe.default_sample_size = 8
    if base.family.name == "wan":
        base.pipe.__call__ = partial(base.pipe.__call__, height=64, width=64)  # of which the family reads the defaults
    return base


def save_toy(name: str, folder: Path) -> Path:
    """Save the toy pipeline of one family and return its directory."""
    make_toy(name).save_pretrained(folder)
    return folder
