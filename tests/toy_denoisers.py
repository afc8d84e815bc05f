"""Small denoisers with the block structure of the published models, which kohya's names are made for; and what clients do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import original_checkpoints
from esd_lora.erasers.eraser import Eraser
from esd_lora.families import family_named
from random_erasers import eraser_on
from tiny import tiny_unet
from toys import WIDTH, make_toy


def sd_unet() -> nn.Module:
    """Return a U-Net of four levels, two resnets each, as in SD 1.x."""
    return tiny_unet(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def sdxl_unet() -> nn.Module:
    """Return a U-Net of three levels with attention in the last two, transformers of growing depth, as in SDXL."""
    return tiny_unet(
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[2, 2, 4],
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2, 3],
        cross_attention_dim=3 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 2 * WIDTH,
    )


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]], dict[str, str]]] = {
    "sd": (sd_unet, original_checkpoints.unet, {"family": "sd", "prefix": "unet", "prediction_type": "epsilon"}),
    "sdxl": (sdxl_unet, original_checkpoints.unet, {"family": "sdxl", "prefix": "unet", "prediction_type": "epsilon"}),
    "sd3": (
        lambda: make_toy("sd35").transformer,
        original_checkpoints.sd3,
        {"family": "sd3", "prefix": "transformer", "prediction_type": "flow"},
    ),
    "flux": (
        lambda: make_toy("flux-dev").transformer,
        original_checkpoints.flux,
        {"family": "flux", "prefix": "transformer", "prediction_type": "flow"},
    ),
    "pixart": (
        lambda: make_toy("pixart").transformer,
        original_checkpoints.pixart,
        {"family": "pixart", "prefix": "transformer", "prediction_type": "epsilon"},
    ),
    "lumina2": (
        lambda: make_toy("lumina2").transformer,
        original_checkpoints.lumina2,
        {"family": "lumina2", "prefix": "transformer", "prediction_type": "flow"},
    ),
    "qwen-image": (
        lambda: make_toy("qwen-image").transformer,
        original_checkpoints.qwen_image,
        {"family": "qwen-image", "prefix": "transformer", "prediction_type": "flow"},
    ),
    "flux2": (
        lambda: make_toy("flux2-dev").transformer,
        original_checkpoints.flux2,
        {"family": "flux2", "prefix": "transformer", "prediction_type": "flow"},
    ),
    "z-image": (
        lambda: make_toy("z-image").transformer,
        original_checkpoints.z_image,
        {"family": "z-image", "prefix": "transformer", "prediction_type": "flow"},
    ),
    "wan": (
        lambda: make_toy("wan").transformer,
        original_checkpoints.wan,
        {"family": "wan", "prefix": "transformer", "prediction_type": "flow"},
    ),
}
"""Family to (denoiser, its weights under the original names, what an eraser's header says)."""


def layers_of(family: str, model: nn.Module, scope: str = "full") -> list[str]:
    """Return the module paths of a scope."""
    return list(family_named(family).modules(model, scope))


def eraser_on_all_layers(family: str, model: nn.Module, **options: Any) -> Eraser:
    """Return an eraser of every layer that any scope touches: mixed ranks, convolutions."""
    return eraser_on(model, layers_of(family, model), **MODELS[family][2], **options)


def original_deltas(family: str, model: Any, eraser: Eraser) -> dict[str, Tensor]:
    """Return what an eraser does to a model's weights, under the original names: one copy has the updates added by hand."""
    original = MODELS[family][1]
    before = {name: tensor.clone() for name, tensor in original(model).items()}
    layers = dict(model.named_modules())
    with torch.no_grad():
        for module, pair in eraser.pairs.items():
            layers[module].weight += pair.delta()
        after = {name: tensor.clone() for name, tensor in original(model).items()}
        for module, pair in eraser.pairs.items():
            layers[module].weight -= pair.delta()
    return {name: after[name] - before[name] for name in after}


def client_deltas(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return what kohya's networks.lora, A1111 and ComfyUI add: `alpha / rank * up @ down` on the layer that a name stands for.

    Args:
        tensors: Tensors of a file with kohya's names.
        names: The client's table, name in the file to weight of the model.

    Raises:
        KeyError: If the client would not know a name.
    """
    out: dict[str, Tensor] = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            up, alpha = tensors[f"{name}.lora_up.weight"], tensors.get(f"{name}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
            out[names[name]] = scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return out


def client_names(family: str, model: Any) -> dict[str, str]:
    """Return the table of ComfyUI (comfy/lora.py: model_lora_keys_unet), which A1111's and kohya's agree with on these names.

    Every weight of the original model answers to `lora_unet_` and its name with underscores; a U-Net's also to diffusers'
    name of the layer.
    """
    state = MODELS[family][1](model)
    weights = [name for name in state if name.endswith(".weight")]
    table = {"lora_unet_" + n.removeprefix("model.diffusion_model.")[:-7].replace(".", "_"): n for n in weights}
    if family in ("sd", "sdxl"):
        places = {tensor.data_ptr(): name for name, tensor in state.items()}
        for name, tensor in model.state_dict().items():
            if name.endswith(".weight"):
                table["lora_unet_" + name[:-7].replace(".", "_")] = places[tensor.data_ptr()]
    return table
