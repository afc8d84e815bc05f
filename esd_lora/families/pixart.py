"""PixArt-Sigma: a DiT that predicts noise, with true cross-attention on T5. The smallest family, to be read first."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from esd_lora.families.family import CheckpointKind, ModelFamily
from esd_lora.families.layer_names import OriginalLayer, bare_shapes
from esd_lora.trajectory import Condition


class PixArtSigma(ModelFamily):
    """PixArt-Sigma XL: 28 blocks with four cross-attention linears each, and the two layers by which text enters."""

    name = "pixart"
    pipelines = ("PixArtSigmaPipeline",)
    denoiser = "transformer"
    text_layers = r"^caption_projection\.linear_1$"
    scopes: ClassVar[Mapping[str, str]] = {
        "xattn": r"\.attn2\.|^caption_projection\.",
        "xattn-kv": r"\.attn2\.to_[kv]$",
        "selfattn": r"\.attn1\.",
        "noxattn": r"^transformer_blocks\.(?!.*\.attn2\.)",
        "full": r"^transformer_blocks\.|^caption_projection\.",
    }
    multiple = 2
    pipelines_load_loras = False
    metadata_pattern = "pixart"

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:  # noqa: ARG002
        # Sizes are already those the model takes, and what a prompt says should not depend on which packages clean it.
        return {"use_resolution_binning": False, "clean_caption": False}

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        text, mask, _, _ = pipe.encode_prompt(list(prompts), False, device=pipe.text_encoder.device)
        return {"prompt_embeds": text, "prompt_attention_mask": mask}

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        tokens = self.prompt_tokens(pipe)
        return {"prompt_embeds": (tokens, pipe.transformer.config.caption_channels), "prompt_attention_mask": (tokens,)}

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        noise = pipe.transformer(
            x_t,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},  # those of PixArt-Alpha
            return_dict=False,
        )[0]
        return noise[:, : x_t.shape[1]]  # the rest is the variance, which no sampler here asks for

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        return _original_layers()

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        # PixArt-Alpha has the same blocks, and embeds the ratio of sides.
        bare = bare_shapes(shapes)
        sigma = "blocks.0.cross_attn.kv_linear.weight" in bare and "ar_embedder.mlp.0.weight" not in bare
        return CheckpointKind("PixArt-Sigma") if sigma else None


@cache
def _original_layers() -> Mapping[str, OriginalLayer]:
    """Return the places of layers in PixArt-alpha/PixArt-sigma (`diffusion/model/nets`)."""
    embedders = {
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
    }
    whole = {
        "attn1.to_out.0": "attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "attn2.to_out.0": "cross_attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    }
    layers = {module: OriginalLayer(name) for module, name in embedders.items()}
    for i in range(64):  # published are 28
        block, original = f"transformer_blocks.{i}", f"blocks.{i}"
        layers |= {f"{block}.{part}": OriginalLayer(f"{original}.{name}") for part, name in whole.items()}
        for first, which in enumerate("qkv"):
            layers[f"{block}.attn1.to_{which}"] = OriginalLayer(f"{original}.attn.qkv", first, total=3)
        for first, which in enumerate("kv"):
            layers[f"{block}.attn2.to_{which}"] = OriginalLayer(f"{original}.cross_attn.kv_linear", first, total=2)
    return layers
