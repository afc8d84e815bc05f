"""The places of layers in the original projects' models, and the map of the U-Nets that Stable Diffusion and SDXL share.

The names are facts of other projects: CompVis/stable-diffusion and Stability-AI/generative-models (U-Nets),
kohya-ss/sd-scripts. The originals of the transformers keep queries, keys and values in one weight, so a layer in diffusers may
be some rows of a layer there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

KOHYA_PREFIX = "lora_unet_"
"""Prefix of the denoiser's layers in kohya's files, transformers included."""
CHECKPOINT_PREFIX = "model.diffusion_model."
"""Prefix of the denoiser's tensors in checkpoints for A1111 and ComfyUI; some files with a denoiser alone leave it out."""
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_TRANSFORMER = [
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
]
_DEPTH = 10  # transformer blocks of SDXL's deepest attentions


def bare_shapes(shapes: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
    """Return the shapes of a single-file checkpoint's tensors with the denoiser's under their bare names."""
    return {name.removeprefix(CHECKPOINT_PREFIX): shape for name, shape in shapes.items()}


class OriginalLayer(NamedTuple):
    """A layer's place in the original model: a whole weight there, or some rows of one."""

    name: str
    """Path of the original layer, without any prefix."""
    first: float = 0
    """First row, in units of the layer's number of inputs."""
    height: float = 1
    """Number of rows, in the same unit; a fraction for keys and values that have fewer heads than queries."""
    total: float = 0
    """Rows of the whole original weight in the same unit; 0 where the layer is the whole of it."""
    swaps: bool = False
    """A modulation layer of two outputs has them (shift, scale) there and (scale, shift) in diffusers."""

    def rows(self, inputs: int) -> slice:
        """Return the layer's rows in the original weight.

        Args:
            inputs: Number of the layer's inputs, which are those of the original too.
        """
        if not self.total:
            return slice(None)
        return slice(round(self.first * inputs), round((self.first + self.height) * inputs))

    def whole(self, inputs: int) -> int:
        """Return the number of rows of the whole original weight, where the layer is some of them."""
        return round(self.total * inputs)

    def reordered(self, rows: Tensor, inputs: int) -> Tensor:
        """Return this layer's rows in the other project's order: the same function leads there and back.

        Args:
            rows: [outputs, ...].
            inputs: Number of the layer's inputs.
        """
        return torch.cat(rows.chunk(2)[::-1]) if self.swaps and len(rows) == 2 * inputs else rows


def unet_layers(levels: int, attending: tuple[int, ...], names: Collection[str]) -> Mapping[str, OriginalLayer]:
    """Return the places of a U-Net's layers in CompVis' model, by module path in diffusers.

    Args:
        levels: Number of down blocks in the published models, each of which has two resnets.
        attending: Their up blocks with attention.
        names: Of a checkpoint's tensors, without prefix, which tell its own depth and up blocks if it has this layout.
    """
    depths = [k for k in range(1, 8) if f"input_blocks.{k}.0.op.weight" in names]
    if not depths:
        return _unet(levels, 2, attending)
    resnets = depths[0] - 1
    last = [(resnets + 1) * block + resnets for block in range(4)]
    return _unet(levels, resnets, tuple(i for i, at in enumerate(last) if f"output_blocks.{at}.1.norm.weight" in names))


@cache
def _unet(levels: int, resnets: int, attending: tuple[int, ...]) -> Mapping[str, OriginalLayer]:
    names = dict(_UNET_ENDS)

    def add_resnet(module: str, original: str) -> None:
        names.update({f"{module}.{part}": f"{original}.{name}" for part, name in _RESNET.items()})

    def add_attention(module: str, original: str) -> None:
        blocks = [f"transformer_blocks.{i}.{part}" for i in range(_DEPTH) for part in _TRANSFORMER]
        names.update({f"{module}.{part}": f"{original}.{part}" for part in ("norm", "proj_in", *blocks, "proj_out")})

    for level in range(levels):
        for layer in range(resnets):
            at = (resnets + 1) * level + layer + 1
            add_resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{at}.0")
            add_attention(f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{at}.1")
        for layer in range(resnets + 1):
            at = (resnets + 1) * level + layer
            add_resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{at}.0")
            add_attention(f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{at}.1")
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(resnets + 1) * (level + 1)}.0.op"
        end = f"output_blocks.{(resnets + 1) * level + resnets}"
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"{end}.{2 if level in attending else 1}.conv"
    add_resnet("mid_block.resnets.0", "middle_block.0")
    add_attention("mid_block.attentions.0", "middle_block.1")
    add_resnet("mid_block.resnets.1", "middle_block.2")
    return {module: OriginalLayer(original) for module, original in names.items()}


_IN_CLIP = re.compile(r"(?:transformer\.)?(?:text_model\.)?(encoder\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.weight")
_IN_OPEN_CLIP = re.compile(
    r"model\.(transformer\.resblocks\.(\d+)\.(attn\.in_proj_|attn\.out_proj\.|mlp\.c_fc\.|mlp\.c_proj\.))weight"
)
_OPEN_CLIP = {"attn.out_proj.": "self_attn.out_proj", "mlp.c_fc.": "mlp.fc1", "mlp.c_proj.": "mlp.fc2"}


def clip_layers(component: str, name: str) -> list[tuple[str, OriginalLayer]]:
    """Return the layers of a CLIP text encoder that stand in a tensor, by module path, and their places.

    Args:
        component: Name of the text encoder in diffusers, with which the paths begin.
        name: Of the tensor within the encoder: OpenAI's, as transformers has it too, or OpenCLIP's (mlfoundations/open_clip),
            which joins queries, keys and values.
    """
    if match := _IN_CLIP.fullmatch(name):
        return [(f"{component}.text_model.{match[1]}", OriginalLayer(match[1]))]
    if match := _IN_OPEN_CLIP.fullmatch(name):
        layer = f"{component}.text_model.encoder.layers.{match[2]}"
        if match[3] in _OPEN_CLIP:
            return [(f"{layer}.{_OPEN_CLIP[match[3]]}", OriginalLayer(match[1]))]
        return [(f"{layer}.self_attn.{part}_proj", OriginalLayer(match[1], i, 1, 3)) for i, part in enumerate("qkv")]
    return []
