"""Writes diffusers pipelines as single-file checkpoints, under the names of the original latent-diffusion code.

The map is written a second time here, from the names in CompVis/stable-diffusion, Stability-AI/generative-models and
mlfoundations/open_clip, so that reading such a file is not tested against the converter that reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def unet(model: Any) -> dict[str, Tensor]:
    """Return the U-Net's weights as `model.diffusion_model.*`."""
    each = model.config.layers_per_block
    attends = ["CrossAttn" in kind for kind in model.config.up_block_types]

    def place(name: str) -> str:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
            side, block, part, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            if side == "down" and part == "downsamplers":
                return f"input_blocks.{(each + 1) * (block + 1)}.0.op{rest.removeprefix('conv')}"
            if part == "upsamplers":
                return f"output_blocks.{(each + 1) * block + each}.{2 if attends[block] else 1}.{rest}"
            at = (each + 1) * block + layer + (side == "down")
            name = f"{'input' if side == 'down' else 'output'}_blocks.{at}.{int(part == 'attentions')}.{rest}"
        name = _renamed(name, _UNET)
        head = re.match(r"((?:input|output)_blocks\.\d+\.0|middle_block\.[02])\.(.*)", name)
        return f"{head[1]}.{_renamed(head[2], _RESNET)}" if head else name

    return {f"model.diffusion_model.{place(name)}": tensor for name, tensor in model.state_dict().items()}


def sd3(model: Any) -> dict[str, Tensor]:
    """Return a Stable Diffusion 3 transformer's weights as in Stability-AI/sd3-ref: queries, keys and values joined."""
    state, last = dict(model.state_dict()), model.config.num_layers - 1

    def joined(names: list[str], kind: str) -> Tensor:
        return torch.cat([state.pop(f"{name}.{kind}") for name in names])

    def swapped(name: str) -> Tensor:  # scale and shift stand the other way round
        return torch.cat(state.pop(name).chunk(2)[::-1])

    out = {"pos_embed": state.pop("pos_embed.pos_embed")}
    for kind in ("weight", "bias"):
        for i in range(last + 1):
            module, original = f"transformer_blocks.{i}", f"joint_blocks.{i}"
            streams = {
                "x_block.attn": ["to_q", "to_k", "to_v"],
                "context_block.attn": ["add_q_proj", "add_k_proj", "add_v_proj"],
            }
            for stream, names in streams.items():
                out[f"{original}.{stream}.qkv.{kind}"] = joined([f"{module}.attn.{name}" for name in names], kind)
            if i in model.config.dual_attention_layers:
                out[f"{original}.x_block.attn2.qkv.{kind}"] = joined([f"{module}.attn2.to_{which}" for which in "qkv"], kind)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(f"norm_out.linear.{kind}")
        end = f"transformer_blocks.{last}.norm1_context.linear.{kind}"
        out[f"joint_blocks.{last}.context_block.adaLN_modulation.1.{kind}"] = swapped(end)
    table = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
    }
    inside = {
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    for name, tensor in state.items():
        match = re.match(r"transformer_blocks\.(\d+)\.(.*)", name)
        place = f"joint_blocks.{match[1]}.{_renamed(match[2], inside)}" if match else _renamed(name, table)
        out[place] = tensor
    return {f"model.diffusion_model.{name}": tensor for name, tensor in out.items()}


def flux(model: Any) -> dict[str, Tensor]:
    """Return a Flux transformer's weights as in black-forest-labs/flux: parts of one weight there joined."""
    state = dict(model.state_dict())
    out: dict[str, Tensor] = {}

    def join(names: list[str], place: str) -> None:
        for kind in ("weight", "bias"):
            out[f"{place}.{kind}"] = torch.cat([state.pop(f"{name}.{kind}") for name in names])

    for i in range(model.config.num_layers):
        at = f"transformer_blocks.{i}.attn"
        join([f"{at}.to_{which}" for which in "qkv"], f"double_blocks.{i}.img_attn.qkv")
        join([f"{at}.add_{which}_proj" for which in "qkv"], f"double_blocks.{i}.txt_attn.qkv")
    for i in range(model.config.num_single_layers):
        at = f"single_transformer_blocks.{i}"
        join([*(f"{at}.attn.to_{which}" for which in "qkv"), f"{at}.proj_mlp"], f"single_blocks.{i}.linear1")
    for kind in ("weight", "bias"):  # scale and shift stand the other way round
        swapped = torch.cat(state.pop(f"norm_out.linear.{kind}").chunk(2)[::-1])
        out[f"final_layer.adaLN_modulation.1.{kind}"] = swapped
    embedders = {"timestep_embedder": "time_in", "text_embedder": "vector_in", "guidance_embedder": "guidance_in"}
    table = {"context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear"}
    for module, original in embedders.items():
        table |= {
            f"time_text_embed.{module}.linear_1": f"{original}.in_layer",
            f"time_text_embed.{module}.linear_2": f"{original}.out_layer",
        }
    double = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
        "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }
    single = {
        "norm.linear": "modulation.lin",
        "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale",
        "proj_out": "linear2",
    }
    for name, tensor in state.items():
        match = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.*)", name)
        if match:
            kind, inside = ("single", single) if match[1] else ("double", double)
            out[f"{kind}_blocks.{match[2]}.{_renamed(match[3], inside)}"] = tensor
        else:
            out[_renamed(name, table)] = tensor
    return out


