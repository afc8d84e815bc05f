"""Bases without weights: what their configurations describe, on the meta device, where it takes no memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esd_lora.bases.base import Base
from esd_lora.bases.configurations import MAX_FILE, check_configurations
from esd_lora.bases.loading import look_up
from esd_lora.bases.notices import quiet_libraries
from esd_lora.bases.single_file import CONFIGS, identify, model_class
from esd_lora.built_in import BUILT_IN, base_files, keep_prompts
from esd_lora.erasers.hub_answers import checked_answers
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.families import family_of, read_pipeline
from esd_lora.json_files import read_json
from esd_lora.wording import HubId

PUBLISHED = {
    "SD 1.5": ("sd1", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "SDXL": ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
    "SD 3.5 medium": ("sd35-medium", "stabilityai/stable-diffusion-3.5-medium"),
    "Flux.1 dev": ("flux-dev", "black-forest-labs/FLUX.1-dev"),
    "PixArt-Sigma": ("pixart-sigma", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    "Lumina 2": ("lumina2", "Alpha-VLLM/Lumina-Image-2.0"),
    "Qwen-Image": ("qwen-image", "Qwen/Qwen-Image"),
    "Kolors": ("kolors", "Kwai-Kolors/Kolors-diffusers"),
    "Flux.2 Klein 4B": ("flux2-klein-4b", "black-forest-labs/FLUX.2-klein-4B"),
    "Flux.2 Klein 9B": ("flux2-klein-9b", "black-forest-labs/FLUX.2-klein-9B"),
    "Flux.2 dev": ("flux2-dev", "black-forest-labs/FLUX.2-dev"),
    "Z-Image Turbo": ("z-image-turbo", "Tongyi-MAI/Z-Image-Turbo"),
    "Wan 2.1 1.3B": ("wan21-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "Wan 2.2 5B": ("wan22-5b", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    "Wan 2.1 14B": ("wan21-14b", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
}
"""Published models whose configurations ship: name to that of the file in `single_file.CONFIGS`, and the Hub's id."""
_Parts = Mapping[str, Mapping[str, Any]]


def outline_published(name: str, dtype: torch.dtype = torch.bfloat16) -> Base:
    """Return a model of `PUBLISHED` without its weights.

    Args:
        name: Of the model.
        dtype: Of the weights that are not there.
    """
    config, repo = PUBLISHED[name]
    return _build(_shipped(config), repo, dtype)


def outline_base(base: str, *, config: str | Path | None = None, dtype: torch.dtype = torch.bfloat16) -> Base:
    """Return a base without its weights; of one on the Hub, its configurations are fetched.

    Args:
        base: As for `load_base`.
        config: As for `load_base`.
        dtype: Of the weights that are not there.

    Raises:
        EsdLoraError: If there is no such base, its configurations cannot be read or fetched, or a single file needs a `config`.
    """
    place = base_files(base) if base in BUILT_IN else Path(base)
    if place.is_file():
        shapes = {name: tuple(entry["shape"]) for name, entry in read_header(place).tensors.items()}
        shipped = identify(place, shapes)[1].config
        if config is None and shipped is None:
            raise EsdLoraError(f"{place} does not say all of its architecture: give --base-config a diffusers directory of it.")
        return _build(_read(Path(config)) if config is not None else _shipped(str(shipped)), base, dtype)
    if not (place / "model_index.json").is_file():
        hub_id = None if place.exists() else HubId.read(base)
        if hub_id is None:
            raise EsdLoraError(f"no base {base!r}: expected a built-in base, a diffusers directory, a checkpoint or a Hub id.")
        place = _fetch(hub_id)
    return _build(_read(place), base, dtype)


def _shipped(name: str) -> _Parts:
    return json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))


def _read(folder: Path) -> _Parts:
    """Return the configurations of a diffusers directory by component, its index among them."""
    read_pipeline(folder / "model_index.json")
    check_configurations(folder)
    files = {file.parent.name: file for file in [*folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json")]}
    return {"model_index": read_json(folder / "model_index.json"), **{part: read_json(file) for part, file in files.items()}}


def _fetch(hub_id: HubId) -> Path:
    from huggingface_hub import snapshot_download

    look_up(hub_id)  # says what is wrong with an id
    try:
        with quiet_libraries(), checked_answers(MAX_FILE):
            patterns = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]
            return Path(snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise EsdLoraError(f"the configurations of base {hub_id.repo!r} cannot be fetched: {first}") from error


def _build(parts: _Parts, name: str, dtype: torch.dtype) -> Base:
    """Return the base that configurations describe."""
    import diffusers

    index = parts["model_index"]
    family = family_of(str(index["_class_name"]))
    components: dict[str, Any] = {}
    with quiet_libraries():
        for part, (library, kind) in ((part, value) for part, value in index.items() if isinstance(value, list)):
            if part == "scheduler":
                components[part] = getattr(diffusers, kind).from_config(dict(parts[part]))
            elif part.startswith((family.denoiser, "vae", "text_encoder")) and library:
                components[part] = _outline(library, kind, parts.get(part, {}), dtype)
        pipeline: Any = getattr(diffusers, str(index["_class_name"]))
        wanted = signature(pipeline.__init__).parameters
        given = {part: components.get(part) for part, each in wanted.items() if part in index or each.default is each.empty}
        del given["self"]
        if "requires_safety_checker" in wanted:
            given["requires_safety_checker"] = False
        return Base(pipeline(**given), family, name, keep=keep_prompts(name))


def _outline(library: str, kind: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    made: Any = model_class(library, kind)
    with torch.device("meta"):
        model = made.from_config(dict(config)) if library == "diffusers" else made(made.config_class(**config))
    # Whatever the device is, some classes (ChatGLM) make their layers on the CPU, in memory that nothing has touched yet.
    return nn.Module.to(model, device="meta", dtype=dtype).requires_grad_(False).eval()
