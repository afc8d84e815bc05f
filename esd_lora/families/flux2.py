"""Flux.2 dev and Klein: an MM-DiT without biases whose blocks share their modulation, on the inner layers of a language model.

Dev (Mistral 3) takes the guidance scale as an input, as Flux.1 dev does, and trainings tell it 1 in the same way. Klein (Qwen
3) takes none: the base models are truly guided, always against the empty prompt; the distilled ones (`is_distilled` in the
index) paint in four steps unguided, so walk them with `trajectory_steps: 4` and `guidance: 1`. `xattn` is the text stream of
the double blocks and the layer by which text enters; the single blocks keep queries, keys, values and the MLP of both streams
in one layer, which counts as `selfattn` and `noxattn`. Text is padded to 512 tokens, all of which the denoiser reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from esd_lora.families.family import CheckpointKind, ModelFamily, PublishedModel
from esd_lora.families.layer_names import OriginalLayer, bare_shapes
from esd_lora.families.sd3 import MM_DIT_BLOCKS, MM_DIT_SCOPES, TEXT_LAYERS
from esd_lora.trajectory import Condition

_FLUX_2 = CheckpointKind("Flux.2")
_MARK = "single_stream_modulation.lin.weight"
"""Name of a tensor that no relative has (diffusers, loaders/single_file_utils.py)."""


class Flux2(ModelFamily):
    """Dev: 8 double blocks with 33 linears where text enters and in its stream, 48 single blocks. Klein 4B: 5 and 20."""

    name = "flux2"
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    denoiser = "transformer"
    text_layers = TEXT_LAYERS
    text_widths = frozenset({7680, 12288, 15360})
    scopes: ClassVar[Mapping[str, str]] = {**MM_DIT_SCOPES, "selfattn": r"\.attn\.to_(q|k|v|out(\.0)?|qkv_mlp_proj)$"}
    fixed_prediction_type = "flow"
    even_sigmas = True
    multiple = 2
    reads_hidden_states = True
    encoded_at_once = 2  # a prompt takes a fifth of a gigabyte and more
    # kohya-ss/musubi-tuner: src/musubi_tuner/dataset/image_video_dataset.py and utils/sai_model_spec.py
    published = (
        PublishedModel("flux_2_dev", "Flux.2-dev", "1024x1024", text_width=15360),
        PublishedModel("flux_2_klein_4b", "Flux.2-klein-4b", "1024x1024", text_width=7680),
        PublishedModel("flux_2_klein_9b", "Flux.2-klein-9b", "1024x1024", text_width=12288),
    )
    preset = "flux/fast"
    metadata_pattern = r"(?i)flux.?2"
    checkpoints = (_FLUX_2,)

    def channels(self, pipe: Any) -> int:
        return pipe.transformer.config.in_channels // 4  # a token is a patch of 2 x 2

    def takes_guidance(self, pipe: Any) -> bool:
        return pipe.transformer.config.guidance_embeds

    def default_sampling(self, pipe: Any) -> tuple[int, float]:
        return (4, 1.0) if pipe.config.get("is_distilled") else super().default_sampling(pipe)

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:
        return {"max_sequence_length": self.prompt_tokens(pipe)}

    def dynamic_shift(self, config: Mapping[str, Any], patches: int, steps: int) -> float:  # noqa: ARG002
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(patches, steps)

    def latent_statistics(self, pipe: Any, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        _, height, width = shape
        norm = pipe.vae.bn  # of patches, never trained further
        deviation = (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt()
        mean, deviation = (x.view(1, -1, 1, 1).expand(-1, -1, height // 2, width // 2) for x in (norm.running_mean, deviation))
        return pipe._unpatchify_latents(mean), pipe._unpatchify_latents(deviation)

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        text, _ = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device, **self.call_kwargs(pipe))
        return {"prompt_embeds": text}

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.prompt_tokens(pipe), pipe.transformer.config.joint_attention_dim)}

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        patches, text = pipe._patchify_latents(x_t), condition["prompt_embeds"]
        flow = pipe.transformer(
            hidden_states=pipe._pack_latents(patches),
            timestep=t.to(x_t.dtype) / 1000,
            guidance=condition.get("guidance"),
            encoder_hidden_states=text,
            txt_ids=pipe._prepare_text_ids(text).to(x_t.device),
            img_ids=pipe._prepare_latent_ids(patches).to(x_t.device),
            return_dict=False,
        )[0]
        return pipe._unpatchify_latents(flow.transpose(1, 2).reshape(patches.shape))

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        return _original_layers()

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        return _FLUX_2 if _MARK in bare_shapes(shapes) else None


@cache
def _original_layers() -> Mapping[str, OriginalLayer]:
    """Return the places of layers in black-forest-labs/flux2 (the names as in diffusers, loaders/single_file_utils.py)."""
    layers = {
        "x_embedder": OriginalLayer("img_in"),
        "context_embedder": OriginalLayer("txt_in"),
        "norm_out.linear": OriginalLayer("final_layer.adaLN_modulation.1", swaps=True),
        "proj_out": OriginalLayer("final_layer.linear"),
    }
    for modulation in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        layers[f"{modulation}.linear"] = OriginalLayer(f"{modulation}.lin")
    for embedder, original in (("timestep", "time_in"), ("guidance", "guidance_in")):
        layers[f"time_guidance_embed.{embedder}_embedder.linear_1"] = OriginalLayer(f"{original}.in_layer")
        layers[f"time_guidance_embed.{embedder}_embedder.linear_2"] = OriginalLayer(f"{original}.out_layer")
    whole = {
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_out": "txt_mlp.2",
    }
    for i in range(MM_DIT_BLOCKS):
        block, original = f"transformer_blocks.{i}", f"double_blocks.{i}"
        layers |= {f"{block}.{part}": OriginalLayer(f"{original}.{name}") for part, name in whole.items()}
        # Gate and value of an MLP three times as wide, and in single blocks queries, keys and values before them.
        layers[f"{block}.ff.linear_in"] = OriginalLayer(f"{original}.img_mlp.0", height=6, total=6)
        layers[f"{block}.ff_context.linear_in"] = OriginalLayer(f"{original}.txt_mlp.0", height=6, total=6)
        for first, which in enumerate("qkv"):
            layers[f"{block}.attn.to_{which}"] = OriginalLayer(f"{original}.img_attn.qkv", first, total=3)
            layers[f"{block}.attn.add_{which}_proj"] = OriginalLayer(f"{original}.txt_attn.qkv", first, total=3)
        single, original = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        layers[f"{single}.to_qkv_mlp_proj"] = OriginalLayer(f"{original}.linear1", height=9, total=9)
        layers[f"{single}.to_out"] = OriginalLayer(f"{original}.linear2")
    return layers
