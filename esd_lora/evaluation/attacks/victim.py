"""The victim of an attack, and the attacker's pictures of the concept, with their latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.erasers.stacking import Strength
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.variants import Variant, make_painter
from esd_lora.families.sd import StableDiffusion
from esd_lora.latents import to_latents
from esd_lora.pictures import SUFFIXES, open_picture, picture_paths
from esd_lora.seeds import text_seed


class Victim(NamedTuple):
    """An erased model under attack."""

    base: Base
    """As it is before erasing; an attacker is thought to have pictures of the concept, and these are the base's."""
    erased: Variant
    """The base with erasers on, within `with erased.on()`."""
    concepts: Sequence[ErasedConcept]
    """What was erased."""
    cases: Sequence[Case]
    """Prompts about the concepts, which the attacker wants painted."""
    steps: int
    """Denoising steps."""
    guidance: float
    erasers: Sequence[Eraser]
    """Those that `erased` has on."""
    weights: Sequence[Strength]
    """Strength of each."""


def require_at_least(least: int, **settings: int) -> None:
    """Refuse settings of an attack that are too small.

    Raises:
        EsdLoraError: With the first one.
    """
    for name, value in settings.items():
        if value < least:
            raise EsdLoraError(f"{name} of an attack is {value}, expected {least} or more.")


def require_stable_diffusion(base: Base, attack: str) -> None:
    """Refuse bases with other text encoders or another guidance than Stable Diffusion and SDXL have.

    Raises:
        EsdLoraError: With what the base is.
    """
    if not isinstance(base.family, StableDiffusion) or base.family.takes_guidance(base.pipe):
        raise EsdLoraError(
            f"base {base.id!r} is a {type(base.pipe).__name__}, and {attack} is made for Stable Diffusion and SDXL, not"
            " distilled for guidance. Leave this attack out of the suite."
        )


def concept_pictures(folder: str | Path | None, victim: Victim, count: int | None = None) -> list[Path]:
    """Return the first `count` pictures of an attacker's folder, by name, or all of them; none without a folder.

    Raises:
        EsdLoraError: If there is no such folder or no picture in it, or what was erased is more than one concept, so that
            nobody could say which of them the pictures show.
    """
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise EsdLoraError(f"there is no folder {folder}. Expected one with pictures of the concept.")
    files = picture_paths(Path(folder))
    if not files:
        raise EsdLoraError(f"{folder} holds no picture. Expected some of the concept, as {', '.join(SUFFIXES)}.")
    if len(victim.concepts) != 1:
        raise EsdLoraError(
            f"the pictures in {folder} can show one concept, and {len(victim.concepts)} were erased. Attack one at a time, or"
            " leave the folder out."
        )
    return files[:count]


def captioned_latents(victim: Victim, count: int, files: Sequence[Path], seed: int) -> tuple[Tensor, list[str]]:
    """Return latents [N, ...] of pictures of the concept, and their captions.

    Args:
        victim: Its base must be as it is before erasing.
        count: Pictures to paint, evenly spaced among the victim's cases, with other seeds than those.
        files: Pictures to read instead; their caption is the concept's name.
        seed: Of what is painted.
    """
    if files:
        return to_latents(victim.base, list(map(open_picture, files))), [victim.concepts[0].name] * len(files)
    chosen = [victim.cases[i * len(victim.cases) // count] for i in range(count)]
    cases = [case._replace(seed=text_seed("picture", seed, i, case.seed)) for i, case in enumerate(chosen)]
    pictures = make_painter(victim.base, victim.steps, victim.guidance)(cases)
    return to_latents(victim.base, pictures), [case.prompt for case in cases]
