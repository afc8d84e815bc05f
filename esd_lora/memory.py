"""How much memory some work with tensors takes, counted as they come and go: on the meta device, without taking any.

Tensors on the meta device have shapes and lifetimes and no values, so a forward and a backward pass there, recomputed
activations included, make and drop what they would anywhere else. What kernels take inside (workspaces) and what an allocator
loses between blocks is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@contextmanager
def counting() -> Generator[LiveBytes]:
    """Count the bytes of tensors that are made within a `with` block.

    Attention counts as fused kernels do it, which every device has; the meta device would make the whole matrix of scores.
    """
    # Exchanged where models look it up: a mode for functions is not asked when activations are recomputed.
    functional: Any = torch.nn.functional
    attend, fused = functional.scaled_dot_product_attention, cast(Any, _Attention).apply

    def attend_fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return fused(query, key, value) if query.is_meta else attend(query, key, value, *args, **kwargs)

    functional.scaled_dot_product_attention = attend_fused
    try:
        with LiveBytes() as count:
            yield count
    finally:
        functional.scaled_dot_product_attention = attend


class LiveBytes(TorchDispatchMode):
    """Counts the storages of tensors that are made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.live = 0
        """Bytes that are there now."""
        self.peak = 0
        """The most that were there at a time."""
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # What an operation returns may be what it was given, or a view of that: those storages were there before.
        given = {_address(value) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_iter(result):
            if isinstance(value, Tensor) and _address(value) not in given:
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        if address not in self._known:
            self._known.add(address)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, address, storage.nbytes())

    def _remove(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def _address(tensor: Tensor) -> int:
    """Return what tells a storage from others while it is there; those of the meta device have no data pointer."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata


class _Attention(torch.autograd.Function):
    """Attention without values: what it makes, keeps and returns has the right size."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
