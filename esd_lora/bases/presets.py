"""Which preset trains a base that comes without a recipe."""

from __future__ import annotations

from pathlib import Path

from esd_lora.bases.loading import look_up
from esd_lora.bases.single_file import identify
from esd_lora.built_in import BUILT_IN
from esd_lora.erasers.tensor_files import read_header
from esd_lora.families import family_of, read_pipeline
from esd_lora.json_files import read_json
from esd_lora.wording import HubId

DEFAULT = "fast"
"""The preset of small models, and where no base is named; its rate and steps were chosen on the built-in base."""
_SMALL_SIDE = 16  # latents: 128 pixels


def preset_for(base: str) -> str:
    """Return the name of the preset that fits a base's family and size; weights are neither read nor fetched.

    Args:
        base: As for `load_base`.

    Raises:
        EsdLoraError: If the base is of no known family, or its index cannot be read or fetched.
    """
    if base in BUILT_IN:
        return DEFAULT
    place = Path(base)
    if place.is_file() and place.suffix == ".safetensors":
        shapes = {name: tuple(entry["shape"]) for name, entry in read_header(place).tensors.items()}
        return identify(place, shapes)[0].preset
    if not (place / "model_index.json").is_file():
        hub_id = None if place.exists() else HubId.read(base)
        if hub_id is None:
            return DEFAULT  # there is no such base, which loading it says
        place = look_up(hub_id)
    family = family_of(read_pipeline(place / "model_index.json"))
    config = place / family.denoiser / "config.json"
    side = read_json(config).get("sample_size") if config.is_file() else None
    return DEFAULT if isinstance(side, int) and side <= _SMALL_SIDE else family.preset
