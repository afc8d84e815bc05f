"""Optimisers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from esd_lora.errors import EsdLoraError
from esd_lora.registry import Registry

if TYPE_CHECKING:
    import torch


OptimizerClass: TypeAlias = "Callable[..., torch.optim.Optimizer]"

_OF_TORCH = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adafactor")
_EIGHT_BIT = {"adam8bit": "bitsandbytes.optim:Adam8bit", "adamw8bit": "bitsandbytes.optim:AdamW8bit"}
OPTIMIZERS: Registry[OptimizerClass] = Registry(
    "optimizer", {name.lower(): f"torch.optim:{name}" for name in _OF_TORCH} | _EIGHT_BIT
)


def make_optimizer(
    name: str, parameters: Sequence[torch.nn.Parameter], lr: float, arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Return an optimiser.

    Args:
        name: One of `OPTIMIZERS`, or `module:Class`.
        parameters: What it updates.
        lr: Of its first step.
        arguments: Further keywords of the class.

    Raises:
        EsdLoraError: If it is unknown, its package is not installed, or it does not take the arguments.
    """
    try:
        make = OPTIMIZERS.get(name)
    except ModuleNotFoundError as error:
        raise EsdLoraError(f"optimizer {name!r} needs {error.name}. Run: pip install 'esd-lora[8bit]'.") from error
    try:
        return make(parameters, lr=lr, **arguments)
    except (TypeError, ValueError) as error:
        raise EsdLoraError(f"optimizer {name!r} does not take {dict(arguments)}: {error}.") from error
