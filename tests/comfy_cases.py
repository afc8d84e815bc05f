"""What the tests of the ComfyUI nodes share: chains of nodes with the weights that a merge gives, and the example."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import original_checkpoints
from esd_lora.erasers.eraser import Eraser, hash_weight
from esd_lora.erasers.stacking import Strength
from esd_lora.families import family_named
from esd_lora.formats.exporting import export
from esd_lora.weights.merging import merge
from random_erasers import eraser_on
from tiny import tiny_pipeline, tiny_unet
from toys import WIDTH, make_toy

NODES = Path(__file__).parents[1] / "integrations" / "comfyui"
EXAMPLES, EXAMPLE = NODES / "example_workflows", "erase_before_and_after"
EXACT = 1e-6
"""How far a weight may be from a merge's; values are about 1."""
CORE: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": "COMBO"}, ("MODEL", "CLIP", "VAE")),
    "PrimitiveStringMultiline": ({"value": "STRING"}, ("STRING",)),
    "CLIPTextEncode": ({"text": "STRING", "clip": "CLIP"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ("LATENT",)),
    "KSampler": (
        {
            **{"model": "MODEL", "seed": "INT", "steps": "INT", "cfg": "FLOAT", "sampler_name": "COMBO", "scheduler": "COMBO"},
            **{"positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT", "denoise": "FLOAT"},
        },
        ("LATENT",),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "PreviewImage": ({"images": "IMAGE"}, ()),
    "PreviewAny": ({"source": "*"}, ()),
}
"""ComfyUI's own nodes in the example, with their inputs and outputs; test_comfyui_itself.py compares them with a server's."""
PUBLISHED = {
    "sd15": (278, 278, 150),
    "sd21": (278, 278, 150),
    "sdxl": (788, 788, 228),
    "sd3": (239, 335, 335),
    "sd35-medium": (265, 387, 387),
    "flux": (306, 496, 496),
    "pixart-sigma": (198, 282, 282),
    "lumina2": (179, 239, 0),
    "qwen-image": (841, 841, 841),
    "z-image": (203, 271, 271),
    "flux2-dev": (161, 193, 0),
    "flux2-klein-4b": (81, 101, 0),
    "flux2-klein-9b": (113, 145, 0),
}
"""Model to the layers of an eraser of scope `full` in a file under kohya's names, in its own file, and how many of the latter
ComfyUI's own Load LoRA has places for, and the nodes for all of them, or none where ComfyUI has none. The table of
docs/comfyui.md."""
WITHOUT_NODES = {"wan-1.3b": (302, 302, 0), "wan-5b": (302, 302, 0)}
"""The same of models of families that the nodes do not know."""
LAYERS = {
    "sd": {"family": "sd", "prefix": "unet", "prediction_type": "epsilon"},
    "sdxl": {"family": "sdxl", "prefix": "unet", "prediction_type": "epsilon"},
    "sd3": {"family": "sd3", "prefix": "transformer", "prediction_type": "flow"},
    "flux": {"family": "flux", "prefix": "transformer", "prediction_type": "flow"},
    "pixart": {"family": "pixart", "prefix": "transformer", "prediction_type": "epsilon"},
    "lumina2": {"family": "lumina2", "prefix": "transformer", "prediction_type": "flow"},
    "qwen-image": {"family": "qwen-image", "prefix": "transformer", "prediction_type": "flow"},
    "flux2": {"family": "flux2", "prefix": "transformer", "prediction_type": "flow"},
    "z-image": {"family": "z-image", "prefix": "transformer", "prediction_type": "flow"},
}
"""Family to what an eraser's header says."""
FAMILIES = ("sd", "sdxl", "sd3", "flux")
"""Families whose places in ComfyUI differ from ours, so that chains of nodes are compared with merges weight by weight."""
PREFIX = {"sd": "model.diffusion_model.", "sdxl": "model.diffusion_model.", "sd3": "model.diffusion_model.", "flux": ""}
"""Family to what stands in front of the denoiser's names in a checkpoint."""
BLOCKS: dict[str, dict[str, float]] = {
    "sd": {"mid": 0.5, "up.1": 0, "up.1.attentions.2": -1},
    "sdxl": {"mid_block": 0.5, "up.0": 0, "down": 2},
    "sd3": {"transformer_blocks.0": 0.5, "transformer_blocks.1.attn.to_q": 0, "transformer_blocks.1.attn.add_v_proj": -1},
    "flux": {"transformer_blocks": 0.5, "single_transformer_blocks.0.proj_mlp": 0, "single_transformer_blocks.0.attn.to_k": -1},
}
"""Strengths by block, some of layers that share a weight with others."""


def _denoiser(family: str) -> nn.Module:
    """Return a small denoiser of the published structure, as wide as ComfyUI's groups of 32 and heads of 64 ask for."""
    if family == "sd":
        return tiny_unet(
            block_out_channels=(32, 32, 64, 64),
            norm_num_groups=32,
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
    if family == "sdxl":
        return tiny_unet(
            block_out_channels=(64, 64, 128),
            norm_num_groups=32,
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=[1, 1, 2],
            use_linear_projection=True,
            transformer_layers_per_block=[1, 1, 2],
            cross_attention_dim=3 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 2 * WIDTH,
        )
    if family == "sd3":
        return SD3Transformer2DModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=128,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _checkpoint(family: str, model: nn.Module) -> dict[str, Tensor]:
    """Return a whole checkpoint of the family with this denoiser in it."""
    if family in ("sd3", "flux"):
        return (original_checkpoints.sd3 if family == "sd3" else original_checkpoints.flux)(model)
    rest = original_checkpoints.checkpoint(tiny_pipeline() if family == "sd" else make_toy("sdxl"))
    rest = {name: tensor for name, tensor in rest.items() if not name.startswith("model.diffusion_model.")}
    return {**original_checkpoints.unet(model), **rest}


class Case(NamedTuple):
    """A checkpoint in a folder, erasers in `loras`, and what chains of nodes should leave of the weights."""

    family: str
    folder: Path
    chains: list[list[dict[str, Any]]]
    expected: list[dict[str, Tensor]]
    """Chain to the denoiser's weights under the checkpoint's names."""

    @property
    def prefix(self) -> str:
        return PREFIX[self.family]

    def base(self) -> dict[str, Tensor]:
        """Return the denoiser's weights as they were."""
        state = load_file(self.folder / "base.safetensors")
        return {name: tensor for name, tensor in state.items() if name.startswith(self.prefix)}


def loaded(eraser: str, strength: float = 1, blocks: str = "") -> dict[str, Any]:
    """Return a call of Load eraser."""
    return {"node": "EsdLoadEraser", "inputs": {"eraser": eraser, "strength": strength, "blocks": blocks}}


def stacked(*members: tuple[str, float, str]) -> dict[str, Any]:
    """Return a call of Stack erasers."""
    inputs: dict[str, Any] = {}
    for slot, (eraser, weight, blocks) in enumerate(members, 1):
        inputs |= {f"eraser_{slot}": eraser, f"weight_{slot}": weight, f"blocks_{slot}": blocks}
    return {"node": "EsdStackErasers", "inputs": inputs}


def write_case(family: str, folder: Path) -> Case:
    """Write a checkpoint and two erasers of all its layers, and merge them in every way that a chain of nodes asks for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _denoiser(family)
    layers = family_named(family).modules(model, "full")
    header = {**LAYERS[family], "base_hashes": {path: hash_weight(layer.weight) for path, layer in layers.items()}}
    first, second = (
        _scaled(eraser_on(model, layers, name, seed=seed, **header)) for seed, name in enumerate(("a cat", "a car"))
    )
    base = folder / "base.safetensors"
    save_file({n: t.detach().contiguous().clone() for n, t in _checkpoint(family, model).items()}, base)
    own, kohya = "cat/pytorch_lora_weights.safetensors", "car.safetensors"
    first.save(folder / "loras" / "cat")
    export(second, folder / "loras" / kohya, layout="kohya")
    export(first, folder / "loras" / "cat-kohya.safetensors", layout="kohya")
    blocks, text = BLOCKS[family], ",".join(f"{block}={factor:g}" for block, factor in BLOCKS[family].items())
    merges: list[tuple[list[dict[str, Any]], Mapping[int, float | Strength]]] = [
        ([loaded(own)], {0: 1}),
        ([loaded(kohya)], {1: 1}),
        ([loaded(own, -0.75, text)], {0: Strength(-0.75, blocks)}),
        ([loaded("cat-kohya.safetensors", -0.75, text)], {0: Strength(-0.75, blocks)}),
        ([stacked((own, 0.5, text), (kohya, -1.5, ""))], {0: Strength(0.5, blocks), 1: -1.5}),
        ([loaded(own, 0.5, text), loaded(kohya, -1.5)], {0: Strength(0.5, blocks), 1: -1.5}),
    ]
    erasers, expected = (first, second), []
    for number, (_, weights) in enumerate(merges):
        out = merge(
            [erasers[i] for i in weights],
            base,
            folder / f"merged_{number}.safetensors",
            weights=list(weights.values()),
            progress=False,
        )
        expected.append({n: t for n, t in load_file(out).items() if n.startswith(PREFIX[family])})
    return Case(family, folder, [chain for chain, _ in merges], expected)


def _scaled(eraser: Eraser) -> Eraser:
    """Return an eraser whose updates are about as large as trained ones."""
    return Eraser({module: pair.scaled(2**-5, module) for module, pair in eraser.pairs.items()}, eraser.header)


def largest_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return how far any value of any weight is from what it should be; values are about 1."""
    return max(float((actual[name] - weight).abs().max()) for name, weight in expected.items())
