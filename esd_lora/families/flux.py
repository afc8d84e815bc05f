"""Flux.1 dev and schnell: an MM-DiT on packed latents, distilled models both.

Dev takes the guidance scale as an input. Trainings tell it 1 (`train.distilled_guidance`), where it is nearest to a model
without guidance, and guide by two predictions as everywhere else; pictures are painted with the pipeline's own 3.5. Schnell
is distilled to four steps and takes no scale: walk it with `trajectory_steps: 4` and `guidance: 1`, for it never learned to
be guided. `xattn` is the text stream of the double blocks, as in `sd3`; single blocks mix both streams in one set of layers,
which count as `selfattn` and `noxattn`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor

from esd_lora.families.family import CheckpointKind, ModelFamily, PublishedModel
from esd_lora.families.layer_names import OriginalLayer
from esd_lora.families.sd3 import MM_DIT_BLOCKS, MM_DIT_SCOPES, POOLED_LAYERS, TEXT_LAYERS
from esd_lora.trajectory import Condition

_FLUX_1 = CheckpointKind("Flux.1")


class Flux(ModelFamily):
    """19 double blocks with 78 linears where text enters and in its stream, 38 single blocks."""

    name = "flux"
    pipelines = ("FluxPipeline",)
    denoiser = "transformer"
    text_layers = TEXT_LAYERS
    pooled_layers = POOLED_LAYERS
    text_widths = frozenset({4096})
    scopes: ClassVar[Mapping[str, str]] = MM_DIT_SCOPES
    fixed_prediction_type = "flow"
    even_sigmas = True
    multiple = 2
    published = (PublishedModel("flux1", "flux-1-dev", "1024x1024"),)
    preset = "flux/fast"
    metadata_pattern = "flux(?!.?2)"  # which is another family
    checkpoints = (_FLUX_1,)

    def channels(self, pipe: Any) -> int:
        return pipe.transformer.config.in_channels // 4  # a token is a patch of 2 x 2

    def takes_guidance(self, pipe: Any) -> bool:
        return pipe.transformer.config.guidance_embeds

    def takes_negative_prompt(self, pipe: Any) -> bool:  # noqa: ARG002
        return False  # but by a second, true guidance, at twice the time, which these models were not trained for

    def needs_own_scheduler(self, pipe: Any) -> bool:
        return not pipe.scheduler.config["use_dynamic_shifting"]  # the pipeline shifts all the same, and others mind

    def default_sampling(self, pipe: Any) -> tuple[int, float]:
        return super().default_sampling(pipe) if self.takes_guidance(pipe) else (4, 0.0)

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:
        return {"max_sequence_length": 512 if self.takes_guidance(pipe) else 256}  # T5's, what each was trained with

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        text, pooled, _ = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device, **self.call_kwargs(pipe))
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        tokens, config = self.call_kwargs(pipe)["max_sequence_length"], pipe.transformer.config
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        n, channels, height, width = x_t.shape
        text = condition["prompt_embeds"]
        packed = pipe.transformer(
            hidden_states=pipe._pack_latents(x_t, n, channels, height, width),
            timestep=t.to(x_t.dtype) / 1000,
            guidance=condition.get("guidance"),
            encoder_hidden_states=text,
            pooled_projections=condition["pooled_prompt_embeds"],
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(n, height // 2, width // 2, x_t.device, x_t.dtype),
            return_dict=False,
        )[0]
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(packed, height * scale, width * scale, scale)

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        return _original_layers()

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        # Chroma, Flux.2 and Flux.1's own relatives share most names: diffusers knows them apart.
        return _FLUX_1 if diffusers_model_type(shapes) in ("flux-dev", "flux-schnell") else None


def diffusers_model_type(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Return diffusers' own name for what a single-file checkpoint holds; `None` where it does not know."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        kind = infer_diffusers_model_type({name: SimpleNamespace(shape=shape) for name, shape in shapes.items()})
    except (KeyError, UnboundLocalError, TypeError, ValueError):  # it trips over sizes it does not know
        return None
    return None if kind == "v1" else kind  # "v1" is also its word for whatever it does not know


@cache
def _original_layers() -> Mapping[str, OriginalLayer]:
    """Return the places of layers in black-forest-labs/flux."""
    layers = {
        "x_embedder": OriginalLayer("img_in"),
        "context_embedder": OriginalLayer("txt_in"),
        "norm_out.linear": OriginalLayer("final_layer.adaLN_modulation.1", swaps=True),
        "proj_out": OriginalLayer("final_layer.linear"),
    }
    for embedder, original in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        layers[f"time_text_embed.{embedder}_embedder.linear_1"] = OriginalLayer(f"{original}.in_layer")
        layers[f"time_text_embed.{embedder}_embedder.linear_2"] = OriginalLayer(f"{original}.out_layer")
    whole = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }
    for i in range(MM_DIT_BLOCKS):
        block, original = f"transformer_blocks.{i}", f"double_blocks.{i}"
        layers |= {f"{block}.{part}": OriginalLayer(f"{original}.{name}") for part, name in whole.items()}
        single, joined = f"single_transformer_blocks.{i}", f"single_blocks.{i}.linear1"
        for first, which in enumerate("qkv"):
            layers[f"{block}.attn.to_{which}"] = OriginalLayer(f"{original}.img_attn.qkv", first, total=3)
            layers[f"{block}.attn.add_{which}_proj"] = OriginalLayer(f"{original}.txt_attn.qkv", first, total=3)
            layers[f"{single}.attn.to_{which}"] = OriginalLayer(joined, first, total=7)
        layers[f"{single}.proj_mlp"] = OriginalLayer(joined, first=3, height=4, total=7)
        layers[f"{single}.norm.linear"] = OriginalLayer(f"single_blocks.{i}.modulation.lin")
        layers[f"{single}.proj_out"] = OriginalLayer(f"single_blocks.{i}.linear2")
    return layers
