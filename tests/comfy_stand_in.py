"""A small stand-in for the interfaces of ComfyUI that the nodes use.

Its tables of names come from esd-lora's own; `test_comfyui_itself.py` does the same with ComfyUI's where a checkout is given.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from comfy_cases import NODES
from comfy_child import load_nodes
from esd_lora.families import family_named

KINDS = {"sd": "BaseModel", "sdxl": "SDXL", "sd3": "SD3", "flux": "Flux"}
"""Family to the name of ComfyUI's class."""
SAMPLING = {
    "epsilon": ("EPS",),
    "v_prediction": ("V_PREDICTION", "EPS"),
    "flow": ("CONST",),
    "edm": ("EDM", "V_PREDICTION", "EPS"),
}
"""What a model predicts to the names of ComfyUI's classes, the most derived first."""


def swap(weight: Tensor) -> Tensor:
    """Return the halves of a weight the other way round, which ComfyUI does as the third part of a place."""
    return torch.cat(weight.chunk(2)[::-1])


def build_model(family: str, weights: Mapping[str, Tensor], predicts: str) -> Any:
    """Return what ComfyUI's model is to the nodes.

    Args:
        family: Name in esd-lora.
        weights: Under the original project's names, without prefix.
        predicts: A key of `SAMPLING`.
    """
    kind: type = object
    for name in reversed(SAMPLING[predicts]):
        kind = type(name, (kind,), {})
    config = SimpleNamespace(unet_config={"family": family, "shapes": {name: tuple(w.shape) for name, w in weights.items()}})
    state = {f"diffusion_model.{name}": tensor for name, tensor in weights.items()}
    fields = {"model_config": config, "model_sampling": kind(), "state_dict": lambda _self: dict(state)}
    return type(KINDS[family], (), fields)()


class ModelPatcher:
    """A model and the patches that ComfyUI would add when it loads the weights."""

    def __init__(self, model: Any):
        self.model = model
        self.patches: list[tuple[Any, Any, float]] = []
        self.backup: dict[str, Any] = {}

    def clone(self) -> ModelPatcher:
        copy = type(self)(self.model)
        copy.patches = list(self.patches)
        return copy

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0) -> list[Any]:
        known = [key for key in patches if (key if isinstance(key, str) else key[0]) in self.model.state_dict()]
        self.patches += [(key, patches[key], strength_patch) for key in known]
        return known

    def patched_weights(self) -> dict[str, Tensor]:
        """Return the weights with all patches added, in float32."""
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for key, (up, down), strength in self.patches:
            name, rows, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
            part = weights[name] if rows is None else weights[name].narrow(*rows)
            delta = (up @ down).reshape(part.shape) * strength
            part += function(delta) if function else delta
        return weights


class Clip:
    """Text encoders: those of a diffusers pipeline, without the weights in brackets that ComfyUI reads in a prompt."""

    def __init__(self, pipe: Any = None, cond_stage_model: Any = None, skip: int | None = None):
        self.pipe, self.skip = pipe, skip
        self.cond_stage_model = cond_stage_model
        self.patcher = ModelPatcher(cond_stage_model)

    def clone(self) -> Clip:
        copy = Clip(self.pipe, self.cond_stage_model, self.skip)
        copy.patcher = self.patcher.clone()
        return copy

    def clip_layer(self, layer: int | None) -> None:
        self.skip = layer

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0) -> list[Any]:
        return self.patcher.add_patches(patches, strength_patch)

    def tokenize(self, text: str) -> str:
        assert "(" not in text.replace("\\(", ""), "round brackets are weights"
        return text.replace("\\(", "(").replace("\\)", ")")

    def encode_from_tokens(self, tokens: str) -> Tensor:
        assert self.skip is None, "the layer that the model was made with"
        with torch.no_grad():
            return self.pipe.encode_prompt([tokens], "cpu", 1, False)[0]


def _diffusers_places(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return weights of diffusers' model to ComfyUI's places."""
    shapes, places = config["shapes"], dict[str, Any]()
    for module, place in family_named(config["family"]).original_layers(shapes).items():
        weight = f"{place.name}.weight"
        if weight in shapes:
            outputs, inputs, *_ = (*shapes[weight], 1)
            target: Any = f"{prefix}{weight}"
            if place.total:
                rows = place.rows(inputs)
                target = (target, (0, rows.start, rows.stop - rows.start))
            elif place.swaps and outputs == 2 * inputs:
                target = (target, None, swap)
            places[f"{module}.weight"] = target
    return places


def _lora_keys_unet(model: Any, key_map: dict[str, Any]) -> dict[str, Any]:
    for name in model.state_dict():
        if name.endswith(".weight"):
            bare = name.removeprefix("diffusion_model.").removesuffix(".weight")
            key_map[f"lora_unet_{bare.replace('.', '_')}"] = name
    key_map["lora_unet_down_blocks_3_downsamplers_0_conv"] = "diffusion_model.input_blocks.12.0.op.weight"  # which no model has
    for name, target in _diffusers_places(model.model_config.unet_config, "diffusion_model.").items():
        module = name.removesuffix(".weight")
        if model.model_config.unet_config["family"] in ("sd3", "flux"):
            key_map[f"transformer.{module}"] = target
        else:
            key_map[f"lora_unet_{module.replace('.', '_')}"] = target
    return key_map


def _lora_keys_clip(model: Any, key_map: dict[str, Any]) -> dict[str, Any]:
    names = (name for name in model.state_dict() if name.endswith(".weight"))
    return key_map | {f"lora_te_{name.removesuffix('.weight').replace('.', '_')}": name for name in names}


def _load_lora(lora: Mapping[str, Tensor], to_load: Mapping[str, Any]) -> dict[Any, Any]:
    return {target: (lora[f"{x}.lora_up.weight"], lora[f"{x}.lora_down.weight"]) for x, target in to_load.items()}


@contextmanager
def loaded_nodes(loras: Path) -> Generator[ModuleType]:
    """Load the nodes beside the stand-in, for the length of a `with` block.

    Args:
        loras: What models/loras is.
    """
    with pytest.MonkeyPatch.context() as patch:
        _install(patch, loras)
        yield load_nodes(NODES)
    for name in [name for name in sys.modules if name.startswith("esd_lora_comfyui")]:
        del sys.modules[name]


def _install(patch: pytest.MonkeyPatch, loras: Path) -> None:
    """Put the stand-in where `import comfy.lora` and `import folder_paths` find it."""

    def path_of(_folder: str, name: str) -> str | None:
        return str(loras / name) if (loras / name).is_file() else None

    def names(_folder: str) -> list[str]:
        return sorted(path.relative_to(loras).as_posix() for path in loras.rglob("*.safetensors"))

    modules: dict[str, dict[str, Any]] = {
        "folder_paths": {"get_filename_list": names, "get_full_path": path_of},
        "comfy": {},
        "comfy.lora": {
            "model_lora_keys_unet": _lora_keys_unet,
            "model_lora_keys_clip": _lora_keys_clip,
            "load_lora": _load_lora,
        },
        "comfy.utils": {
            "unet_to_diffusers": lambda config: _diffusers_places(config) if config["family"] in ("sd", "sdxl") else {},
            "mmdit_to_diffusers": lambda config, output_prefix: _diffusers_places(config, output_prefix),
            "flux_to_diffusers": lambda config, output_prefix: _diffusers_places(config, output_prefix),
        },
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        patch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules["comfy"], name.partition(".")[2], module)
