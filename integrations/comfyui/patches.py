# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The esd-lora authors
"""From the layers of a file to patches of ComfyUI's model: where each layer lies, whether it fits, and their exact sum.

ComfyUI's own table of names says where a layer lies, so that whatever it maps is mapped here. Beyond what its Load LoRA does,
layers of an eraser are looked up under diffusers' names too, strengths hold by part of the model, and what does not fit is an
error instead of a line in the log.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import comfy.lora  # pyright: ignore[reportMissingImports]
import comfy.utils  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from .errors import EraserError
from .files import TEXT_ENCODER, Factors, Header, LoraFile
from .strengths import Strength

Target = Any
"""What ComfyUI's `add_patches` takes as a place: the name of a weight, or (name, rows, function) for a part of one."""
Updates = dict[Target, Factors]
"""Place to the update that is added there, strength included."""

_WEIGHTS = "diffusion_model."
_COMPARED = 8  # of the smallest weights, which any training of the model would have changed
_DOTTED = ("base_model.model.", "unet.", "transformer.", "diffusion_model.")
_FAMILIES = {"BaseModel": "sd", "SDXL": "sdxl", "SD3": "sd3", "Flux": "flux", "QwenImage": "qwen-image"}
"""ComfyUI's class of a model to esd-lora's name of the family; other classes are known by their layers alone."""
_TITLES = {
    "sd": "Stable Diffusion 1 or 2",
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux.1",
    "qwen-image": "Qwen-Image",
}
_PREDICTIONS = {"EPS": "epsilon", "V_PREDICTION": "v_prediction", "CONST": "flow", "X0": None, "EDM": None}
"""ComfyUI's class of a parametrization to what the model predicts; `None` where esd-lora has no such models."""


class Part(NamedTuple):
    """A layer of diffusers' model that is a weight of ComfyUI's, or some rows of one: queries, keys and values share theirs."""

    module: str
    """Path in diffusers."""
    rows: tuple[int, int] | None = None
    """First row and number of rows; `None` where it is the whole weight."""
    swaps: bool = False
    """Whether its halves are the other way round in diffusers."""


def updates_of(model: Any, file: LoraFile, strength: Strength) -> tuple[Updates, list[str]]:
    """Return what a file adds to a model's weights at a strength, and the layers in it that fit no weight of the model.

    Args:
        model: ComfyUI's `ModelPatcher` of a denoiser.
        file: Layers of a text encoder in it are left alone.
        strength: Of the file, everywhere and by block.

    Raises:
        EraserError: If an eraser was made for another kind of model or has a layer that the model lacks, no layer of a LoRA
            fits, a shape differs, or the strength names a block in which the file has no layer.
    """
    if file.header:
        _check_kind(model, file.header, file.name)
    layers = {name: factors for name, factors in file.layers.items() if not name.startswith(TEXT_ENCODER)}
    weights = model.model.state_dict()
    # The table also names layers that larger models have, and this one has not.
    table = comfy.lora.model_lora_keys_unet(model.model, {})
    targets = _targets({name: target for name, target in table.items() if _weight(target) in weights}, layers)
    missing = [name for name in layers if name not in targets]
    if layers and (not targets or (missing and file.header)):
        what = f"{len(missing)} of its {len(layers)} layers" if targets else "none of its layers"
        fits = "fit no weight" if targets else "fits a weight"
        raise EraserError(f"{file.name} is for another model: {what} {fits} of this one ({missing[0][:100]}).")
    parts = _parts(model)
    places = {name: _members(target, parts) for name, target in targets.items()}
    strength.check([part.module for members in places.values() for part in members], file.name)
    updates: Updates = {}
    for name, target in targets.items():
        factors = layers[name]
        _check_shape(factors, weights[_weight(target)], target, f"{file.name}: layer {name[:100]}")
        scaled = _scaled(factors, strength, places[name])
        if scaled is not None:
            updates[target] = _side_by_side([updates[target], scaled]) if target in updates else scaled
    return updates, missing


