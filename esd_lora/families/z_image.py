"""Z-Image and Z-Image-Turbo: a single-stream DiT on the last layer but one of Qwen 3.

Text and image share all weights of its blocks, so there is no cross-attention and no text stream. What text alone passes is
the layer by which it enters and the two blocks that refine it: these are `xattn`. Everything else reads both, or the image.
Texts are as long as they are: a condition pads them with zeros to 512 tokens and carries a mask, and the denoiser is handed
what the mask leaves, as by the pipeline.

The pipeline adds guidance to the prompt's prediction: its scale g is g + 1 elsewhere, and 0 is none. Turbo is distilled to
eight steps that are not guided; walk it with `trajectory_steps: 8` and `guidance: 1`. Its `cfg_normalization` and
`cfg_truncation` are off by default and stay so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from esd_lora.families.family import CheckpointKind, ModelFamily, PublishedModel
from esd_lora.families.layer_names import OriginalLayer, bare_shapes
from esd_lora.trajectory import Condition

_Z_IMAGE = CheckpointKind("Z-Image")
_MARKS = {"layers.0.adaLN_modulation.0.weight", "noise_refiner.0.attention.qkv.weight"}
"""Tensors that no relative has both of: Lumina 2's modulation is number 1, ControlNets have no refiners of these names."""
_BLOCKS, _REFINERS = 64, 8
"""Numbers of blocks in sight, with room."""
_TURBO_SHIFT = 3.0
"""The shift of Turbo's scheduler; the base model's is larger."""


class ZImage(ModelFamily):
    """6B: 15 linears that text alone passes; 30 blocks of both and 2 of the image with 256."""

    name = "z-image"
    pipelines = ("ZImagePipeline",)
    denoiser = "transformer"
    text_layers = r"^cap_embedder\.1$"
    scopes: ClassVar[Mapping[str, str]] = {
        "xattn": r"^(cap_embedder\.1$|context_refiner\.)",
        "xattn-kv": r"^context_refiner\..*\.to_[kv]$",
        "selfattn": r"^(layers|noise_refiner)\..*\.attention\.",
        "noxattn": r"^(layers|noise_refiner)\.",
        "full": r"^(cap_embedder\.1$|layers\.|noise_refiner\.|context_refiner\.)",
    }
    fixed_prediction_type = "flow"
    even_sigmas = True
    multiple = 2
    reads_hidden_states = True
    encoded_at_once = 2  # a prompt takes a fifth of a gigabyte and more
    unguided = 0.0
    # kohya-ss/musubi-tuner: src/musubi_tuner/dataset/image_video_dataset.py and utils/sai_model_spec.py
    published = (PublishedModel("z_image", "Z-Image", "1024x1024"),)
    preset = "flux/fast"
    metadata_pattern = r"(?i)z.?image"
    checkpoints = (_Z_IMAGE,)

    def side(self, pipe: Any) -> int:
        # 1024 pixels, which stand in the code of the pipeline's call; other pipelines have such an attribute for them.
        return getattr(pipe, "default_sample_size", 128)

    def needs_own_scheduler(self, pipe: Any) -> bool:  # noqa: ARG002
        return True  # the pipeline hands noise levels to it, which others do not take

    def default_sampling(self, pipe: Any) -> tuple[int, float]:
        return (8, 0.0) if pipe.scheduler.config["shift"] <= _TURBO_SHIFT else super().default_sampling(pipe)

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:
        return {"max_sequence_length": self.prompt_tokens(pipe)}

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        options = {"device": pipe.text_encoder.device, "do_classifier_free_guidance": False}
        texts, _ = pipe.encode_prompt(list(prompts), **options, **self.call_kwargs(pipe))
        tokens, lengths = self.prompt_tokens(pipe), torch.tensor([len(text) for text in texts], device=texts[0].device)
        return {
            "prompt_embeds": torch.stack([pad(text, (0, 0, 0, tokens - len(text))) for text in texts]),
            "prompt_attention_mask": (torch.arange(tokens, device=lengths.device) < lengths[:, None]).long(),
        }

    def call_condition(self, condition: Condition) -> Mapping[str, Any]:
        return {"prompt_embeds": _texts(condition)}

    def as_read(self, pipe: Any, condition: Condition) -> Condition:
        norm = pipe.transformer.cap_embedder[0]
        return {**condition, "prompt_embeds": norm(condition["prompt_embeds"].to(norm.weight))}

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        tokens, width = self.prompt_tokens(pipe), pipe.transformer.config.cap_feat_dim
        return {"prompt_embeds": (tokens, width), "prompt_attention_mask": (tokens,)}

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        velocities = pipe.transformer(
            list(x_t.unsqueeze(2).unbind(0)),  # a picture is a film of one frame
            (1000 - t.float()) / 1000,  # as precise as the pipeline has it
            _texts(condition),
            return_dict=False,
        )[0]
        return -torch.stack(velocities).squeeze(2)

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        return _original_layers()

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        return _Z_IMAGE if bare_shapes(shapes).keys() >= _MARKS else None


def _texts(condition: Condition) -> list[Tensor]:
    """Return each prompt's tokens without padding; with it on the meta device, which knows no lengths."""
    texts, mask = condition["prompt_embeds"], condition["prompt_attention_mask"]
    return [text if text.is_meta else text[own.bool()] for text, own in zip(texts, mask, strict=True)]


@cache
def _original_layers() -> Mapping[str, OriginalLayer]:
    """Return the places of layers in Tongyi-MAI/Z-Image's single files as ComfyUI has them (comfy/utils.py)."""
    layers = {
        "cap_embedder.1": OriginalLayer("cap_embedder.1"),
        "t_embedder.mlp.0": OriginalLayer("t_embedder.mlp.0"),
        "t_embedder.mlp.2": OriginalLayer("t_embedder.mlp.2"),
        "all_x_embedder.2-1": OriginalLayer("x_embedder"),
        "all_final_layer.2-1.linear": OriginalLayer("final_layer.linear"),
        "all_final_layer.2-1.adaLN_modulation.1": OriginalLayer("final_layer.adaLN_modulation.1"),
    }
    own = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
    for stack, count in (("layers", _BLOCKS), ("noise_refiner", _REFINERS), ("context_refiner", _REFINERS)):
        for block in (f"{stack}.{i}" for i in range(count)):
            layers |= {f"{block}.{part}": OriginalLayer(f"{block}.{part}") for part in own}
            layers[f"{block}.attention.to_out.0"] = OriginalLayer(f"{block}.attention.out")
            for first, which in enumerate("qkv"):
                layers[f"{block}.attention.to_{which}"] = OriginalLayer(f"{block}.attention.qkv", first, total=3)
    return layers
