"""Loading a base and telling its family from the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from esd_lora.bases import BUILT_IN, base_files, domain, keep_prompts
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.families._base import SCOPES, Base, ModelFamily
from esd_lora.families.sd import StableDiffusion

__all__ = ["FAMILIES", "SCOPES", "Base", "ModelFamily", "load_base", "quiet_libraries"]

FAMILIES: tuple[ModelFamily, ...] = (StableDiffusion(),)


def family_of(pipeline: str) -> ModelFamily:
    """The family that covers a diffusers pipeline class.

    Raises:
        EsdLoraError: If none does.
    """
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise EsdLoraError(f"the base is a {pipeline}, which no family covers. Supported: {supported}.")


def read_pipeline(index: Path) -> str:
    """The pipeline class that a model_index.json names.

    Raises:
        EsdLoraError: If it is damaged.
    """
    try:
        return json.loads(index.read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EsdLoraError(f"{index} is damaged: expected JSON with a _class_name. Fetch the base again.") from error


def load_base(base: str | Path, *, device: str | None = None, dtype: torch.dtype = torch.float32) -> Base:
    """Loads a base model and tells its family.

    Args:
        base: A built-in name (`emoji`), a local diffusers directory, or a Hub id (`owner/name`).
        device: Where to put it; the GPU if there is one.
        dtype: Of the frozen weights.

    Raises:
        EsdLoraError: If there is no such base, it is not a diffusers pipeline, or no family covers it.
    """
    name = str(base)
    folder = base_files(name) if name in BUILT_IN else Path(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise EsdLoraError(f"{folder} has no model_index.json, so it is not a diffusers pipeline directory.")
        family = family_of(read_pipeline(index))
    elif folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise EsdLoraError(
            f"no base {name!r}: expected a built-in base ({', '.join(BUILT_IN)}), a diffusers directory, or a Hub id"
            f" 'owner/name'{did_you_mean(name, BUILT_IN)}."
        )
    else:
        family = None
    pipe = _load_pipeline(str(folder) if folder.is_dir() else name, dtype)
    family = family or family_of(type(pipe).__name__)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    revision = getattr(pipe.config, "_commit_hash", None)
    habits = domain(name)["sampling"] if name in BUILT_IN else {}
    return Base(pipe, family, name, revision, keep_prompts(name), **habits)


def _load_pipeline(source: str, dtype: torch.dtype) -> Any:
    with quiet_libraries():
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        optional = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        try:
            return DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **optional)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise EsdLoraError(f"base {source!r} cannot be loaded: {first}") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps the loaders' own bars and notices (one for each component, one for torchvision) off the terminal."""
    import transformers.utils.logging as transformers_log
    from diffusers.utils import logging as diffusers_log

    before = transformers_log.get_verbosity(), diffusers_log.get_verbosity()
    for log in (transformers_log, diffusers_log):
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        transformers_log.set_verbosity(before[0])
        diffusers_log.set_verbosity(before[1])
        for log in (transformers_log, diffusers_log):
            log.enable_progress_bar()
