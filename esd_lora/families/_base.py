"""Behind one call, every diffusion model: what a family must say about itself, and how a base is loaded.

The rest of the toolkit knows a denoiser only as `predict(x_t, t, condition)`. A family says how prompts become a
condition, how the denoiser is called, and which layers a scope means. A new one is a subclass in a file of its own and a
line in `families/__init__.py`.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from esd_lora.eraser import Eraser, hash_weight
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.trajectory import Condition

SCOPES = ("xattn", "xattn-kv", "selfattn", "noxattn", "full")
"""Which layers get an adapter, by the literature's names: ESD-x, UCE and MACE's K/V, self-attention, ESD-u, ESD-all."""


class ModelFamily(ABC):
    """One architecture. Stateless: the models themselves live in the diffusers pipeline that is passed in."""

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    """`_class_name` of the diffusers pipelines this family covers."""
    denoiser: ClassVar[str]
    """Component that gets the adapter, and prefix of its LoRA keys: `unet` or `transformer`."""
    scopes: ClassVar[Mapping[str, str]]
    """Scope to a regular expression searched for in the path of every linear and convolution."""

    @abstractmethod
    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        """The condition of N prompts: every tensor's first dimension is N."""

    @abstractmethod
    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's own prediction (noise, v or flow) at `x_t` [N, ...] and `t` [N]."""

    @abstractmethod
    def latent_shape(self, pipe: Any) -> tuple[int, ...]:
        """Shape of one image's latents at the model's native size, such as (4, 64, 64)."""

    @abstractmethod
    def scheduler(self, pipe: Any) -> Any:
        """A fresh scheduler for walking trajectories, with the base's own noise schedule and prediction type."""

    @abstractmethod
    def prediction_type(self, pipe: Any) -> str:
        """`epsilon`, `v_prediction` or `flow`, read from the base and never guessed."""

    def modules(self, model: nn.Module, scope: str) -> Mapping[str, nn.Module]:
        """The layers of `model` that `scope` means, by path.

        Raises:
            EsdLoraError: If the scope is unknown, or matches no layer of this model.
        """
        if scope not in self.scopes:
            raise EsdLoraError(f"unknown scope {scope!r}{did_you_mean(scope, self.scopes)}. Known: {', '.join(self.scopes)}.")
        layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        chosen = {path: m for path, m in layers.items() if re.search(self.scopes[scope], path)}
        if not chosen:
            usable = [name for name, rule in self.scopes.items() if any(re.search(rule, path) for path in layers)]
            raise EsdLoraError(
                f"scope {scope!r} matches none of the {len(layers)} linear and convolution layers of this {self.name} model."
                f" Scopes with layers here: {', '.join(usable) or 'none'}."
            )
        return chosen


@dataclass
class Base:
    """A loaded base model: the diffusers pipeline, its family, and where it came from."""

    pipe: Any
    family: ModelFamily
    id: str
    revision: str | None = None
    keep: tuple[str, ...] = ()
    """The base's own keep list: prompts of things an eraser should leave alone."""
    steps: int = 30
    """Denoising steps of a picture, unless asked otherwise."""
    guidance: float = 7.5

    @property
    def model(self) -> Any:
        """The denoiser: a diffusers U-Net or transformer."""
        return getattr(self.pipe, self.family.denoiser)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's prediction, as a `trajectory.Denoiser`."""
        return self.family.predict(self.model, x_t, t, condition)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of N prompts."""
        return self.family.encode(self.pipe, prompts)

    def require_bare(self) -> None:
        """Refuses a denoiser that carries adapters: they would speak with the teacher, and be taken off with ours.

        Raises:
            EsdLoraError: With their names.
        """
        if carried := getattr(self.model, "peft_config", None):
            raise EsdLoraError(
                f"base {self.id!r} already carries adapter {', '.join(map(repr, carried))}. Unload it first"
                " (pipe.unload_lora_weights()), or merge it into a base of its own (esd-lora merge)."
            )

    def weights(self, modules: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Path and base weight of every module that `modules` names."""
        layers = dict(self.model.named_modules())
        for path in modules:
            layer = layers.get(path)
            layer = getattr(layer, "base_layer", layer)
            if layer is None:
                raise EsdLoraError(f"base {self.id!r} has no layer {path}: the eraser was made for another model.")
            yield path, layer.weight

    def check(self, eraser: Eraser) -> None:
        """Refuses an eraser of another family, prediction type or layer shape; warns when the base's weights differ.

        Raises:
            EsdLoraError: With what differs.
        """
        header = eraser.header
        for what, found, expected in (
            ("family", header.family, self.family.name),
            ("prediction type", header.prediction_type, self.family.prediction_type(self.pipe)),
        ):
            if found != expected:
                raise EsdLoraError(
                    f"eraser of {eraser.names} has {what} {found!r}, base {self.id!r} has {expected!r}."
                    " Use it on the model it was trained for."
                )
        changed = 0
        for path, weight in self.weights(eraser.pairs):
            if tuple(weight.shape) != eraser.pairs[path].shape:
                raise EsdLoraError(
                    f"eraser of {eraser.names} changes {path} of shape {eraser.pairs[path].shape}, base {self.id!r} has"
                    f" {tuple(weight.shape)} there. Use it on the model it was trained for."
                )
            changed += header.base_hashes.get(path, "") != hash_weight(weight)
        if changed:
            warnings.warn(
                f"eraser of {eraser.names} was trained on other weights ({header.base!r}): {changed} of"
                f" {len(eraser.pairs)} layers differ in {self.id!r}. Measure what it erases here.",
                stacklevel=3,
            )
