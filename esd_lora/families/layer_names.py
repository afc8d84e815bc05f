"""What a denoiser's layers are called outside diffusers: in original checkpoints, and in LoRA files with kohya's names.

The names are facts of other projects: CompVis/stable-diffusion and Stability-AI/generative-models (U-Nets),
Stability-AI/sd3-ref, black-forest-labs/flux, kohya-ss/sd-scripts. The originals of the transformers keep queries, keys and
values in one weight, so a layer of ours may be some rows of a layer there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

KOHYA_PREFIX = "lora_unet_"
"""Of the denoiser's layers in kohya's files, transformers included."""
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
_MLP = 3  # place of a Flux single block's MLP, four times as wide as queries, keys and values before it
_LAYERS = 64  # transformer blocks of the largest MM-DiT in sight, with room


class Place(NamedTuple):
    """Where a layer's weight stands in the original model: rows of one weight there."""

    name: str
    """Path of the original layer, without any prefix."""
    first: int = 0
    """First row, in units of the layer's number of inputs."""
    total: int = 0
    """Rows of the whole original weight in the same unit; 0 where the layer is the whole of it."""
    swaps: bool = False
    """A modulation layer of two outputs has them (shift, scale) there and (scale, shift) in diffusers."""

    def rows(self, inputs: int) -> slice:
        """The layer's rows in the original weight.

        Args:
            inputs: Of the layer, which are those of the original too.
        """
        end = self.total if self.first == _MLP else self.first + 1  # queries, keys and values are square
        return slice(self.first * inputs, end * inputs) if self.total else slice(None)

    def reordered(self, rows: Tensor, inputs: int) -> Tensor:
        """Rows of this layer in the other project's order: the same function leads there and back."""
        return torch.cat(rows.chunk(2)[::-1]) if self.swaps and len(rows) == 2 * inputs else rows


@cache
def original_places(family: str, each: int = 2, attending: tuple[int, ...] | None = None) -> Mapping[str, Place]:
    """Module path in diffusers to its place in the original model, for every layer that a model of the family may have.

    Args:
        family: `sd`, `sdxl`, `sd3` or `flux`; others have no original that single files or kohya's names follow.
        each: Resnets of a U-Net's down block; 2 in every published one.
        attending: Up blocks of a U-Net with attention; those of the published models unless given.
    """
    if family == "sd":
        return _unet(4, each, (1, 2, 3) if attending is None else attending)
    if family == "sdxl":
        return _unet(3, each, (0, 1) if attending is None else attending)
    return {"sd3": _sd3, "flux": _flux}[family]() if family in ("sd3", "flux") else {}


def places_in(family: str, names: Collection[str]) -> Mapping[str, Place]:
    """The places in one checkpoint, whose U-Net need not be of the published depth.

    Args:
        family: As in `original_places`.
        names: Of the checkpoint's tensors, without prefix.
    """
    depths = [k for k in range(1, 8) if f"input_blocks.{k}.0.op.weight" in names]
    if family not in ("sd", "sdxl") or not depths:
        return original_places(family)
    each = depths[0] - 1
    last = [(each + 1) * block + each for block in range(4)]
    return original_places(family, each, tuple(i for i, at in enumerate(last) if f"output_blocks.{at}.1.norm.weight" in names))


@cache
def kohya_names(family: str) -> Mapping[str, str]:
    """Module path to layer name in kohya's files.

    SD 1.x and 2.x keep diffusers' names there, the others have the original's; dots become underscores.
    """
    places = original_places(family)
    return {
        module: KOHYA_PREFIX + (module if family == "sd" else place.name).replace(".", "_") for module, place in places.items()
    }


