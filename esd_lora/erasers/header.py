"""The header of an eraser file: what it removes, how it was made, and what is not known."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from esd_lora.erasers.measured import Measured
from esd_lora.errors import EsdLoraError
from esd_lora.recipe import Recipe
from esd_lora.wording import mentions

HEADER_KEY = "esd_lora"
"""Of the safetensors metadata that the header stands under, as JSON."""
FORMAT = 3
"""Number of the file format, apart from the package's version. A reader accepts this and every older one.

2 lets a file say that things are not known (an import, an extraction), where it came from, and weights by block.
3 lets a stack say how it was fused.
"""


class ErasedConcept(BaseModel):
    """What one concept of an eraser was trained on; stacking without damage needs every line of it."""

    model_config = ConfigDict(frozen=True)

    name: str
    synonyms: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...]
    """(erased prompt, anchor); none where they are not known."""
    eta: float | None
    """`None` where it is not known."""
    weight: float = 1.0
    """Strength at which the concept stands in this file; changed by stacking. Below zero it is amplified, not erased."""
    blocks: dict[str, float] = {}
    """Further factors by part of the model (`mid_block`, `up_blocks.1`), folded in like the weight."""

    def named_in(self, text: str) -> bool:
        """Whether a prompt names this concept, by name or synonym."""
        return mentions(text, (self.name, *self.synonyms))


class Origin(BaseModel):
    """The origin of an eraser that this toolkit did not train."""

    model_config = ConfigDict(frozen=True)

    how: Literal["imported", "extracted"]
    files: dict[str, str]
    """File name to SHA-256 of what was read."""
    layout: str
    """Layout of what was read: `kohya`, `diffusers` or `peft`; for an extraction `directory`, `safetensors` or `pickle`.

    Older extractions have rank and energy in words here.
    """
    notes: dict[str, str] = {}
    """Metadata of an imported file."""
    rank: int | None = None
    """Highest rank of a layer that an extraction was to keep."""
    energy: float | None = None
    """Share of every layer's squared norm that an extraction was to keep, above 0 and up to 1."""


class Distillation(BaseModel):
    """How a stack was harmonised: see `harmonising.harmonise`."""

    model_config = ConfigDict(frozen=True)

    steps: int
    trajectories: tuple[int, ...]
    """Of every member, in the order in which they were fused."""
    keep_trajectories: int
    trajectory_steps: int
    guidance: float
    evaluations: int
    """Latents through the model, the student's included; a guided pair counts 2."""
    seconds: float
    first_loss: float | None
    """Mean over the first tenth of the steps, in units of the squared prediction."""
    last_loss: float | None
    """Over the last tenth."""


class Fusion(BaseModel):
    """How a stack was fused, so that it can be done again: see `fusing.fuse` for the letters."""

    model_config = ConfigDict(frozen=True)

    members: tuple[str, ...]
    """SHA-256 of every member's tensors, its weight folded in."""
    lam: float
    mu: float
    kept: int
    """Number of prompts that were kept."""
    kept_sha256: str
    """Of these prompts, sorted, one a line."""
    dropped: tuple[str, ...]
    """Prompts of the list that name a member's concept, and so were not kept."""
    trajectories: int
    keep_trajectories: int
    steps: int
    guidance: float
    seed: int
    rank: int | None
    energy: float | None
    summed: tuple[str, ...] = ()
    """Layers that were added up instead: too wide."""
    evaluations: int
    """Latents through the base; a guided pair counts 2."""
    seconds: float
    objective: float | None = None
    """Its value at the closed form, over that of no update at all: 0 where everything asked for could be had at once."""
    objective_summed: float | None = None
    """The same of the plain sum."""


class EraserHeader(BaseModel):
    """The header of an eraser file: JSON under one key of the safetensors metadata."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    family: str
    """Model family the eraser was trained on, such as `sd`."""
    prefix: str
    """Component the keys start with: `unet` or `transformer`."""
    prediction_type: str | None
    """`epsilon`, `v_prediction` or `flow`; `None` where it is not known."""
    base: str
    base_revision: str | None = None
    base_hashes: dict[str, str]
    """Module path to `hash_weight` of the base's weight there, for every layer the eraser touches."""
    concepts: tuple[ErasedConcept, ...]
    preserve: tuple[str, ...] = ()
    """Prompts whose predictions were held in place."""
    objective: str
    scope: str
    recipes: tuple[Recipe, ...]
    """The recipe as resolved; one of each member in a stack, none of what was not trained here."""
    versions: dict[str, str]
    created: str
    """ISO 8601, UTC."""
    cost: dict[str, float] = {}
    """Seconds, sample evaluations and student samples the training took."""
    evaluation: Measured | None = None
    """The latest that was attached."""
    origins: tuple[Origin, ...] = ()
    """Of members that were imported or extracted."""
    fusions: tuple[Fusion, ...] = ()
    """Of stacks that were fused, the latest last."""
    distillations: tuple[Distillation, ...] = ()
    """Of stacks that were harmonised, the latest last."""
    truncation: float = 0.0
    """Share of the update's norm that compressing cut off; in a stack, that of the member that lost most."""

    @field_validator("created")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        datetime.fromisoformat(value)
        return value


def parse_header(text: str, file: Path) -> EraserHeader:
    """The header from its JSON.

    Raises:
        EsdLoraError: If it is damaged or of a newer format.
    """
    try:
        found = re.search(r'"format"\s*:\s*(\d+)', text)
        if found and (len(found[1]) > 9 or int(found[1]) > FORMAT):
            raise EsdLoraError(f"{file} has format {found[1][:9]}, this version reads up to {FORMAT}. Upgrade esd-lora.")
        return EraserHeader.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EsdLoraError(f"{file} has a damaged header ({where}: {first['msg']}). Fetch or train it again.") from error
