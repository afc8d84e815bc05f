"""Rows of text: what text encoders make of prompts, their second moments, and what the closed form does to them.

A prompt is as many rows as its text encoder reads tokens, padding too, for attention reads all of them. `TextMoments` holds
what the closed form needs to know of rows (`closed_form` has the equation), and `influence` says whom it would reach: the more
a prompt has in common with what is erased, in the directions in which that has to change, the further its rows move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.recipe import ClosedFormSpec
from esd_lora.trajectory import Encode, in_float64

TEXT_TENSORS = ("prompt_embeds", "pooled_prompt_embeds")
"""Tensors of a condition that layers read as they are."""
_AT_ONCE = 32  # prompts whose rows are in memory
_UNKEPT = ClosedFormSpec(keep=0.0, push=0.0, ridge=1e-3)  # an influence is that of erasing with nothing kept

Rows = Callable[[Sequence[str]], Tensor]
"""From N prompts to their rows, [N, rows, width], float64."""


def rows_of(encode: Encode, name: str) -> Rows:
    """Return the function from prompts to the rows of one tensor of their condition, [N, rows, width]; one row if pooled.

    Rows are on the CPU: in float64 those of T5 take gigabytes, and most cards compute in it no faster.
    """

    @torch.no_grad()
    def rows(prompts: Sequence[str]) -> Tensor:
        embeds = in_float64(encode(prompts)[name].cpu())
        return embeds if embeds.dim() == 3 else embeds[:, None]

    return rows


class TextMoments(NamedTuple):
    """Second moments of the text that one kind of layer reads."""

    erased: Tensor
    """`E[c c^T]`, [width, width], float64."""
    way: Tensor
    """`E[(a - c) c^T]`."""
    distance: float
    """`E|a - c|^2`; all of it with the push, where there is one."""
    kept: Tensor
    """`E[r r^T]`."""

    def solve(self, spec: ClosedFormSpec, free: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return D, and the Cholesky root of the matrix that is inverted for it, both of what is free: D may read no more.

        Args:
            spec: Weights of what is kept and of the ridge.
            free: Orthonormal basis of the directions that D may read, [width, free]; all of them unless given.
        """
        whole, way = self.erased + spec.keep * self.kept, self.way
        whole.diagonal().add_(spec.ridge * float(self.kept.diagonal().mean()))
        if free is not None:
            whole, way = free.T @ whole @ free, way @ free
        root = torch.linalg.cholesky(whole)
        return torch.cholesky_solve(way.T, root).T, root

    def left(self, change: Tensor) -> float:
        """Return what is left of the way from the erased rows to their anchors': `|D c - (a - c)| / |a - c|` of all."""
        square = (change @ self.erased * change).sum() - 2 * (change * self.way).sum() + self.distance
        return math.sqrt(max(float(square), 0.0) / max(self.distance, 1e-30))

    def moved(self, change: Tensor) -> float:
        """Return how far kept rows move, in units of their size: `|D r| / |r|` of all."""
        return math.sqrt(float((change @ self.kept * change).sum()) / max(float(self.kept.diagonal().sum()), 1e-30))


def second_moment(rows: Rows, prompts: Sequence[str]) -> Tensor:
    """Return `E[r r^T]` over all rows of prompts, [width, width].

    Args:
        rows: From N prompts to their rows.
        prompts: One or more.
    """
    squares, count = list[Tensor](), 0
    for first in range(0, len(prompts), _AT_ONCE):
        part = rows(prompts[first : first + _AT_ONCE]).flatten(0, 1)
        squares.append(part.T @ part)
        count += len(part)
    return torch.stack(squares).sum(0) / count


def way_moments(rows: Rows, pairs: Sequence[tuple[str, str]], kept: Tensor, beyond: Sequence[float] = ()) -> TextMoments:
    """Return the moments of pairs of an erased prompt and its anchor, beside that of what is kept.

    Args:
        rows: From N prompts to their rows.
        pairs: One or more.
        kept: `E[r r^T]`, [width, width].
        beyond: How far beyond its anchor each erased prompt is pushed; nowhere unless given.
    """
    erased, way, distance, count = torch.zeros_like(kept), torch.zeros_like(kept), 0.0, 0
    for first in range(0, len(pairs), _AT_ONCE):
        prompts, anchors = zip(*pairs[first : first + _AT_ONCE], strict=True)
        text = rows(prompts)
        further = torch.tensor(beyond[first : first + _AT_ONCE] or [0.0], device=text.device)[:, None, None]
        towards = ((1 + further) * (rows(anchors) - text)).flatten(0, 1)
        text = text.flatten(0, 1)
        erased += text.T @ text
        way += towards.T @ text
        distance += float(towards.square().sum())
        count += len(text)
    return TextMoments(erased / count, way / count, distance / count, kept)


def moved_by(rows: Rows, change: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return how far a linear change of the text moves the rows of each prompt, in units of their size, [N].

    Args:
        rows: From N prompts to their rows.
        change: D, [width, width].
        prompts: N of them.
    """
    moved: list[Tensor] = []
    for first in range(0, len(prompts), _AT_ONCE):
        r = rows(prompts[first : first + _AT_ONCE])
        moved.append((r @ change.T).square().sum((1, 2)) / r.square().sum((1, 2)).clamp_min(1e-30))
    return torch.cat(moved).sqrt() if moved else torch.zeros(0)


def influence(rows: Rows, pairs: Sequence[tuple[str, str]], prompts: Sequence[str]) -> Tensor:
    """Return how far erasing with nothing kept would move each prompt, in units of its size, [N].

    That is what a prompt stands to lose, so it says whom to preserve first. On the built-in base it tells the objects that an
    eraser hurts from the others, where nearness by cosine is no better than chance (`benchmarks/influence.py`). The idea is
    the prior filter of SPEED (Li et al., arXiv:2503.07392), there by the change of a layer's output.

    Args:
        rows: From N prompts to their rows.
        pairs: What is erased, each with its anchor; one or more.
        prompts: N of them.
    """
    text = rows([pairs[0][0]])[0]
    moments = way_moments(rows, pairs, torch.zeros_like(text.T @ text))
    return moved_by(rows, moments._replace(kept=moments.erased).solve(_UNKEPT)[0], prompts)
