"""Kolors: SDXL's U-Net on ChatGLM3, whose text one more layer brings to SDXL's width; noise on 1100 timesteps.

ChatGLM's tokenizer pads on the left and numbers the places of its tokens from the first word on; the pipeline's text is always
of one length, and the U-Net reads its padding, so there is no mask. What the last token became is the one pooled text. Layers
of the attention read what `encoder_hid_proj` makes of the text, which is therefore the one layer that the closed form solves.
Latents are scaled and never normalised by channel. No other program has names of its own for the model's layers: ComfyUI's
nodes for it and its trainers keep diffusers'.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from esd_lora.families.family import CheckpointKind
from esd_lora.families.layer_names import OriginalLayer
from esd_lora.families.sdxl import StableDiffusionXL

_TEXT_LAYERS = r"^encoder_hid_proj$"


class Kolors(StableDiffusionXL):
    """281 cross-attention linears, the layer that reads the text among them; 140 are keys and values."""

    name = "kolors"
    pipelines = ("KolorsPipeline",)
    clip_encoders = clip_prefixes = clip_in_kohya = ()
    libraries = ("kolors",)
    needs = ("sentencepiece", "kolors")
    tags = ("kolors",)
    text_layers = _TEXT_LAYERS
    text_widths = frozenset({4096})
    scopes: ClassVar[Mapping[str, str]] = {
        **StableDiffusionXL.scopes,
        "xattn": rf"{StableDiffusionXL.scopes['xattn']}|{_TEXT_LAYERS}",
        "noxattn": rf"(?!{_TEXT_LAYERS}){StableDiffusionXL.scopes['noxattn']}",
    }
    normalises_latents = False
    published = ()
    metadata_pattern = "(?i)kolors"
    checkpoints = ()

    def most_skipped(self, pipe: Any) -> int:  # noqa: ARG002
        return 0

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        tokens, width = self.prompt_tokens(pipe), pipe.unet.config.encoder_hid_dim
        return {"prompt_embeds": (tokens, width), "pooled_prompt_embeds": (width,)}

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        return {}

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:  # noqa: ARG002
        return None
