"""Wan 2.1 and 2.2: a DiT that predicts the flow of videos, with true cross-attention on UMT5.

Latents are [N, channels, frames, height, width]. What a prompt asks for shows in one frame, so trainings have one frame of
latents unless `train.video_frames` says more, and pictures are videos of one frame. Wan 2.2's TI2V-5B reads a time for each
patch, for patches of a given picture would be at 0; here all of them have the same. Wan 2.2's A14B, two denoisers that take
turns, is refused by `families.read_pipeline`: an eraser of one would leave the concept in the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor

from esd_lora.families.family import CheckpointKind, ModelFamily, PublishedModel
from esd_lora.families.layer_names import OriginalLayer, bare_shapes
from esd_lora.trajectory import Condition

_WAN = CheckpointKind("Wan")
_RELATIVE = CheckpointKind("a relative of Wan that reads more than text (I2V, VACE, Animate ...)", supported=False)
_PARTS = {"blocks", "head", "patch_embedding", "text_embedding", "time_embedding", "time_projection"}
_TEXT_EMBEDDER = r"^condition_embedder\.text_embedder\."
_BLOCKS = 40
"""Number of blocks of the largest model."""


class Wan(ModelFamily):
    """30 blocks in 1.3B and 5B, 40 in 14B, with four cross-attention linears each; text enters by two more."""

    name = "wan"
    pipelines = ("WanPipeline",)
    denoiser = "transformer"
    text_layers = rf"{_TEXT_EMBEDDER}linear_1$"
    scopes: ClassVar[Mapping[str, str]] = {
        "xattn": rf"\.attn2\.|{_TEXT_EMBEDDER}",
        "xattn-kv": r"\.attn2\.to_[kv]$",
        "selfattn": r"\.attn1\.",
        "noxattn": r"^blocks\.(?!.*\.attn2\.)",
        "full": rf"^blocks\.|{_TEXT_EMBEDDER}",
    }
    fixed_prediction_type = "flow"
    multiple = 2
    frames_per_latent = 4
    normalises_latents = True
    preset = "flux/fast"
    # kohya-ss/musubi-tuner: dataset/architectures.py and utils/sai_model_spec.py, whatever the size.
    published = (PublishedModel("wan", "wan2.1", "832x480"),)
    metadata_pattern = "wan"
    checkpoints = (_WAN,)

    def pixels_per_latent(self, pipe: Any) -> int:
        # Where the VAE is left out the pipeline says 8, and Wan 2.2's, the one of 48 channels, has 16.
        return 16 if self.channels(pipe) == 48 else pipe.vae_scale_factor_spatial

    def native_size(self, pipe: Any) -> tuple[int, int]:
        call, scale = signature(pipe.__call__).parameters, self.pixels_per_latent(pipe)
        return call["height"].default // scale, call["width"].default // scale

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:
        tokens = self.prompt_tokens(pipe)  # encode_prompt itself has fewer
        return {"max_sequence_length": tokens, "num_frames": 1}

    def sigmas(self, steps: int) -> list[float] | None:
        return [1 - i * (1 - 1 / 1000) / steps for i in range(steps)]  # as its UniPC, down to the last trained level

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        tokens = self.call_kwargs(pipe)["max_sequence_length"]
        options = {"device": pipe.text_encoder.device, "max_sequence_length": tokens}
        return {"prompt_embeds": pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, **options)[0]}

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.call_kwargs(pipe)["max_sequence_length"], pipe.transformer.config.text_dim)}

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if pipe.config.expand_timesteps:
            t = t[:, None].expand(-1, x_t[0, 0].numel() // self.multiple**2)
        text = condition["prompt_embeds"]
        return pipe.transformer(hidden_states=x_t, timestep=t, encoder_hidden_states=text, return_dict=False)[0]

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        return _original_layers()

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        own = bare_shapes(shapes)
        if not {"head.modulation", "head.head.weight", "patch_embedding.weight"} <= own.keys():
            return None
        # Relatives have parts of their own, or read pictures as further channels: four latents make a patch.
        as_many = own["head.head.weight"][0] == 4 * own["patch_embedding.weight"][1]
        return _WAN if as_many and {name.partition(".")[0] for name in own} <= _PARTS else _RELATIVE


@cache
def _original_layers() -> Mapping[str, OriginalLayer]:
    """Return the places of layers in Wan-Video/Wan2.1, which ComfyUI (comfy/ldm/wan/model.py) and musubi-tuner keep."""
    names = {
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
    }
    for i in range(_BLOCKS):
        for attention, original in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for part, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
                names[f"blocks.{i}.{attention}.{part}"] = f"blocks.{i}.{original}.{name}"
        names |= {f"blocks.{i}.ffn.net.0.proj": f"blocks.{i}.ffn.0", f"blocks.{i}.ffn.net.2": f"blocks.{i}.ffn.2"}
    return {module: OriginalLayer(original) for module, original in names.items()}
