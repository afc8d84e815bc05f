# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The esd-lora authors
"""Strengths by part of the model, in the words of `esd-lora generate --eraser FILE:1,mid=0.5,up.1=0`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from .errors import EraserError


class Strength(NamedTuple):
    """How strongly an eraser is applied: everywhere, and by part of the model on top of that.

    Layer m has the strength `weight * blocks[the longest part that holds m]`, as in esd-lora.
    """

    weight: float = 1.0
    """1 as trained, 0 not at all, below 0 the concept is amplified instead; typically -1 to 2."""
    blocks: Mapping[str, float] = {}
    """Path of a part (`mid_block`, `up_blocks.1`; `mid`, `up.1` for short) to a factor, 1 for layers in none of them."""

    def at(self, module: str) -> float:
        """Return the strength at one layer.

        Args:
            module: Path of the layer in diffusers, such as `mid_block.attentions.0.transformer_blocks.0.attn2.to_k`.
        """
        fitting = [block for block in self.blocks if _inside(module, block)]
        factor = self.blocks[max(fitting, key=lambda block: len(_path(block)))] if fitting else 1.0
        return self.weight * factor

    def check(self, modules: Collection[str], what: str) -> None:
        """Refuse a part of the model in which no layer lies.

        Args:
            modules: Paths of the layers that a file changes.
            what: Name of the file, for the message.

        Raises:
            EraserError: With the parts there are.
        """
        for block in self.blocks:
            if not any(_inside(module, block) for module in modules):
                parts = sorted({".".join(module.split(".")[:2]) for module in modules})
                near = difflib.get_close_matches(_path(block), parts, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise EraserError(f"{what} has no layer in {block!r}.{hint} It has some in {', '.join(parts)}.")


def _path(block: str) -> str:
    """Return the module path of a part: `up.1` is `up_blocks.1`."""
    return re.sub(r"^(down|up)(?=\.|$)", r"\1_blocks", re.sub(r"^mid(?=\.|$)", "mid_block", block))


def _inside(module: str, block: str) -> bool:
    return f"{_path(module)}.".startswith(f"{_path(block)}.")


def parse_blocks(text: str) -> dict[str, float]:
    """Return the factors by part of the model that a text such as `mid=0.5, up.1=0` says; nothing for an empty one.

    Raises:
        EraserError: If a piece of it is no `BLOCK=FACTOR`, or a block stands there twice.
    """
    blocks: dict[str, float] = {}
    for piece in filter(None, (piece.strip() for piece in text.replace("\n", ",").split(","))):
        block, _, number = (part.strip() for part in piece.partition("="))
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not block or not math.isfinite(factor):
            raise EraserError(f"blocks {text!r}: {piece!r} is not BLOCK=FACTOR, such as mid=0.5,up.1=0.")
        if block in blocks:
            raise EraserError(f"blocks {text!r}: {block!r} stands there twice.")
        blocks[block] = factor
    return blocks
