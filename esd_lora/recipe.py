"""The recipe: everything that decides what an eraser becomes, as one frozen, fully checked document.

Hyper-parameters have no defaults here: `recipes/*.yaml` is their only home. A recipe says `extends: fast` and adds what
is its own. Fields whose default is "nothing" (no anchor, no preserved prompts) do have defaults.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PromptPair(_Frozen):
    """One line of a prompt pool: what to erase, and what should appear instead.

    A plain string stands for a pair without an anchor of its own.
    """

    prompt: str
    anchor: str | None = None
    """What should appear instead; `None` takes the concept's anchor."""


def _pair(value: object) -> object:
    return {"prompt": value} if isinstance(value, str) else value


def _concept(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class Concept(_Frozen):
    """One thing to erase. A plain string stands for a concept of that name and nothing else."""

    name: str = Field(min_length=1, pattern=r"\S")
    """What the eraser removes, in words: `"cat"`, `"Van Gogh"`."""
    prompts: tuple[Annotated[PromptPair, BeforeValidator(_pair)], ...] = ()
    """The pool of prompts to erase; empty means the name itself. `{x}` stands for each word of `fill`."""
    fill: tuple[str, ...] = ()
    anchor: str = ""
    """Anchor of every prompt without its own. The empty prompt is the paper's."""
    erase_from: str | None = None
    """Prompt the student is trained on and `x_t` is drawn under, when it is not the erased prompt itself:
    erase "hat" from "cowboy"."""
    synonyms: tuple[str, ...] = ()
    """Other names of the concept; preserved prompts that contain one of them are dropped."""

    @model_validator(mode="after")
    def _placeholders(self) -> Concept:
        texts = [self.anchor, *(pair.prompt + (pair.anchor or "") for pair in self.prompts or (PromptPair(prompt=self.name),))]
        if any("{x}" in text for text in texts) and not self.fill:
            raise ValueError("prompts contain {x}, but fill lists no words to put there")
        return self

    def pairs(self) -> list[tuple[str, str]]:
        """The pool as (prompt, anchor), templates filled in."""
        pairs: list[tuple[str, str]] = []
        for pair in self.prompts or (PromptPair(prompt=self.name),):
            anchor = self.anchor if pair.anchor is None else pair.anchor
            for word in self.fill if "{x}" in pair.prompt + anchor else ("",):
                pairs.append((pair.prompt.replace("{x}", word), anchor.replace("{x}", word)))
        return pairs

    def named_in(self, text: str) -> bool:
        """Whether a prompt names this concept: by name or synonym, as whole words, singular or plural, without article."""
        words = [re.sub(r"^(an?|the)\s+", "", name.strip(), flags=re.IGNORECASE) for name in (self.name, *self.synonyms)]
        return any(re.search(rf"(?<!\w){re.escape(word)}(e?s)?(?!\w)", text, re.IGNORECASE) for word in words)


class LoraSpec(_Frozen):
    """Shape of the low-rank update."""

    rank: int = Field(ge=1, le=1024)
    alpha: float = Field(gt=0)
    """The update is `alpha / rank * up @ down`."""


class TrainSpec(_Frozen):
    """How the student meets the teacher. Typical values stand in `recipes/`, with the source of each."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    lr: float = Field(gt=0)
    lr_schedule: Literal["constant", "cosine"]
    """`cosine` falls to a tenth of `lr`."""
    batch_size: int = Field(ge=1)
    """Noisy latents of erased prompts a step."""
    preserve_batch: int = Field(ge=0)
    """Noisy latents of preserved prompts a step."""
    preserve_weight: float = Field(ge=0)
    """Weight of a preserved point in the loss; an erased one has weight 1."""
    x_t_from: Literal["student", "base"]
    """Who denoises the `x_t` trained on: the adapted model (paper, LECO) or the frozen one (authors' 2025 script)."""
    points: Literal["one", "all"]
    """Points kept of a trajectory: one at random (paper), or every one (replay buffer)."""
    trajectories: int = Field(ge=1)
    """Trajectories of erased prompts walked at each refresh; lessons take turns."""
    preserve_trajectories: int = Field(ge=0)
    """Trajectories of preserved prompts walked at each refresh."""
    refresh_every: int = Field(ge=1)
    """Optimiser steps between two refreshes of the buffer; 1 with `points: one` is the paper's loop."""
    trajectory_steps: int = Field(ge=2, le=1000)
    """DDIM steps of a whole trajectory (paper: 50)."""
    guidance: float = Field(ge=0)
    """Classifier-free guidance of the trajectories (paper: 3)."""
    seed: int = Field(default=0, ge=0)
    probe_every: int = Field(default=0, ge=0)
    """Steps between two erasure probes; 0 never probes."""
    stop_at: float | None = Field(default=None, gt=0)
    """Stop once the probe's erasure (0 untouched, 1 on target) reaches this."""
    preview_every: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=0, ge=0)


class Recipe(_Frozen):
    """Everything that decides what an eraser becomes. `load_recipe` builds one from a name, a file or keywords."""

    base: str = Field(min_length=1)
    """A built-in base (`emoji`), a local diffusers directory, or a Hub id."""
    concepts: tuple[Annotated[Concept, BeforeValidator(_concept)], ...] = Field(min_length=1)
    scope: str
    objective: str
    eta: float
    preserve: Literal["default"] | tuple[str, ...] = ()
    """Prompts whose predictions must not move; `default` is the base's own keep list, or the package's."""
    lora: LoraSpec
    train: TrainSpec