_PIXART = {
    "pos_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "scale_shift_table": "final_layer.scale_shift_table",
    "proj_out": "final_layer.linear",
}
_PIXART_BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def pixart(model: Any) -> dict[str, Tensor]:
    """Return a PixArt-Sigma transformer's weights as in PixArt-alpha/PixArt-sigma: queries, keys and values joined."""
    state, out = dict(model.state_dict()), dict[str, Tensor]()
    for i in range(model.config.num_layers):
        block, original = f"transformer_blocks.{i}", f"blocks.{i}"
        for place, names in {"attn.qkv": "attn1 qkv", "cross_attn.kv_linear": "attn2 kv"}.items():
            attention, which = names.split()
            for kind in ("weight", "bias"):
                parts = [state.pop(f"{block}.{attention}.to_{each}.{kind}") for each in which]
                out[f"{original}.{place}.{kind}"] = torch.cat(parts)
    for name, tensor in state.items():
        match = re.match(r"transformer_blocks\.(\d+)\.(.*)", name)
        out[f"blocks.{match[1]}.{_renamed(match[2], _PIXART_BLOCK)}" if match else _renamed(name, _PIXART)] = tensor
    return out


_LUMINA_2 = {
    "time_caption_embed.caption_embedder": "cap_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_LUMINA_2_BLOCK = {
    "attn.to_out.0": "attention.out",
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
    "norm1.norm": "attention_norm1",
    "norm1": "attention_norm1",
    "norm2": "attention_norm2",
}


def lumina2(model: Any) -> dict[str, Tensor]:
    """Return a Lumina 2 transformer's weights as in Alpha-VLLM/Lumina-Image-2.0, with the prefix of ComfyUI's files."""
    out: dict[str, Tensor] = {}
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith(".attn.to_q.weight")]:
        block = name.removesuffix(".attn.to_q.weight")
        out[f"{block}.attention.qkv.weight"] = torch.cat([state.pop(f"{block}.attn.to_{which}.weight") for which in "qkv"])
    for name, tensor in state.items():
        match = re.match(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.*)", name)
        out[f"{match[1]}.{_renamed(match[2], _LUMINA_2_BLOCK)}" if match else _renamed(name, _LUMINA_2)] = tensor
    return {f"model.diffusion_model.{name}": tensor for name, tensor in out.items()}


def qwen_image(model: Any) -> dict[str, Tensor]:
    """Return a Qwen-Image transformer's weights as in Comfy-Org/Qwen-Image_ComfyUI, whose names are diffusers' own."""
    return dict(model.state_dict())


def flux2(model: Any) -> dict[str, Tensor]:
    """Return a Flux.2 transformer's weights as in black-forest-labs/flux2: queries, keys and values joined."""
    state = dict(model.state_dict())
    out: dict[str, Tensor] = {}
    for i in range(model.config.num_layers):
        for stream, names in {"img": ["to_q", "to_k", "to_v"], "txt": ["add_q_proj", "add_k_proj", "add_v_proj"]}.items():
            parts = [state.pop(f"transformer_blocks.{i}.attn.{name}.weight") for name in names]
            out[f"double_blocks.{i}.{stream}_attn.qkv.weight"] = torch.cat(parts)
    scale, shift = state.pop("norm_out.linear.weight").chunk(2)
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    table = {"context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear"}
    for name, original in {"timestep": "time_in", "guidance": "guidance_in"}.items():
        table |= {
            f"time_guidance_embed.{name}_embedder.linear_1": f"{original}.in_layer",
            f"time_guidance_embed.{name}_embedder.linear_2": f"{original}.out_layer",
        }
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        table[f"{name}.linear"] = f"{name}.lin"
    double = {
        "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
        "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    }
    single = {
        "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale",
        "attn.to_qkv_mlp_proj": "linear1",
        "attn.to_out": "linear2",
    }
    for name, tensor in state.items():
        match = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.*)", name)
        if match:
            kind, inside = ("single", single) if match[1] else ("double", double)
            out[f"{kind}_blocks.{match[2]}.{_renamed(match[3], inside)}"] = tensor
        else:
            out[_renamed(name, table)] = tensor
    return out


