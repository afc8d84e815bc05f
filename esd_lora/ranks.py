"""Ranks: the processes that `torchrun` or `accelerate launch` starts to do one run together.

Every rank does the same with the same seeds, so all of them hold the same state. What costs is shared: rows of latents that go
through the denoiser, and batches of pictures. One of them, the main rank, writes and prints. In a process of its own every
function here gives back what it was given.

Ranks join each other in `bases.loading.choose_device`, through accelerate.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from esd_lora.errors import EsdLoraError, shortened

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=1)
"""Time that ranks wait for one that paints or measures; one that has ended is noticed at once."""
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_Rows = TypeVar("_Rows", bound="Sequence[Any] | Tensor")


def count() -> int:
    """Return the number of ranks, 1 in a process of its own."""
    launched = "LOCAL_RANK" in os.environ  # some clusters set the other variables for machines, not for processes
    return int(os.environ.get("WORLD_SIZE", "1")) if launched else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Return whether this rank is the one that writes and prints."""
    return rank() == 0


def share(rows: _Rows) -> _Rows:
    """Return this rank's share of a tensor's rows, or of a sequence: every `count()`-th, so none where there are fewer."""
    shared: Any = rows[rank() :: count()]
    return shared


def gather(shared: Tensor, total: int) -> Tensor:
    """Return the rows of which every rank has its `share`, in their order.

    Args:
        shared: This rank's, [N, ...].
        total: Number of rows in all.

    Raises:
        EsdLoraError: If another rank has ended.
    """
    if count() == 1:
        return shared
    import torch

    padded = shared.new_zeros(-(-total // count()), *shared.shape[1:])
    padded[: len(shared)] = shared
    parts = [torch.empty_like(padded) for _ in range(count())]
    with _connected() as distributed:
        distributed.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:total]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over the ranks, all of them in one message.

    Raises:
        EsdLoraError: If another rank has ended.
    """
    if count() > 1:
        with _connected() as distributed, _in_one(tensors) as values:
            distributed.all_reduce(values)


def copy_from_main(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by the main rank's, all of them in one message.

    Raises:
        EsdLoraError: If another rank has ended.
    """
    if count() > 1:
        with _connected() as distributed, _in_one(tensors) as values:
            distributed.broadcast(values, src=0)


@contextmanager
def _in_one(tensors: Sequence[Tensor]) -> Generator[Tensor]:
    """Yield the values of tensors one after the other, [values of all], and write them back at the end."""
    import torch

    values = torch.cat([tensor.detach().flatten() for tensor in tensors])
    yield values
    first = 0
    for tensor in tensors:
        tensor.detach().copy_(values[first : first + tensor.numel()].view_as(tensor))
        first += tensor.numel()


def from_main(make: Callable[[], _Value]) -> _Value:
    """Return what the main rank makes, on all ranks; the others only wait for it.

    Raises:
        EsdLoraError: If another rank has ended.
    """
    if count() == 1:
        return make()
    made: list[Any] = [make() if is_main() else None]
    with _connected() as distributed:
        distributed.broadcast_object_list(made, src=0, group=_messages())
    return made[0]


def merge(own: Mapping[_Key, _Value]) -> dict[_Key, _Value]:
    """Return what all ranks have by key; no two have the same.

    Raises:
        EsdLoraError: If another rank has ended.
    """
    if count() == 1:
        return dict(own)
    parts: list[Any] = [None] * count()
    with _connected() as distributed:
        distributed.all_gather_object(parts, dict(own), group=_messages())
    return {key: value for part in parts for key, value in part.items()}


def anywhere(condition: bool) -> bool:
    """Return whether a condition holds on any rank.

    Raises:
        EsdLoraError: If another rank has ended.
    """
    if count() == 1:
        return condition
    import torch

    flag = torch.tensor(int(condition))
    with _connected() as distributed:
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=_messages())
    return bool(flag)


@cache
def _messages() -> Any:
    """Return the group in which ranks exchange what is no tensor, without waiting for a GPU."""
    with _connected() as distributed:
        return distributed.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def _connected() -> Generator[Any]:
    """Yield `torch.distributed`, and turn the loss of a connection inside a `with` block into one sentence.

    Raises:
        EsdLoraError: With what can be known of it here.
    """
    import torch.distributed

    try:
        yield torch.distributed
    except RuntimeError as error:  # what torch's backends raise, whatever happened
        reason = re.sub(r"^\[\S+\] ", "", shortened(str(error))).split(". ")[0]  # without the line of C++
        raise EsdLoraError(
            f"another of the {count()} ranks has ended, so this one ends too ({reason}). The cause is what that rank said last;"
            " one that said nothing was killed, for lack of memory perhaps."
        ) from error
