"""Stable Diffusion 3 and 3.5: an MM-DiT that predicts the flow from two CLIP encoders and T5.

Text and image tokens meet in one attention, so there is no cross-attention. `xattn` is the text stream of that attention
(`add_{q,k,v}_proj`, `to_add_out`), `selfattn` its image stream; SD 3.5 medium has further image-only `attn2` layers, which
are self-attention despite the name. The two kinds together are as near to ESD-x and its opposite as the architecture allows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from esd_lora.families.family import CheckpointKind, ModelFamily, PublishedModel
from esd_lora.families.layer_names import OriginalLayer, bare_shapes
from esd_lora.recipe import JOINT_SCOPE
from esd_lora.trajectory import Condition

TEXT_STREAM = r"\.(add_[qkv]_proj|to_add_out)$"
TEXT_LAYERS, POOLED_LAYERS = r"^context_embedder$", r"^time_text_embed\.text_embedder\.linear_1$"
"""Where text enters an MM-DiT: the tokens, and what the encoders pool of them."""
MM_DIT_SCOPES: Mapping[str, str] = {
    "xattn": rf"{TEXT_STREAM}|{TEXT_LAYERS}|{POOLED_LAYERS}",
    "xattn-kv": r"\.add_[kv]_proj$",
    "selfattn": r"\.attn2?\.to_(q|k|v|out\.0)$",
    "noxattn": rf"^(single_)?transformer_blocks\.(?!.*{TEXT_STREAM})",
    "full": rf"^(single_)?transformer_blocks\.|{TEXT_LAYERS}|{POOLED_LAYERS}",
    # multimodal-ai-lab/GEM: LoRA on queries and keys of both streams, and on nothing else
    JOINT_SCOPE: r"^transformer_blocks\.\d+\.attn\.(to|add)_[qk](_proj)?$",
}
"""The other embedders and the last projection, outside the blocks, stay as they are."""
MM_DIT_BLOCKS = 64
"""Number of blocks of the largest MM-DiT in sight, with room."""
_T5_TOKENS = 256
"""Tokens of T5 that the pipeline's call reads by default; small models may be trained with fewer."""
_SD_3 = CheckpointKind("Stable Diffusion 3")


class StableDiffusion3(ModelFamily):
    """SD 3 medium: 24 blocks, 97 linears where text enters and in its stream (the last block drops its output)."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    denoiser = "transformer"
    text_layers = TEXT_LAYERS
    pooled_layers = POOLED_LAYERS
    scopes: ClassVar[Mapping[str, str]] = MM_DIT_SCOPES
    fixed_prediction_type = "flow"
    multiple = 2
    published = (PublishedModel("sd3", "stable-diffusion-3", "1024x1024"),)
    metadata_pattern = "sd3|diffusion-3"
    checkpoints = (_SD_3,)

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        options = {"device": pipe.text_encoder.device, "do_classifier_free_guidance": False}
        text, _, pooled, _ = pipe.encode_prompt(list(prompts), None, None, **options, **self.call_kwargs(pipe))
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}

    def largest_side(self, pipe: Any) -> int:
        return pipe.transformer.config.pos_embed_max_size * pipe.transformer.config.patch_size

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        tokens = pipe.text_encoder.config.max_position_embeddings + self.call_kwargs(pipe)["max_sequence_length"]
        config = pipe.transformer.config
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:
        longest = pipe.tokenizer_3.model_max_length if pipe.tokenizer_3 else _T5_TOKENS
        return {"max_sequence_length": min(longest, _T5_TOKENS)}

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return pipe.transformer(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        return _original_layers()

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        return _SD_3 if "joint_blocks.0.x_block.attn.qkv.weight" in bare_shapes(shapes) else None


@cache
def _original_layers() -> Mapping[str, OriginalLayer]:
    """Return the places of layers in Stability-AI/sd3-ref."""
    layers = {
        "pos_embed.proj": OriginalLayer("x_embedder.proj"),
        "context_embedder": OriginalLayer("context_embedder"),
        "time_text_embed.timestep_embedder.linear_1": OriginalLayer("t_embedder.mlp.0"),
        "time_text_embed.timestep_embedder.linear_2": OriginalLayer("t_embedder.mlp.2"),
        "time_text_embed.text_embedder.linear_1": OriginalLayer("y_embedder.mlp.0"),
        "time_text_embed.text_embedder.linear_2": OriginalLayer("y_embedder.mlp.2"),
        "norm_out.linear": OriginalLayer("final_layer.adaLN_modulation.1", swaps=True),
        "proj_out": OriginalLayer("final_layer.linear"),
    }
    whole = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    for i in range(MM_DIT_BLOCKS):
        block, original = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        layers |= {f"{block}.{part}": OriginalLayer(f"{original}.{name}") for part, name in whole.items()}
        # Only the last block's has two outputs, and there they are swapped.
        layers[f"{block}.norm1_context.linear"] = OriginalLayer(f"{original}.context_block.adaLN_modulation.1", swaps=True)
        for first, which in enumerate("qkv"):
            layers[f"{block}.attn.to_{which}"] = OriginalLayer(f"{original}.x_block.attn.qkv", first, total=3)
            layers[f"{block}.attn2.to_{which}"] = OriginalLayer(f"{original}.x_block.attn2.qkv", first, total=3)
            layers[f"{block}.attn.add_{which}_proj"] = OriginalLayer(f"{original}.context_block.attn.qkv", first, total=3)
    return layers
