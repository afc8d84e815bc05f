"""How stacks are fused and harmonised, as frozen, checked documents; `recipes/` holds the values."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from esd_lora.recipe import TEXT_SCOPE, Scope


class _Frozen(BaseModel):
    # The docstrings below the fields are what editors show: recipes/schema.json holds them.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class FuseSpec(_Frozen):
    """How a stack is fused in closed form (`esd_lora.fuse`). The values stand in `recipes/fuse.yaml`."""

    method: Literal["fuse"]
    """Says that a file is about fusing."""
    lam: float = Field(ge=0)
    """Weight of what is kept against what is erased; 0.03 erases more, 1 keeps more."""
    mu: float = Field(ge=0)
    """The part of the kept moment that is the same in all directions, for what no list names, in units of the mean square of
    a layer's input; 0.01 to 1."""
    trajectories: int = Field(ge=1)
    """Trajectories walked for each member, its prompts taking turns."""
    keep_trajectories: int = Field(ge=1)
    """Trajectories walked for the kept prompts, as far as there are so many."""
    steps: int = Field(ge=1, le=1000)
    """Points of a trajectory; 3 to 6."""
    guidance: float = Field(ge=0)
    """Classifier-free guidance of the trajectories."""
    seed: int = Field(default=0, ge=0)
    """Seed of the trajectories' noise."""


class HarmoniseSpec(_Frozen):
    """How a stack is distilled from its members (`esd_lora.harmonise`). The values stand in `recipes/harmonise.yaml`."""

    method: Literal["harmonise"]
    """Says that a file is about harmonising."""
    scope: Scope
    """Layers of the one update, whatever those of the members are: `full`, as it has to tell what they erase from all else."""
    rank: int = Field(ge=1, le=1024)
    """Rank of its layers; 4 to 16."""
    steps: int = Field(ge=1)
    """Optimiser steps for each member, 50 to 200; the learning rate falls to 0 over all of them."""
    lr: float = Field(gt=0)
    """Learning rate of the first step."""
    batch_size: int = Field(ge=2)
    """Points of members' prompts in a step, and as many of kept ones, with the same weight."""
    push: float = Field(gt=0)
    """How far to go from the base's prediction towards what a member does alone: beyond 1, because what is kept pulls back."""
    shake: float = Field(ge=0)
    """Noise on the text of half of the kept points, beside a pseudo-word: a random mixture of how kept prompts differ from each
    other, times this."""
    trajectories: int = Field(ge=1)
    """Trajectories walked by the base for each member, its prompts taking turns; every point is trained on. A member with more
    prompts gets one for each, up to three times as many, and so more of every batch."""
    keep_trajectories: int = Field(ge=1)
    """Trajectories walked for the kept prompts."""
    trajectory_steps: int = Field(ge=1, le=1000)
    """Points of a trajectory."""
    guidance: float = Field(ge=0)
    """Classifier-free guidance of the trajectories."""
    seed: int = Field(default=0, ge=0)
    """Seed of noise and batches."""

    @field_validator("scope")
    @classmethod
    def _is_of_the_denoiser(cls, value: str) -> str:
        if value == TEXT_SCOPE:
            raise ValueError("stacks are harmonised on the denoiser alone: give one of its scopes")
        return value
