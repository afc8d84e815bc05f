"""Erasers made by hand: any layers, any ranks, no training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.header import ErasedConcept, EraserHeader
from tiny import tiny_recipe

SHAPES = {
    "mid.attn2.to_k": (4, 3),
    "mid.attn2.to_v": (2, 5),
    "conv": (3, 2, 3, 3),
    "shortcut": (2, 3, 1, 1),
}
"""Weight shapes of an imagined model: linears and convolutions."""


def build_header(*names: str, **changes: object) -> EraserHeader:
    recipe = tiny_recipe("owner/model", concepts=names or ("a cat",))
    fields: dict[str, object] = {
        "family": "sd",
        "prefix": "unet",
        "prediction_type": "epsilon",
        "base": recipe.base,
        "base_hashes": {},
        "concepts": tuple(ErasedConcept(name=c.name, pairs=tuple(c.pairs()), eta=recipe.eta) for c in recipe.concepts),
        "objective": recipe.objective,
        "scope": recipe.scope,
        "recipes": (recipe,),
        "versions": {"torch": "2.13.0"},
        "created": "2026-01-02T03:04:05+00:00",
    }
    return EraserHeader(**{**fields, **changes})


def random_pair(shape: tuple[int, ...], rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> LoraPair:
    out, *rest = shape
    down = torch.randn(rank, *rest, generator=generator, dtype=torch.float64)
    up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator, dtype=torch.float64)
    return LoraPair(down.to(dtype), up.to(dtype))


def random_eraser(ranks: Mapping[str, int], *names: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Eraser:
    """Random updates of the given rank on layers of `SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {module: random_pair(SHAPES[module], rank, generator, dtype) for module, rank in ranks.items()}
    return Eraser(pairs, build_header(*names))


def eraser_on(
    model: torch.nn.Module, modules: Iterable[str], *names: str, seed: int = 0, rank: int | None = None, **header: object
) -> Eraser:
    """Random float32 updates on layers of a real model; ranks 1, 2, 3 in turn unless given."""
    layers, generator = dict(model.named_modules()), torch.Generator().manual_seed(seed)
    shapes = {module: tuple(layers[module].weight.shape) for module in modules}
    pairs = {
        module: random_pair(shape, rank or 1 + i % 3, generator, torch.float32)
        for i, (module, shape) in enumerate(shapes.items())
    }
    return Eraser(pairs, build_header(*names, **header))