def text_updates_of(clip: Any, file: LoraFile, weight: float) -> tuple[Updates, list[str]]:
    """Return what a file adds to the text encoders, and the layers in it that fit none of their weights.

    Args:
        clip: ComfyUI's `CLIP`, or `None` where there is none: then no layer fits.
        file: Erasers of scope text-encoder have such layers, and styles often do.
        weight: Strength.
    """
    layers = {name: factors for name, factors in file.layers.items() if name.startswith(TEXT_ENCODER)}
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}) if layers and clip is not None else {}
    updates = {names[name]: Factors(f.down, f.up * weight) for name, f in layers.items() if name in names and weight}
    return updates, [name for name in layers if name not in names]


def stack(members: Sequence[Updates]) -> Updates:
    """Return the sum of updates, exactly: where several change one weight, their ranks stand side by side.

    `[up_a, up_b] @ [down_a; down_b] == up_a @ down_a + up_b @ down_b`; nothing is cut.
    """
    places = dict.fromkeys(target for updates in members for target in updates)
    return {target: _side_by_side([each[target] for each in members if target in each]) for target in places}


def patched(patcher: Any, updates: Updates) -> Any:
    """Return a copy of ComfyUI's `ModelPatcher` or `CLIP` with updates added; the one that is given stays as it is."""
    copy = patcher.clone()
    factors: dict[str, Tensor] = {}
    for number, (down, up) in enumerate(updates.values()):
        factors |= {f"{number}.lora_up.weight": up, f"{number}.lora_down.weight": down}
    copy.add_patches(comfy.lora.load_lora(factors, {str(number): target for number, target in enumerate(updates)}), 1.0)
    return copy


def differing(model: Any, header: Header) -> tuple[int, int]:
    """Return how many of a few weights differ from those that an eraser was trained on, and how many were compared.

    Weights in bfloat16 or less lost bits that the hashes are of, and are not compared.

    Args:
        model: ComfyUI's `ModelPatcher`.
        header: Of the eraser, with hashes of its base's weights.
    """
    weights, compared = model.model.state_dict(), list[bool]()
    known = [
        (name, part)
        for name, members in _parts(model).items()
        for part in members
        if part.module in header.base_hashes and not part.swaps
        if name in weights and weights[name].dtype in (torch.float16, torch.float32)
    ]
    for name, part in sorted(known, key=lambda each: weights[each[0]].numel())[:_COMPARED]:
        backup = model.backup.get(name)  # as it was before other patches, while the model is loaded with them
        weight = weights[name] if backup is None else getattr(backup, "weight", backup)
        weight = weight if part.rows is None else weight.narrow(0, *part.rows)
        digest = hashlib.sha256(weight.detach().to("cpu", torch.float16).contiguous().numpy().tobytes()).hexdigest()
        compared.append(digest[:16] != header.base_hashes[part.module])
    return sum(compared), len(compared)


def _check_kind(model: Any, header: Header, name: str) -> None:
    """Refuse an eraser of another family or prediction type; what is not known is not held against it."""
    family = _FAMILIES.get(type(model.model).__name__)
    if family and family != header.family:
        made_for = _TITLES.get(header.family, header.family)
        raise EraserError(
            f"{name} was made for {made_for} ({header.base}), and the model connected is {_TITLES[family]}: load it on the"
            " checkpoint it was made for."
        )
    kinds = (each.__name__ for each in type(model.get_model_object("model_sampling")).__mro__)
    predicts = next((_PREDICTIONS[kind] for kind in kinds if kind in _PREDICTIONS), None)
    if predicts and header.prediction_type and predicts != header.prediction_type:
        raise EraserError(
            f"{name} was made for a model that predicts {header.prediction_type}, and the one connected predicts {predicts}:"
            " load it on the checkpoint it was made for."
        )