def _unet(levels: int, each: int, attending: tuple[int, ...]) -> dict[str, Place]:
    names = dict(_UNET_ENDS)

    def resnet(ours: str, theirs: str) -> None:
        names.update({f"{ours}.{part}": f"{theirs}.{name}" for part, name in _RESNET.items()})

    def attention(ours: str, theirs: str) -> None:
        blocks = [f"transformer_blocks.{i}.{part}" for i in range(_DEPTH) for part in _TRANSFORMER]
        names.update({f"{ours}.{part}": f"{theirs}.{part}" for part in ("norm", "proj_in", *blocks, "proj_out")})

    for level in range(levels):
        for layer in range(each):
            at = (each + 1) * level + layer + 1
            resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{at}.0")
            attention(f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{at}.1")
        for layer in range(each + 1):
            at = (each + 1) * level + layer
            resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{at}.0")
            attention(f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{at}.1")
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(each + 1) * (level + 1)}.0.op"
        end = f"output_blocks.{(each + 1) * level + each}"
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"{end}.{2 if level in attending else 1}.conv"
    resnet("mid_block.resnets.0", "middle_block.0")
    attention("mid_block.attentions.0", "middle_block.1")
    resnet("mid_block.resnets.1", "middle_block.2")
    return {ours: Place(theirs) for ours, theirs in names.items()}


def _sd3() -> dict[str, Place]:
    out = {
        "pos_embed.proj": Place("x_embedder.proj"),
        "context_embedder": Place("context_embedder"),
        "time_text_embed.timestep_embedder.linear_1": Place("t_embedder.mlp.0"),
        "time_text_embed.timestep_embedder.linear_2": Place("t_embedder.mlp.2"),
        "time_text_embed.text_embedder.linear_1": Place("y_embedder.mlp.0"),
        "time_text_embed.text_embedder.linear_2": Place("y_embedder.mlp.2"),
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", swaps=True),
        "proj_out": Place("final_layer.linear"),
    }
    inside = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    for i in range(_LAYERS):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        out |= {f"{ours}.{part}": Place(f"{theirs}.{name}") for part, name in inside.items()}
        # Only the last block's has two outputs, and there they are swapped.
        out[f"{ours}.norm1_context.linear"] = Place(f"{theirs}.context_block.adaLN_modulation.1", swaps=True)
        for at, which in enumerate("qkv"):
            out[f"{ours}.attn.to_{which}"] = Place(f"{theirs}.x_block.attn.qkv", at, 3)
            out[f"{ours}.attn2.to_{which}"] = Place(f"{theirs}.x_block.attn2.qkv", at, 3)
            out[f"{ours}.attn.add_{which}_proj"] = Place(f"{theirs}.context_block.attn.qkv", at, 3)
    return out


def _flux() -> dict[str, Place]:
    out = {
        "x_embedder": Place("img_in"),
        "context_embedder": Place("txt_in"),
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", swaps=True),
        "proj_out": Place("final_layer.linear"),
    }
    for ours, theirs in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        out[f"time_text_embed.{ours}_embedder.linear_1"] = Place(f"{theirs}.in_layer")
        out[f"time_text_embed.{ours}_embedder.linear_2"] = Place(f"{theirs}.out_layer")
    double = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }
    for i in range(_LAYERS):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        out |= {f"{ours}.{part}": Place(f"{theirs}.{name}") for part, name in double.items()}
        single, joined = f"single_transformer_blocks.{i}", f"single_blocks.{i}.linear1"
        for at, which in enumerate("qkv"):
            out[f"{ours}.attn.to_{which}"] = Place(f"{theirs}.img_attn.qkv", at, 3)
            out[f"{ours}.attn.add_{which}_proj"] = Place(f"{theirs}.txt_attn.qkv", at, 3)
            out[f"{single}.attn.to_{which}"] = Place(joined, at, 7)
        out[f"{single}.proj_mlp"] = Place(joined, _MLP, 7)
        out[f"{single}.norm.linear"] = Place(f"single_blocks.{i}.modulation.lin")
        out[f"{single}.proj_out"] = Place(f"single_blocks.{i}.linear2")
    return out