def z_image(model: Any) -> dict[str, Tensor]:
    """Return a Z-Image transformer's weights as in ComfyUI's files: queries, keys and values joined."""
    state = dict(model.state_dict())
    out: dict[str, Tensor] = {}
    for name in [name for name in state if name.endswith(".attention.to_q.weight")]:
        block = name.removesuffix("to_q.weight")
        out[f"{block}qkv.weight"] = torch.cat([state.pop(f"{block}to_{which}.weight") for which in "qkv"])
    inside = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
    for name, tensor in state.items():
        place = _renamed(name, {"all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1": "final_layer"})
        if match := re.match(r"(.*\.attention\.)(.*)", place):
            place = match[1] + _renamed(match[2], inside)
        out[place] = tensor
    return out


def wan(model: Any) -> dict[str, Tensor]:
    """Return a Wan transformer's weights as in Wan-Video/Wan2.1, whose second norm is diffusers' third."""
    table = {
        "scale_shift_table": "head.modulation",
        "proj_out": "head.head",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    }
    inside = {"scale_shift_table": "modulation", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3"}
    heads = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if match := re.match(r"blocks\.(\d+)\.attn(\d)\.(.*)", name):
            place = f"blocks.{match[1]}.{'self' if match[2] == '1' else 'cross'}_attn.{_renamed(match[3], heads)}"
        elif match := re.match(r"blocks\.(\d+)\.(.*)", name):
            place = f"blocks.{match[1]}.{_renamed(match[2], inside)}"
        else:
            place = _renamed(name, table)
        out[place] = tensor
    return out


def vae(model: Any) -> dict[str, Tensor]:
    """Return the VAE's weights as `first_stage_model.*`; its attention is made of convolutions there."""
    last = len(model.config.block_out_channels) - 1
    heads = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    out = {}
    for name, tensor in model.state_dict().items():
        value, place = tensor, name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        place = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", place)
        place = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", place)
        place = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", place)
        place = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", place)
        place = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", place)
        if match := re.match(r"(.*)mid_block\.attentions\.0\.(.*)", place):
            place = f"{match[1]}mid.attn_1.{_renamed(match[2], heads)}"
            value = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        out[f"first_stage_model.{place}"] = value.contiguous()
    return out


def clip(model: Any, prefix: str) -> dict[str, Tensor]:
    """Return a text encoder's weights under the names of OpenAI's CLIP in transformers."""
    return {f"{prefix}text_model.{n.removeprefix('text_model.')}": t for n, t in model.state_dict().items()}


def open_clip(model: Any, prefix: str, spare_layers: int = 0) -> dict[str, Tensor]:
    """Return a text encoder's weights under the names of OpenCLIP: queries, keys and values of a layer are one tensor.

    Args:
        model: The text encoder.
        prefix: Prefix of every name.
        spare_layers: Layers beyond those of the model, as SD 2.x checkpoints have one that is not read.
    """
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    out = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
    }
    if "text_projection.weight" in state:
        out["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    layers = model.config.num_hidden_layers
    for layer in range(layers):
        at = f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{at}self_attn.{which}_proj.{kind}") for which in "qkv"]
            out[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    for name, tensor in state.items():
        match = re.match(r"encoder\.layers\.(\d+)\.(.*)", name)
        assert match, name
        out[f"transformer.resblocks.{match[1]}.{_renamed(match[2], _OPEN_CLIP)}"] = tensor
    for extra in range(layers, layers + spare_layers):
        out |= {k.replace("resblocks.0.", f"resblocks.{extra}."): t.clone() for k, t in out.items() if "resblocks.0." in k}
    return {prefix + name: tensor for name, tensor in out.items()}


def checkpoint(pipe: Any) -> dict[str, Tensor]:
    """Return all weights of an SD 1.x, SD 2.x or SDXL pipeline under their names in a single file."""
    state = {**unet(pipe.unet), **vae(pipe.vae)}
    if hasattr(pipe, "text_encoder_2"):
        state |= clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        return state | open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    if pipe.unet.config.use_linear_projection:
        return state | open_clip(pipe.text_encoder, "cond_stage_model.model.", spare_layers=1)
    return state | clip(pipe.text_encoder, "cond_stage_model.transformer.")


def save_checkpoint(pipe: Any, file: Path, metadata: dict[str, str] | None = None, **extra: Tensor) -> Path:
    """Write a pipeline as one `.safetensors` file, with marker tensors beside its weights if any are given."""
    state = {name: tensor.detach().contiguous().clone() for name, tensor in checkpoint(pipe).items()}
    save_file({**state, **extra}, file, metadata)
    return file