def _targets(key_map: Mapping[str, Target], names: Mapping[str, Any]) -> dict[str, Target]:
    """Return the place of every layer that has one, by ComfyUI's table of names.

    The table knows a U-Net's layers by diffusers' names only with underscores, as kohya writes them.
    """
    targets: dict[str, Target] = {}
    for name in names:
        module = next((name.removeprefix(prefix) for prefix in _DOTTED if name.startswith(prefix)), name)
        for key in (name, f"transformer.{module}", f"lora_unet_{module.replace('.', '_')}"):
            if key in key_map:
                targets[name] = key_map[key]
                break
    return targets


def _parts(model: Any) -> dict[str, list[Part]]:
    """Return the layers of diffusers' model by the name of the weight that they lie in; nothing for models unknown here."""
    config, kind = model.model.model_config.unet_config, type(model.model).__name__
    if kind == "SD3":
        table: Mapping[str, Target] = comfy.utils.mmdit_to_diffusers(config, output_prefix=_WEIGHTS)
    elif kind == "Flux":
        table = comfy.utils.flux_to_diffusers(config, output_prefix=_WEIGHTS)
    else:
        table = {name: f"{_WEIGHTS}{weight}" for name, weight in comfy.utils.unet_to_diffusers(config).items()}
    parts: dict[str, list[Part]] = {}
    for name, target in table.items():
        if name.endswith(".weight"):
            swaps = not isinstance(target, str) and len(target) > 2
            parts.setdefault(_weight(target), []).append(Part(name.removesuffix(".weight"), _rows(target), swaps))
    return parts


def _members(target: Target, parts: Mapping[str, list[Part]]) -> list[Part]:
    """Return the layers of diffusers' model that lie at a place, their rows counted from its own first one."""
    weight, rows = _weight(target), _rows(target)
    own = weight.removeprefix(_WEIGHTS).removesuffix(".weight")
    members = parts.get(weight) or [Part(own)]  # by ComfyUI's own path, where diffusers' is not known
    if rows is None:
        return members
    first, number = rows
    inside = [part for part in members if part.rows and first <= part.rows[0] and sum(part.rows) <= first + number]
    return [Part(part.module, (part.rows[0] - first, part.rows[1])) for part in inside if part.rows] or [Part(own)]


def _weight(target: Target) -> str:
    return target if isinstance(target, str) else target[0]


def _rows(target: Target) -> tuple[int, int] | None:
    """Return first row and number of rows of a place that is a part of a weight, which ComfyUI writes (0, first, number)."""
    return None if isinstance(target, str) or target[1] is None else (target[1][1], target[1][2])


def _check_shape(factors: Factors, weight: Tensor, target: Target, what: str) -> None:
    rows = _rows(target)
    expected = rows[1] if rows else weight.shape[0], math.prod(weight.shape[1:])
    shape = factors.up.shape[0], factors.down.shape[1]
    if shape != expected:
        raise EraserError(
            f"{what} changes a weight of {shape[0]} x {shape[1]}, and this model's has {expected[0]} x {expected[1]}: it was"
            " made for another model."
        )


def _scaled(factors: Factors, strength: Strength, members: Sequence[Part]) -> Factors | None:
    """Return the update at a strength, which may differ between rows of a joined weight; `None` where it is 0 in all."""
    at = [strength.at(part.module) for part in members]
    if not any(at):
        return None
    if len(set(at)) == 1:
        return Factors(factors.down, factors.up * at[0])
    by_row = torch.zeros(factors.up.shape[0], 1)
    for part, value in zip(members, at, strict=True):
        first, number = part.rows or (0, len(by_row))
        by_row[first : first + number] = value
    return Factors(factors.down, factors.up * by_row)


def _side_by_side(members: Sequence[Factors]) -> Factors:
    return Factors(torch.cat([each.down for each in members]), torch.cat([each.up for each in members], dim=1))
