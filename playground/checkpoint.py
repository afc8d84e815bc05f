"""What a stage needs to go on after a stop: one file, replaced whole."""

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
