"""Stopping a training and going on: the little that must survive a restart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from esd_lora.errors import EsdLoraError

CHECKPOINT_NAME = "checkpoint.pt"


@dataclass
class TrainState:
    """What must survive a restart. Everything random is drawn from the recipe's seed and the step, so no generator is."""

    step: int = 0
    """Optimiser steps done."""
    loss: float = float("nan")
    seconds: float = 0.0
    student_samples: int = 0
    evaluations_before: int = 0
    """Sample evaluations of earlier runs."""
    seconds_before: float = 0.0
    erasure: float | None = None
    """What the last erasure probe found."""
    best_erasure: float = float("-inf")
    stale_probes: int = 0
    """Probes since erasure last rose."""
    drawn_with: list[torch.Tensor] = field(default_factory=list)
    """The LoRA weights that walked the trajectories in the buffer."""
    tensors: dict[str, Any] = field(default_factory=dict)

    def advance(self, samples: int, loss: float, seconds: float) -> None:
        """Counts one step; `seconds` are those of this run."""
        self.step += 1
        self.loss = loss
        self.student_samples += samples
        self.seconds = self.seconds_before + seconds

    def restore(
        self, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """Puts saved LoRA weights, optimiser moments and loss scale in place, if there are any."""
        if not self.tensors:
            return
        _copy(self.tensors["parameters"], parameters)
        optimizer.load_state_dict(self.tensors["optimizer"])
        scaler.load_state_dict(self.tensors["scaler"])

    @contextmanager
    def as_drawn(self, parameters: list[torch.nn.Parameter], *, fresh: bool) -> Iterator[None]:
        """Within, the student is the one that walks the trajectories of this refresh.

        Args:
            parameters: Of the student.
            fresh: It is the one of this moment, to be remembered; else the remembered one, so that a training resumed
                between two refreshes trains on the trajectories it was trained on before.
        """
        now = [parameter.detach().clone() for parameter in parameters]
        if fresh:
            self.drawn_with = now
        _copy(self.drawn_with, parameters)
        yield
        _copy(now, parameters)

    @classmethod
    def load(cls, directory: Path, recipe: str) -> TrainState:
        """Reads the checkpoint of a run directory.

        Args:
            directory: Of the run.
            recipe: `dump_recipe` of the recipe to go on with; it must be the one the checkpoint was made with.

        Raises:
            EsdLoraError: If there is no checkpoint, it is damaged, or it belongs to another recipe.
        """
        file = directory / CHECKPOINT_NAME
        if not file.is_file():
            raise EsdLoraError(f"{directory} has no {CHECKPOINT_NAME} to resume from. Train without --resume.")
        try:
            saved = torch.load(file, weights_only=True, map_location="cpu")
            found = saved.pop("recipe")
            state = cls(**saved)
        except Exception as error:  # torch raises whatever its zip reader meets
            raise EsdLoraError(f"{file} is damaged ({type(error).__name__}). Train again with --force.") from error
        if found != recipe:
            raise EsdLoraError(f"{file} was made with another recipe. Give the same one, or train again with --force.")
        return state

    def save(
        self,
        directory: Path,
        recipe: str,
        parameters: list[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        evaluations: int,
    ) -> None:
        """Writes the run's checkpoint, whole or not at all; `evaluations` are the teacher's in this run."""
        content = {
            "step": self.step,
            "loss": self.loss,
            "seconds": self.seconds,
            "seconds_before": self.seconds,
            "student_samples": self.student_samples,
            "evaluations_before": self.evaluations_before + evaluations,
            "erasure": self.erasure,
            "best_erasure": self.best_erasure,
            "stale_probes": self.stale_probes,
            "drawn_with": [tensor.cpu() for tensor in self.drawn_with],
            "tensors": {
                "parameters": [p.detach().cpu() for p in parameters],
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
            },
            "recipe": recipe,
        }
        beside = directory / f".{CHECKPOINT_NAME}.partial"
        torch.save(content, beside)
        beside.replace(directory / CHECKPOINT_NAME)


@torch.no_grad()
def _copy(values: list[torch.Tensor], parameters: list[torch.nn.Parameter]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
