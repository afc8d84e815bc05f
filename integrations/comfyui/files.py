# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The esd-lora authors
"""Reading erasers of esd-lora, and plain LoRA files of others, as factors by layer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import EraserError

HEADER_KEY = "esd_lora"
"""Key of the safetensors metadata under which esd-lora writes what an eraser removes, in every layout."""
FORMAT = 5
"""Highest number of the eraser file format that is read here."""
TEXT_ENCODER = ("lora_te", "text_encoder", "te_")
"""How names of a text encoder's layers begin."""
_SUFFIX = re.compile(r"\.(?:(lora_down|lora_A|lora\.down)|(lora_up|lora_B|lora\.up))(?:\.default)?\.weight$|\.alpha$")


class Factors(NamedTuple):
    """The low-rank update `up @ down` of one weight, its scale folded into `up`."""

    down: Tensor
    """[rank, inputs], a convolution's kernel among its inputs."""
    up: Tensor
    """[outputs, rank]."""


class Concept(NamedTuple):
    """What an eraser removes, as its header says."""

    name: str
    synonyms: tuple[str, ...] = ()
    weight: float = 1.0
    """Strength at which it stands in the file."""


class Header(NamedTuple):
    """The part of an eraser's header that matters here."""

    family: str
    """esd-lora's name of the kind of model: `sd`, `sdxl`, `sd3`, `flux`."""
    prediction_type: str | None
    """`epsilon`, `v_prediction` or `flow`; `None` where it is not known."""
    base: str
    base_hashes: Mapping[str, str]
    """Path of a layer in diffusers to the hash of the base's weight there."""
    concepts: tuple[Concept, ...]


class LoraFile(NamedTuple):
    """A LoRA file in memory."""

    name: str
    layers: Mapping[str, Factors]
    """Name of a layer in the file, without its last part, to its factors."""
    header: Header | None
    """`None` where the file is no eraser of esd-lora."""

    def effect(self, weight: float) -> str:
        """Return what the file does at a strength: `removes a cat`; for what is no eraser, that nothing says so."""
        if self.header is None:
            return "is a LoRA and no eraser of esd-lora, so nothing says what it does: it is applied as it is"
        names: dict[str, list[str]] = {"removes": [], "amplifies": []}
        for concept in self.header.concepts:
            stored = "" if concept.weight == 1 else f" (stored at {concept.weight:g})"
            names["removes" if concept.weight * weight >= 0 else "amplifies"].append(concept.name + stored)
        return " and ".join(f"{verb} {', '.join(each)}" for verb, each in names.items() if each)


def read_lora(path: str | Path, name: str) -> LoraFile:
    """Read a LoRA file, on the CPU; nothing is ever unpickled.

    Args:
        path: A `.safetensors` file under the names of esd-lora, diffusers, peft or kohya.
        name: What to call it in messages.

    Raises:
        EraserError: If it cannot be read, is no plain LoRA, is damaged, or of a newer format.
    """
    if Path(path).suffix.lower() != ".safetensors":
        raise EraserError(f"{name} is no .safetensors file, and other kinds can hold code: convert it first.")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, OSError) as error:
        raise EraserError(f"{name} is no safetensors file, or damaged ({error}): fetch or make it again.") from error
    return LoraFile(name, _factors(tensors, name), _header(metadata[HEADER_KEY], name) if HEADER_KEY in metadata else None)


def _factors(tensors: Mapping[str, Tensor], name: str) -> dict[str, Factors]:
    """Return the factors by layer, `alpha / rank` folded in; a file without alpha means 1, in every client."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _SUFFIX.search(key)
        if match is None:
            raise EraserError(
                f"{name} holds {_shortened(key)}, which is no tensor of a plain LoRA: use ComfyUI's own Load LoRA."
            )
        role = "down" if match[1] else "up" if match[2] else "alpha"
        parts.setdefault(key[: match.start()], {})[role] = tensor
    layers = {layer: _checked(each, f"{name}: layer {_shortened(layer)}") for layer, each in parts.items()}
    if not layers:
        raise EraserError(f"{name} holds no layer of a LoRA.")
    return layers


def _checked(parts: Mapping[str, Tensor], what: str) -> Factors:
    """Return the factors of one layer, once they are seen to be a pair of finite numbers."""
    if not {"down", "up"} <= parts.keys():
        raise EraserError(f"{what} has one factor and lacks the other: fetch or make the file again.")
    down, up = (parts[role].float().flatten(1) if parts[role].dim() > 1 else parts[role] for role in ("down", "up"))
    if down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise EraserError(f"{what} has factors of shapes {list(down.shape)} and {list(up.shape)}, which do not fit each other.")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise EraserError(f"{what} has an alpha of {alpha.numel()} values, expected one.")
    up = up if alpha is None else up * (float(alpha) / down.shape[0])
    if not (bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all())):
        raise EraserError(f"{what} holds NaN or infinity: its training diverged, make it again.")
    return Factors(down, up)


def _header(text: str, name: str) -> Header:
    """Return the header that the JSON in an eraser's metadata says."""
    try:
        fields: Any = json.loads(text)
        number = float(fields["format"])
        concepts = tuple(
            Concept(str(each["name"]), tuple(map(str, each.get("synonyms", ()))), float(each.get("weight", 1)))
            for each in fields["concepts"]
        )
        prediction_type = fields["prediction_type"]
        header = Header(
            family=str(fields["family"]),
            prediction_type=prediction_type and str(prediction_type),
            base=str(fields["base"]),
            base_hashes={str(path): str(digest) for path, digest in fields.get("base_hashes", {}).items()},
            concepts=concepts,
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise EraserError(f"{name} has a damaged header: fetch or train it again.") from error
    if number > FORMAT:
        raise EraserError(f"{name} has format {number:g}, and these nodes read up to {FORMAT}: get newer nodes from esd-lora.")
    return header


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"
