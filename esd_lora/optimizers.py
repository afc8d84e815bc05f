"""Optimisers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from esd_lora.errors import EsdLoraError, how_to_install
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
    name: str,
    parameters: Sequence[torch.nn.Parameter],
    lr: float,
    arguments: Mapping[str, Any],
    allow_code: Collection[str] = (),
) -> torch.optim.Optimizer:
    """Return an optimiser.

    Args:
        name: One of `OPTIMIZERS`, or `module:Class`.
        parameters: What it updates.
        lr: Of its first step.
        arguments: Further keywords of the class.
        allow_code: Every `module:Class` that may be imported.

    Raises:
        EsdLoraError: If it is unknown or not allowed, its package is not installed, it does not take the arguments, or it is no
            optimiser that steps on gradients alone.
    """
    try:
        make = OPTIMIZERS.get(name, allow_code)
    except ModuleNotFoundError as error:
        raise EsdLoraError(
            f"optimizer {name!r} needs {error.name}, which is not installed: {how_to_install('8bit')}."
        ) from error
    try:
        made = make(parameters, lr=lr, **arguments)
    except (TypeError, ValueError) as error:
        raise EsdLoraError(f"optimizer {name!r} does not take {dict(arguments)}: {error}.") from error
    if not all(hasattr(made, part) for part in ("param_groups", "zero_grad", "step", "state_dict", "load_state_dict")):
        raise EsdLoraError(f"optimizer {name!r} makes a {type(made).__name__}, expected a torch.optim.Optimizer.")
    try:
        inspect.signature(made.step).bind()
    except TypeError as error:
        raise EsdLoraError(
            f"optimizer {name!r} computes the loss again within a step ({error}), which a training here does not do. Choose"
            " another, such as adam."
        ) from error
    return made
