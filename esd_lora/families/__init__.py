"""Model families: one file each, told apart by the pipeline class that a base names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from esd_lora.errors import EsdLoraError, did_you_mean, shortened
from esd_lora.families.family import ModelFamily
from esd_lora.families.flux import Flux
from esd_lora.families.flux2 import Flux2
from esd_lora.families.kolors import Kolors
from esd_lora.families.lumina2 import Lumina2
from esd_lora.families.pixart import PixArtSigma
from esd_lora.families.qwen_image import QwenImage
from esd_lora.families.sana import Sana
from esd_lora.families.sd import StableDiffusion
from esd_lora.families.sd3 import StableDiffusion3
from esd_lora.families.sdxl import StableDiffusionXL
from esd_lora.families.wan import Wan
from esd_lora.families.z_image import ZImage
from esd_lora.json_files import read_json

__all__ = ["FAMILIES", "ModelFamily", "family_named", "family_of", "read_pipeline"]

FAMILIES: list[ModelFamily] = [
    StableDiffusion(),
    StableDiffusionXL(),
    StableDiffusion3(),
    Flux(),
    Sana(),
    PixArtSigma(),
    Lumina2(),
    QwenImage(),
    Kolors(),
    Flux2(),
    ZImage(),
    Wan(),
]
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
    raise EsdLoraError(f"the base is a {shortened(pipeline)}, which no family covers. Supported: {supported}.")


def family_named(name: str) -> ModelFamily:
    """Return the family of a name, as headers and `--family` give it.

    Raises:
        EsdLoraError: If there is none.
    """
    families = {family.name: family for family in FAMILIES}
    if name not in families:
        raise EsdLoraError(
            f"unknown family {shortened(repr(name))}{did_you_mean(name, families)}. Known: {', '.join(families)}."
        )
    return families[name]


def read_components(index: Path) -> list[str]:
    """Return the names of the components that a model_index.json lists, which are the folders beside it.

    Raises:
        EsdLoraError: If it is damaged.
    """
    return [name for name in read_json(index) if not name.startswith("_")]


def read_pipeline(index: Path) -> str:
    """Return the pipeline class that a model_index.json names, once its components are seen to be those of known libraries.

    diffusers imports what the index names, and takes files of code from the directory for libraries that it does not know.

    Raises:
        EsdLoraError: If it is damaged, names anything but classes of diffusers and transformers, or has two denoisers.
    """
    values = read_json(index)
    name = values.get("_class_name")
    if not isinstance(name, str | list):
        raise EsdLoraError(f"{index} is damaged: expected JSON with a _class_name. Fetch the base again.")
    if not isinstance(name, str):
        raise EsdLoraError(f"{index} names code of its own as its pipeline ({shortened(repr(name))}), which is never run.")
    for part, component in values.items():
        needed = part in ("unet", "transformer", "scheduler")
        listed = isinstance(component, list) and not part.startswith("_")
        if (needed or listed) and not _is_component(component, needed, pipeline_libraries(name)):
            raise EsdLoraError(
                f"{index}: component {shortened(part)} is {shortened(repr(component))}, expected a class of diffusers or"
                " transformers. Fetch the base again, or from elsewhere."
            )
    for part in ("unet", "transformer"):
        if values.get(f"{part}_2") not in (None, [None, None]):
            raise EsdLoraError(
                f"{index} has two denoisers that take turns by noise level, {part} and {part}_2, and an eraser of one would"
                " leave the concept in the other. Take a model with one denoiser."
            )
    return name


def pipeline_libraries(pipeline: str | None = None) -> tuple[str, ...]:
    """Return the modules of `diffusers.pipelines` that components come from: of one pipeline class, or of all there are."""
    return tuple(name for family in FAMILIES if pipeline is None or pipeline in family.pipelines for name in family.libraries)


def _is_component(value: object, needed: bool, libraries: Collection[str]) -> bool:
    """Return whether a value is the library and class of a component; or nothing twice, where it is not needed."""
    match value:
        case [None, None]:
            return not needed
        case [str(library), str(name)] if library in ("diffusers", "transformers", "stable_diffusion", *libraries):
            # Pipelines have an index of their own, and transformers' AutoX take code from the directory.
            return name.isidentifier() and not name.endswith("Pipeline") and re.match("Auto(?!encoder)", name) is None
        case _:
            return False
