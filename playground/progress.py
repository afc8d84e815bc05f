"""How a stage gets on: learning rate, moving average, and the file it goes on from after a stop, replaced whole."""

import math
from pathlib import Path
from typing import Any

import torch


def save(path: Path, **state: Any) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True) if path.exists() else None


class Ema:
    """Exponential moving average of a module's parameters, with the usual warm-up `(1 + n) / (10 + n)`."""

    def __init__(self, modules: list[torch.nn.Module], decay: float):
        self.live = [p for m in modules for p in m.parameters()]
        self.mean = [p.detach().clone() for p in self.live]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def copy_to_live(self) -> None:
        torch._foreach_copy_(self.live, self.mean)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        torch._foreach_copy_(self.mean, state["mean"])


class Progress:
    """What a stage has reached, with the file that holds it.

    Args:
        path: The checkpoint.
        modules: What is trained, by the name it has in the file.
        optimizer: Of their parameters; its learning rate is set by `set_rate`.
        ema: Of their parameters.
    """

    def __init__(self, path: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, ema: Ema):
        self.path, self.modules, self.optimizer, self.ema = path, modules, optimizer, ema
        self.peak: float = optimizer.param_groups[0]["lr"]

    def restore(self) -> int:
        """The step to go on from: 0 without a checkpoint."""
        state = load(self.path)
        if state is None:
            return 0
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        return state["step"]

    def save(self, step: int) -> None:
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        save(self.path, **modules, optimizer=self.optimizer.state_dict(), ema=self.ema.state_dict(), step=step)

    def set_rate(self, step: int, steps: int, warmup: int) -> None:
        """Sets the learning rate: a linear warm-up to the optimiser's own, then a cosine down to a hundredth of it."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        self.optimizer.param_groups[0]["lr"] = self.peak * min(1, (step + 1) / warmup) * (0.01 + 0.99 * cosine)
