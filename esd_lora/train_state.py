"""What must survive a restart: the student's weights, the optimiser's moments, the loss scale and the counters.

Everything random is drawn from the recipe's seed and the step (`seeds`), so no generator has to.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esd_lora.erasers.eraser import CHECKPOINT_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.files import write_atomically
from esd_lora.ranks import add_up, count

_COUNTERS = ("step", "seconds", "student_samples", "erasure", "best_erasure", "stale_probes", "stopped")
_MEASURED = ("lr", "etas", "preserve_weights", "cooling", "readings", "measured", "anchored")


@dataclass
class TrainState:
    """A training at one moment.

    Args:
        parameters: The student's LoRA weights, float32 or better.
        optimizer: Updates them.
        scaler: Scales the loss where the base computes in float16.
    """

    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    """Number of optimiser steps done."""
    unread: dict[int, Tensor] = field(default_factory=dict)
    """Steps to their losses that the device may still be at work on."""
    losses: dict[int, float] = field(default_factory=dict)
    """Steps of this run to the losses that were read."""
    student_samples: int = 0
    """Number of latents that went through the student with gradients."""
    erasure: float | None = None
    """Result of the last erasure probe: 0 untouched, 1 on target."""
    best_erasure: float = float("-inf")
    stale_probes: int = 0
    """Number of probes since erasure last rose."""
    stopped: bool = False
    """Whether a watcher ended the training before its last step."""
    lr: float = 0.0
    """Learning rate, before the schedule."""
    etas: list[tuple[int, float]] = field(default_factory=list)
    """Steps from which on an eta holds, with that eta; the last is the present one."""
    preserve_weights: list[tuple[int, float]] = field(default_factory=list)
    """The same of the weight of preserved points."""
    cooling: int = 0
    """Step after which the rate began to fall, in a training that measures how many steps it takes; 0 before."""
    readings: list[dict[str, float]] = field(default_factory=list)
    """What the probe read, the latest last."""
    measured: int = 0
    """Number of latents through the denoiser to measure before the first step."""
    anchored: bool = False
    """Whether something else replaces the concept in every lesson (`Lesson.replaces`), at which the student should arrive."""
    walks: list[float] = field(default_factory=list)
    """Seconds that each walk of trajectories took in this run."""
    walker: list[Tensor] = field(default_factory=list)
    """The LoRA weights that walked the trajectories in the buffer."""
    seconds: float = 0.0
    """Time that training took so far, earlier runs included."""
    started: float = field(default_factory=lambda: time.monotonic())
    """Moment from which time counts, on the monotonic clock."""

    @property
    def eta(self) -> float:
        """The present strength of the push."""
        return self.etas[-1][1]

    @property
    def preserve_weight(self) -> float:
        """The present weight of preserved points."""
        return self.preserve_weights[-1][1]

    def read_losses(self) -> dict[int, float]:
        """Return the losses of all steps of this run; waits for the device."""
        if self.unread:
            self.losses |= zip(self.unread, torch.stack(list(self.unread.values())).tolist(), strict=True)
            self.unread.clear()
        return self.losses

    @property
    def loss(self) -> float:
        """Loss of the last step; waits for the device."""
        return self.read_losses().get(self.step, float("nan"))

    def update(self, loss: Tensor, samples: int, lr: float) -> None:
        """Take one optimiser step on the gradients at hand, those of all ranks together.

        Args:
            loss: Of this step, a scalar; this rank's part of it.
            samples: Number of latents that went through the student, on all ranks.
            lr: Learning rate of this step.
        """
        if count() > 1:
            self.scaler.scale(loss)  # which begins its work, in a rank that had nothing to predict as well
            add_up([loss, *(self._gradient(parameter) for parameter in self.parameters)])
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.unread[self.step] = loss
        self.student_samples += samples
        self.count_time()

    @staticmethod
    def _gradient(parameter: torch.nn.Parameter) -> Tensor:
        """Return the gradient of a parameter, zeros where a rank has none."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def count_time(self) -> None:
        """Set how much time the training took so far."""
        self.seconds = time.monotonic() - self.started

    @contextmanager
    def walking(self, *, fresh: bool) -> Iterator[None]:
        """Have the student be the one that walks the trajectories of this refresh, for the length of a `with` block.

        Args:
            fresh: Whether it is the student of this moment, to be remembered; else it is the remembered one, so that a
                training resumed between two refreshes trains on the trajectories it was trained on before.
        """
        now = [parameter.detach().clone() for parameter in self.parameters]
        if fresh:
            self.walker = now
        _copy(self.walker, self.parameters)
        started = time.monotonic()
        try:
            yield
        finally:
            _copy(now, self.parameters)
            self.walks.append(time.monotonic() - started)

    def save(self, directory: Path, recipe: str, evaluations: int) -> None:
        """Write the run's checkpoint, whole or not at all.

        Args:
            directory: Of the run.
            recipe: `dump_recipe` of its recipe.
            evaluations: Number of latents that went through the denoiser without gradients, earlier runs included.

        Raises:
            EsdLoraError: If the system does not let it.
        """
        content = {
            **{name: getattr(self, name) for name in (*_COUNTERS, *_MEASURED)},
            "loss": self.loss,
            "evaluations_before": evaluations,
            "drawn_with": [tensor.cpu() for tensor in self.walker],
            "tensors": {
                "parameters": [parameter.detach().cpu() for parameter in self.parameters],
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
            "recipe": recipe,
        }
        file = io.BytesIO()
        torch.save(content, file)
        write_atomically(directory / CHECKPOINT_NAME, file.getvalue())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        content = checkpoint.content
        _copy(content["tensors"]["parameters"], self.parameters)
        self.optimizer.load_state_dict(content["tensors"]["optimizer"])
        self.scaler.load_state_dict(content["tensors"]["scaler"])
        self.walker = content["drawn_with"]
        for name in (*_COUNTERS, *_MEASURED):
            setattr(self, name, content[name])
        self.losses = {self.step: content["loss"]}
        self.started = time.monotonic() - self.seconds


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read from its file."""

    content: dict[str, Any]

    @property
    def evaluations(self) -> int:
        """Number of latents that went through the denoiser without gradients so far."""
        return self.content["evaluations_before"]

    @classmethod
    def read(cls, directory: Path, recipe: str) -> Checkpoint:
        """Read the checkpoint of a run directory.

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
            content = torch.load(file, weights_only=True, map_location="cpu")
            made_with = [
                content[key]
                for key in ("tensors", "drawn_with", "evaluations_before", "loss", *_COUNTERS, *_MEASURED, "recipe")
            ][-1]
        except Exception as error:  # torch raises whatever its zip reader meets
            raise EsdLoraError(f"{file} is damaged ({type(error).__name__}). Train again with --force.") from error
        if made_with != recipe:
            raise EsdLoraError(f"{file} was made with another recipe. Give the same one, or train again with --force.")
        return cls(content)


def how_to_go_on(directory: Path, recipe: str) -> str:
    """Return what to do after a training was interrupted.

    Args:
        directory: Of the run.
        recipe: `dump_recipe` of its recipe.
    """
    try:
        Checkpoint.read(directory, recipe)
    except EsdLoraError:
        return "interrupted before its first step; nothing is lost, and the same command begins again."
    return f"interrupted; go on with the same command and --resume (checkpoint in {directory})."


@torch.no_grad()
def _copy(values: Sequence[Tensor], parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
