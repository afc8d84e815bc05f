"""Which preset trains a base that comes without a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esd_lora.bases.loading import look_up
from esd_lora.bases.single_file import identify
from esd_lora.built_in import BUILT_IN, base_files
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.families import ModelFamily, family_of, read_pipeline
from esd_lora.json_files import read_json
from esd_lora.recipe_files import DEFAULT_PRESET, recipe_folder
from esd_lora.wording import HubId

_SMALL_SIDE = 16  # latents: 128 pixels


def preset_for(base: str) -> str:
    """Return the name of the preset that fits a base's family and size; weights are neither read nor fetched.

    Args:
        base: As for `load_base`.

    Raises:
        EsdLoraError: If the base is of no known family, or its index cannot be read or fetched.
    """
    if base in BUILT_IN:
        return DEFAULT_PRESET
    family, place = _family_of(base)
    if family is None:
        return DEFAULT_PRESET  # there is no such base, which loading it says
    if place.is_file():
        return family.preset
    config = place / family.denoiser / "config.json"
    side = read_json(config).get("sample_size") if config.is_file() else None
    return DEFAULT_PRESET if isinstance(side, int) and side <= _SMALL_SIDE else family.preset


def require_fitting(recipes: Sequence[str], base: str) -> None:
    """Refuse recipes that were made for bases of another family.

    Args:
        recipes: Names or files, each over those before it.
        base: As for `load_base`.

    Raises:
        EsdLoraError: With the preset that fits, or as `preset_for` does.
    """
    folder = recipe_folder(recipes)
    family = _family_of(base)[0] if folder else None
    if family and folder != family.preset.partition("/")[0]:
        raise EsdLoraError(
            f"recipe {' '.join(recipes)} is for bases of {folder}'s kind, and base {base!r} is of family {family.name!r}: give"
            f" {preset_for(base)} in its place."
        )


def _family_of(base: str) -> tuple[ModelFamily | None, Path]:
    """Return the family of a base and where it lies; none where there is no such base."""
    place = base_files(base) if base in BUILT_IN else Path(base)
    if place.is_file() and place.suffix == ".safetensors":
        shapes = {name: tuple(entry["shape"]) for name, entry in read_header(place).tensors.items()}
        return identify(place, shapes)[0], place
    if not (place / "model_index.json").is_file():
        hub_id = None if place.exists() else HubId.read(base)
        if hub_id is None:
            return None, place
        place = look_up(hub_id)
    return family_of(read_pipeline(place / "model_index.json")), place
