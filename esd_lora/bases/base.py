"""A base model in memory: what the toolkit asks of it, whatever its family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esd_lora.erasers.eraser import Eraser, hash_weight
from esd_lora.erasers.fitting import check_kind, compare_weights
from esd_lora.errors import EsdLoraError
from esd_lora.families.family import ModelFamily
from esd_lora.trajectory import Condition, concatenate

_ENCODED_AT_ONCE = 16  # prompts; bounds memory, changes no result


@dataclass
class Base:
    """A loaded base model: the diffusers pipeline, its family, and where it came from."""

    pipe: Any
    family: ModelFamily
    id: str
    revision: str | None = None
    source: Path | None = None
    """Directory or file that the weights were read from."""
    keep: tuple[str, ...] = ()
    """The base's own keep list: prompts of things an eraser should leave alone."""
    steps: int = 30
    """Denoising steps of a picture, unless asked otherwise."""
    guidance: float = 7.5

    @property
    def model(self) -> Any:
        """The denoiser: a diffusers U-Net or transformer."""
        return getattr(self.pipe, self.family.denoiser)

    @property
    def prediction_type(self) -> str:
        """`epsilon`, `v_prediction` or `flow`."""
        return self.family.prediction_type(self.pipe)

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Channels, height and width of one image's latents.

        Args:
            size: Height and width in pixels, rounded to what the model takes; its native size unless given.
        """
        if size is None:
            side = self.family.side(self.pipe)
            return self.family.channels(self.pipe), side, side
        multiple = self.family.multiple
        height, width = (max(1, round(s / self.pipe.vae_scale_factor / multiple)) * multiple for s in size)
        return self.family.channels(self.pipe), height, width

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's prediction, as a `trajectory.Denoiser`: asked in the model's dtype, answered in float32 or better."""
        answer = self.family.predict(self.pipe, x_t.to(self.model.dtype), t, condition)
        return answer.to(torch.promote_types(answer.dtype, torch.float32))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], guidance: float = 1.0) -> Condition:
        """The condition of N prompts.

        Args:
            prompts: The empty one stands for the other side of classifier-free guidance.
            guidance: What a guidance-distilled model is told its scale is; others are told nothing.
        """
        parts = [
            self.family.encode(self.pipe, prompts[i : i + _ENCODED_AT_ONCE]) for i in range(0, len(prompts), _ENCODED_AT_ONCE)
        ]
        told = concatenate(*parts)
        dtype = self.model.dtype  # text encoders may have another
        condition = {name: value.to(dtype) if value.is_floating_point() else value for name, value in told.items()}
        if self.family.takes_guidance(self.pipe):
            condition["guidance"] = torch.full((len(prompts),), guidance, device=self.model.device)
        return condition

    def free_text_encoders(self) -> None:
        """Drops the text encoders, once everything that will be asked for is encoded."""
        for name in [name for name in self.pipe.components if name.startswith("text_encoder")]:
            setattr(self.pipe, name, None)

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
        check_kind(eraser, self.family.name, self.prediction_type, self.id)
        for path, weight in self.weights(eraser.pairs):
            if tuple(weight.shape) != eraser.pairs[path].shape:
                raise EsdLoraError(
                    f"eraser of {eraser.names} changes {path} of shape {eraser.pairs[path].shape}, base {self.id!r} has"
                    f" {tuple(weight.shape)} there. Use it on the model it was trained for."
                )
        compare_weights(eraser, self.hashes(eraser.pairs), self.id)

    def hashes(self, modules: Mapping[str, Any]) -> dict[str, str]:
        """Module path to `eraser.hash_weight` of the weight of every module that `modules` names.

        Loading in bfloat16 drops bits that the hash is of, so there the weights are looked up where they were read from.
        """
        if self.model.dtype == torch.bfloat16 and self.source is not None:
            from esd_lora.bases.stored import open_stored  # which has to know the families, and they this

            return {path: hash_weight(weight) for path, weight in open_stored(self.source).weights(modules)}
        return {path: hash_weight(weight) for path, weight in self.weights(modules)}
