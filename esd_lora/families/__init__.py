"""Model families: one file each, told apart by the pipeline class that a base names."""

from __future__ import annotations

import json
from pathlib import Path

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.families.family import ModelFamily
from esd_lora.families.flux import Flux
from esd_lora.families.sana import Sana
from esd_lora.families.sd import StableDiffusion
from esd_lora.families.sd3 import StableDiffusion3
from esd_lora.families.sdxl import StableDiffusionXL

__all__ = ["FAMILIES", "ModelFamily", "family_named", "family_of", "read_pipeline"]

FAMILIES: list[ModelFamily] = [StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux(), Sana()]
"""Every family there is. To add one of your own, append it."""


def family_of(pipeline: str) -> ModelFamily:
    """Return the family that covers a diffusers pipeline class.

    Raises:
        EsdLoraError: If none does.
    """
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise EsdLoraError(f"the base is a {pipeline}, which no family covers. Supported: {supported}.")


def family_named(name: str) -> ModelFamily:
    """Return the family of a name, as headers and `--family` give it.

    Raises:
        EsdLoraError: If there is none.
    """
    families = {family.name: family for family in FAMILIES}
    if name not in families:
        raise EsdLoraError(f"unknown family {name!r}{did_you_mean(name, families)}. Known: {', '.join(families)}.")
    return families[name]


def read_components(index: Path) -> list[str]:
    """Return the names of the components that a model_index.json lists, which are the folders beside it.

    Raises:
        EsdLoraError: If it is damaged.
    """
    try:
        return [name for name in json.loads(index.read_text("utf-8")) if not name.startswith("_")]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise EsdLoraError(
            f"{index} is damaged: expected JSON with a name for each component. Fetch the base again."
        ) from error


def read_pipeline(index: Path) -> str:
    """Return the pipeline class that a model_index.json names.

    Raises:
        EsdLoraError: If it is damaged.
    """
    try:
        return json.loads(index.read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EsdLoraError(f"{index} is damaged: expected JSON with a _class_name. Fetch the base again.") from error
