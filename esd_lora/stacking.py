"""Stacking: several erasers as one file, exactly.

The sum of low-rank updates is a low-rank update of the summed rank: `up_a @ down_a + up_b @ down_b` is
`[up_a, up_b] @ [down_a; down_b]`. Adding the factors apart, as peft's `combination_type="linear"` and SPM's stacker do,
also adds the cross terms `up_a @ down_b` and is a different model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from esd_lora.eraser import Eraser, EraserHeader, LoraPair
from esd_lora.errors import EsdLoraError


def stack(erasers: Sequence[Eraser], weights: Sequence[float] | None = None) -> Eraser:
    """Stacks erasers by concatenation along the rank: `delta(stack(a, b)) == delta(a) + delta(b)`.

    Scopes, ranks and layers may differ between members.

    Args:
        erasers: One or more, of one family and prediction type.
        weights: Strength of each member, 1 by default; negative ones undo. They are folded into `up`.

    Raises:
        EsdLoraError: If there are no members, the number of weights differs, or members are of different kinds.
    """
    weights = [1.0] * len(erasers) if weights is None else list(weights)
    if not erasers or len(weights) != len(erasers):
        raise EsdLoraError(f"{len(erasers)} erasers and {len(weights)} weights: give at least one, and a weight for each.")
    first = erasers[0].header
    for other in erasers[1:]:
        for what in ("family", "prediction_type", "prefix"):
            mine, theirs = getattr(first, what), getattr(other.header, what)
            if mine != theirs:
                raise EsdLoraError(
                    f"cannot stack {erasers[0].names} with {other.names}: {what.replace('_', ' ')} {mine!r} and {theirs!r}."
                    " Stack erasers that were trained on the same model."
                )
        shared = first.base_hashes.keys() & other.header.base_hashes.keys()
        if any(first.base_hashes[module] != other.header.base_hashes[module] for module in shared):
            warnings.warn(
                f"{erasers[0].names} and {other.names} were trained on different weights ({first.base!r} and"
                f" {other.header.base!r}): measure what the stack erases before you rely on it.",
                stacklevel=2,
            )
    modules = dict.fromkeys(module for eraser in erasers for module in eraser.pairs)
    pairs = {module: _concatenated(module, erasers, weights) for module in modules}
    return Eraser(pairs, _header(erasers, weights))


def _concatenated(module: str, erasers: Sequence[Eraser], weights: Sequence[float]) -> LoraPair:
    members = [
        (eraser.pairs[module], weight) for eraser, weight in zip(erasers, weights, strict=True) if module in eraser.pairs
    ]
    shapes = {pair.shape for pair, _ in members}
    if len(shapes) > 1:
        raise EsdLoraError(f"layer {module} has shapes {sorted(shapes)} in different members: they are not of one model.")
    return LoraPair(
        torch.cat([pair.down for pair, _ in members], dim=0),
        torch.cat([pair.up * weight for pair, weight in members], dim=1),
    )


def _header(erasers: Sequence[Eraser], weights: Sequence[float]) -> EraserHeader:
    """The first member's header with everyone's concepts and recipes; nobody's measurements survive a stack."""
    headers = [eraser.header for eraser in erasers]
    if len(headers) == 1 and weights[0] == 1:
        return headers[0]

    def agreed(values: list[str]) -> str:
        return values[0] if len(set(values)) == 1 else "+".join(dict.fromkeys(values))

    return headers[0].model_copy(
        update={
            "concepts": tuple(
                concept.model_copy(update={"weight": concept.weight * weight})
                for header, weight in zip(headers, weights, strict=True)
                for concept in header.concepts
            ),
            "preserve": tuple(dict.fromkeys(prompt for header in headers for prompt in header.preserve)),
            "objective": agreed([header.objective for header in headers]),
            "scope": agreed([header.scope for header in headers]),
            "base_hashes": {module: digest for header in headers[::-1] for module, digest in header.base_hashes.items()},
            "recipes": tuple(recipe for header in headers for recipe in header.recipes),
            "created": max(header.created for header in headers),
            "cost": {},
            "evaluation": None,
        }
    )
