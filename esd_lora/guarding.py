"""Guarding: prompts whose text no update touches, in the layers that read text.

Let Q be an orthonormal basis of all that a text encoder makes of the guarded prompts, padding too, and P = I - Q Q^T. With
down = A P every update leaves those rows r exactly as they are:

    dW r = up A P r = 0

That is a plain LoRA, and sums of such updates have it too. (SPEED, Li et al., arXiv:2503.07392, solves in the null space of
what is kept, up to what its threshold leaves; here it is all of a few prompts, in every step of a training as well.)

A guard costs room: every prompt takes as many directions of the text as it has rows, so it is for a few prompts that must not
change, beside the many that are kept as well as can be. Layers that do not read text are kept in place by training alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from esd_lora.adapter import ADAPTER, adapted_layers
from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import LoraPair
from esd_lora.errors import EsdLoraError
from esd_lora.text_rows import TEXT_TENSORS, rows_of
from esd_lora.trajectory import Encode, in_float64

_SMALLEST_LEFT = 1e-4  # of the text of an erased prompt, in units of its length, that something can be erased with
_SMALLEST = 1e-9  # singular value, in units of the largest, that is a direction and no rounding


class Guard:
    """The directions of the text that guarded prompts leave free.

    Args:
        base: Whose layers read the text.
        prompts: To leave exactly as they are; without any, all is free.
        encode: From prompts to their condition.
        erased: Prompts to erase, for which room must be left.

    Raises:
        EsdLoraError: If the text of an erased prompt lies in what guarded ones take.
    """

    def __init__(
        self,
        base: Base,
        prompts: Sequence[str],
        encode: Encode,
        erased: Sequence[str] = (),
    ):
        self.base, encode = base, base.as_read(encode)
        self._free: dict[str, Tensor] = {}
        for name in TEXT_TENSORS if prompts else ():
            if name in encode(prompts[:1]):
                rows = rows_of(encode, name)(prompts).flatten(0, 1)
                _, sizes, directions = torch.linalg.svd(rows, full_matrices=True)
                taken = int((sizes > _SMALLEST * sizes[0]).sum())
                self._free[name] = directions[taken:].T
                for prompt in erased:
                    text = rows_of(encode, name)([prompt])
                    if float((text @ self._free[name]).norm()) < _SMALLEST_LEFT * float(text.norm()):
                        raise EsdLoraError(
                            f"{len(prompts)} guarded prompts take {taken} of the {rows.shape[1]} directions of this text,"
                            f" and all that {prompt!r} has. Guard fewer, and put the others into preserve."
                        )

    def free(self, name: str) -> Tensor | None:
        """Return an orthonormal basis of the free directions of a text tensor, [width, free]; `None` where all are."""
        return self._free.get(name)

    def guarded(self, pairs: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
        """Return updates of which those of layers that read text leave the guarded prompts alone."""
        return {path: pair._replace(down=self._projected(path, pair.down)) for path, pair in pairs.items()}

    @torch.no_grad()
    def hold(self) -> None:
        """Have the adapter on the base leave the guarded prompts alone, whatever it was trained to."""
        for path, layer in adapted_layers(self.base) if self._free else ():
            down = layer.lora_A[ADAPTER].weight
            down.copy_(self._projected(path, down))

    def _projected(self, path: str, down: Tensor) -> Tensor:
        free = self.free(self.base.family.text_read_by(path) or "")
        if free is None:
            return down
        return (in_float64(down).to(free.device) @ free @ free.T).to(down.dtype).to(down.device)
