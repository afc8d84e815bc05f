"""Stacking several erasers into one file, exactly, and compressing one to lower ranks.

The sum of low-rank updates is a low-rank update of the summed rank: `up_a @ down_a + up_b @ down_b` is
`[up_a, up_b] @ [down_a; down_b]`. Adding the factors apart, as peft's `combination_type="linear"` and SPM's stacker do,
also adds the cross terms `up_a @ down_b` and is a different model.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.header import FORMAT, EraserHeader
from esd_lora.errors import EsdLoraError, did_you_mean


class Strength(NamedTuple):
    """How strongly an eraser is applied: everywhere, and by part of the model on top of that.

    The update of layer m becomes `at(m) * up_m @ down_m`, with `at(m) = weight * blocks[the longest part that holds m]`.
    """

    weight: float = 1.0
    """1 as trained, 0 not at all, below 0 the concept is amplified instead; typically -1 to 2."""
    blocks: Mapping[str, float] = {}
    """Path of a part (`mid_block`, `up_blocks.1`; `mid`, `up.1` for short) to a factor, 1 for layers in none of them."""

    def at(self, module: str) -> float:
        """Return the strength at one layer: `weight * factor(m)`.

        Args:
            module: Path of the layer, such as `mid_block.attentions.0.transformer_blocks.0.attn2.to_k`.
        """
        return self.weight * self._factor(module)

    def _factor(self, module: str) -> float:
        fitting = [block for block in self.blocks if _inside(module, block)]
        return self.blocks[max(fitting, key=lambda block: len(_path(block)))] if fitting else 1.0

    def after(self, first: Strength) -> Strength:
        """Return the strength that applies `first` and then this one: `result.at(m) == first.at(m) * self.at(m)`."""
        blocks = dict.fromkeys(_path(block) for block in (*first.blocks, *self.blocks))
        return Strength(first.weight * self.weight, {b: first._factor(b) * self._factor(b) for b in blocks})


IDENTITY = Strength()
"""As trained."""


def _path(block: str) -> str:
    """Return the module path of a part: `up.1` is `up_blocks.1`, as in diffusers' own weights by block."""
    return re.sub(r"^(down|up)(?=\.|$)", r"\1_blocks", re.sub(r"^mid(?=\.|$)", "mid_block", block))


def _inside(module: str, block: str) -> bool:
    """Return whether a layer lies in a part of the model, or is it."""
    return f"{_path(module)}.".startswith(f"{_path(block)}.")


def strengths_of(erasers: Sequence[Eraser], weights: Sequence[float | Strength] | None) -> list[Strength]:
    """Return every eraser's strength: a number stands for that weight everywhere, `None` for 1 for all of them.

    Args:
        erasers: The erasers.
        weights: One strength or number for each, or `None`.

    Raises:
        EsdLoraError: If the number of weights differs.
    """
    given = [1.0] * len(erasers) if weights is None else weights
    if len(given) != len(erasers):
        raise EsdLoraError(f"{len(given)} weights and {len(erasers) or 'no'} erasers: give a weight for each eraser.")
    return [weight if isinstance(weight, Strength) else Strength(weight) for weight in given]


def stack(erasers: Sequence[Eraser], weights: Sequence[float | Strength] | None = None) -> Eraser:
    """Stack erasers by concatenation along the rank, which is exact: `delta(stack(a, b)) == delta(a) + delta(b)`.

    With strengths s, layer m of the stack is `[s_1(m) up_1, s_2(m) up_2, ...] @ [down_1; down_2; ...]`. Scopes, ranks and
    layers may differ between members.

    Args:
        erasers: One or more, of one family and prediction type.
        weights: Strength of each member, 1 by default; negative ones undo. They are folded into `up`, in float32 where half
            precision would round: see `LoraPair.scaled`.

    Raises:
        EsdLoraError: If there are no members, the number of weights differs, members are of different kinds, or a strength
            names a part of the model in which its eraser has no layer, or makes NaN or infinity of a layer.
    """
    strengths = strengths_of(erasers, weights)
    check_members(erasers, strengths)
    pairs = {module: stack_layer(module, erasers, strengths) for module in modules_of(erasers)}
    return Eraser(pairs, stack_headers([eraser.header for eraser in erasers], strengths))


def modules_of(erasers: Sequence[Eraser]) -> list[str]:
    """Return the layers that any of some erasers changes."""
    return list(dict.fromkeys(module for eraser in erasers for module in eraser.pairs))


def outline(erasers: Sequence[Eraser]) -> Eraser:
    """Return what a stack's layers and header are, each layer with the factors of the first member that has it.

    Members may lie on disk: none of their numbers is read.

    Args:
        erasers: As for `stack`.

    Raises:
        EsdLoraError: As `stack` does.
    """
    strengths = [IDENTITY] * len(erasers)
    check_members(erasers, strengths)
    pairs: dict[str, LoraPair] = {}
    for eraser in erasers:
        for module, pair in eraser.pairs.items():
            _check_shapes(module, {pair.shape, pairs.setdefault(module, pair).shape})
    return Eraser(pairs, stack_headers([eraser.header for eraser in erasers], strengths))


def check_members(erasers: Sequence[Eraser], strengths: Sequence[Strength]) -> None:
    """Refuse members that do not stack, as `stack` does; warn where they were trained on different weights.

    Args:
        erasers: The members.
        strengths: One for each.

    Raises:
        EsdLoraError: If there are none, they are of different kinds, or a strength names a part of the model in which its
            eraser has no layer.
    """
    if not erasers:
        raise EsdLoraError("no erasers: a stack has at least one.")
    for eraser, strength in zip(erasers, strengths, strict=True):
        for block in strength.blocks:
            if not any(_inside(module, block) for module in eraser.pairs):
                parts = sorted({".".join(module.split(".")[:2]) for module in eraser.pairs})
                raise EsdLoraError(
                    f"eraser of {eraser.names} has no layer in {block!r}{did_you_mean(_path(block), parts)}. It has some in"
                    f" {', '.join(parts)}."
                )
    for other in erasers[1:]:
        _check_alike(erasers[0], other)


def _check_alike(first: Eraser, second: Eraser) -> None:
    """Refuse members of different kinds; warn when they were trained on different weights."""
    a, b = first.header, second.header
    for field in ("family", "prediction_type", "prefix"):
        values = getattr(a, field), getattr(b, field)
        if values[0] != values[1] and None not in values:
            raise EsdLoraError(
                f"cannot stack {first.names} with {second.names}: {field.replace('_', ' ')} {values[0]!r} and {values[1]!r}."
                " Stack erasers that were trained on the same model."
            )
    if any(a.base_hashes[module] != b.base_hashes[module] for module in a.base_hashes.keys() & b.base_hashes.keys()):
        warnings.warn(
            f"{first.names} and {second.names} were trained on different weights ({a.base!r} and {b.base!r}): measure what the"
            " stack erases before you rely on it, or train one of them again on the other's base.",
            stacklevel=4,
        )


def stack_layer(module: str, erasers: Sequence[Eraser], strengths: Sequence[Strength] | None = None) -> LoraPair:
    """Return one layer of a stack: the factors of all members that have it, side by side.

    Args:
        module: Path of the layer.
        erasers: The members.
        strengths: One for each, 1 by default.

    Raises:
        EsdLoraError: If members have other shapes there, or a strength makes NaN or infinity of it.
    """
    strengths = strengths or [IDENTITY] * len(erasers)
    members = [(e.pairs[module], s.at(module)) for e, s in zip(erasers, strengths, strict=True) if module in e.pairs]
    _check_shapes(module, {pair.shape for pair, _ in members})
    pairs = [pair.scaled(weight, f"layer {module}") for pair, weight in members]
    return LoraPair(torch.cat([pair.down for pair in pairs], dim=0), torch.cat([pair.up for pair in pairs], dim=1))


def _check_shapes(module: str, shapes: Collection[tuple[int, ...]]) -> None:
    if len(shapes) > 1:
        raise EsdLoraError(f"layer {module} has shapes {sorted(shapes)} in different members: they are not of one model.")


def stack_headers(headers: Sequence[EraserHeader], strengths: Sequence[Strength]) -> EraserHeader:
    """Return the first member's header with the concepts and recipes of all; no measured number survives a stack.

    Args:
        headers: The members'.
        strengths: One for each.
    """
    if len(headers) == 1 and strengths[0] == IDENTITY:
        return headers[0]
    return headers[0].model_copy(
        update={
            "format": FORMAT,
            "concepts": tuple(
                concept.model_copy(update=strength.after(Strength(concept.weight, concept.blocks))._asdict())
                for header, strength in zip(headers, strengths, strict=True)
                for concept in header.concepts
            ),
            "preserve": tuple(dict.fromkeys(prompt for header in headers for prompt in header.preserve)),
            "guard": tuple(prompt for prompt in headers[0].guard if all(prompt in header.guard for header in headers)),
            "prediction_type": next((h.prediction_type for h in headers if h.prediction_type), None),
            "objective": "+".join(dict.fromkeys(header.objective for header in headers)),
            "scope": "+".join(dict.fromkeys(header.scope for header in headers)),
            "base_hashes": {module: digest for header in headers[::-1] for module, digest in header.base_hashes.items()},
            "recipes": tuple(recipe for header in headers for recipe in header.recipes),
            "created": max(header.created for header in headers),
            "cost": {},
            "evaluation": None,
            "origins": tuple(origin for header in headers for origin in header.origins),
            "solved": tuple(solved for header in headers for solved in header.solved),
            "calibrations": tuple(calibration for header in headers for calibration in header.calibrations),
            "fusions": tuple(fusion for header in headers for fusion in header.fusions),
            "distillations": tuple(spent for header in headers for spent in header.distillations),
            "truncation": max(header.truncation for header in headers),
        }
    )


class Compressed(NamedTuple):
    """A compressed eraser and what that cost."""

    eraser: Eraser
    errors: dict[str, float]
    """Layer to the norm of what was cut off, relative to the norm of the layer's update."""
    overall: float
    """Norm of what was cut off over all layers together, relative to the norm of the whole update."""


def compress(eraser: Eraser, *, rank: int | None = None, energy: float | None = None) -> Compressed:
    """Lower the ranks of an eraser, cutting as little as possible off every layer's update (Eckart and Young, 1936).

    `up = Q_u R_u` and `down^T = Q_d R_d`, so the singular values of `up @ down` are those of the small `R_u R_d^T`: the
    update itself is never multiplied out.

    Args:
        eraser: Typically a stack.
        rank: Highest rank of a layer; 4 to 32 is usual.
        energy: Share of every layer's squared norm to keep, up to 1; .99 to .999 is usual. Each layer gets the lowest rank
            that does.

    Raises:
        EsdLoraError: If neither is given, or one is out of range.
    """
    if rank is None and energy is None:
        raise EsdLoraError("compressing needs a rank or a share of energy to keep: give one.")
    check_cut(rank, energy)
    pairs: dict[str, LoraPair] = {}
    cut: dict[str, tuple[float, float]] = {}
    for module, pair in eraser.pairs.items():
        pairs[module], cut[module] = truncated(pair, rank, energy)
    overall = _relative_norm(cut.values())
    header = eraser.header.model_copy(update={"truncation": eraser.header.truncation + overall, "evaluation": None})
    return Compressed(Eraser(pairs, header), {module: _relative_norm([squares]) for module, squares in cut.items()}, overall)


def check_cut(rank: int | None, energy: float | None) -> None:
    """Refuse a rank or a share of energy that cannot be.

    Raises:
        EsdLoraError: With what was expected.
    """
    if rank is not None and rank < 1:
        raise EsdLoraError(f"rank {rank}: expected 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise EsdLoraError(f"energy {energy:g}: expected a share above 0 and up to 1, such as 0.999.")


def _relative_norm(cut: Iterable[tuple[float, float]]) -> float:
    """Return `||cut off|| / ||whole||` from the squared norms of both, layer by layer."""
    lost, whole = (sum(values) for values in zip(*cut, strict=True))
    return (lost / whole) ** 0.5 if whole else 0.0


def truncated(pair: LoraPair, rank: int | None, energy: float | None) -> tuple[LoraPair, tuple[float, float]]:
    """Return a pair at a lower rank, as `compress` chooses it, and the squared norms of what was cut off and of the whole.

    Args:
        pair: Factors of any rank r.
        rank: Highest rank of the result.
        energy: Share of the squared norm to keep, 0 to 1.
    """
    precise = torch.promote_types(pair.up.dtype, torch.float32)
    linalg = cast("Any", torch.linalg)  # torch ships no types for it
    q_up, r_up = cast("tuple[Tensor, Tensor]", linalg.qr(pair.up.flatten(1).to(precise)))
    q_down, r_down = cast("tuple[Tensor, Tensor]", linalg.qr(pair.down.flatten(1).to(precise).T))
    core = r_up.double() @ r_down.double().T
    u, s, v = cast("tuple[Tensor, Tensor, Tensor]", linalg.svd(core, full_matrices=False))
    squares = s.square()
    whole = float(squares.sum())
    rank = kept_rank(squares, rank, energy)
    root = s[:rank].sqrt()
    up = (q_up.double() @ (u[:, :rank] * root)).to(pair.up.dtype)
    down = ((root[:, None] * v[:rank]) @ q_down.double().T).to(pair.down.dtype)
    shaped = LoraPair(down.reshape(rank, *pair.down.shape[1:]), up.reshape(-1, rank, *pair.up.shape[2:]))
    return shaped, (float(squares[rank:].sum()), whole)


def kept_rank(squares: Tensor, rank: int | None, energy: float | None, *, rounding: float = 0.0) -> int:
    """Return the lowest rank that keeps a share of the squared norm, or the highest allowed if that is lower.

    Args:
        squares: [r] Squared singular values, the largest first.
        rank: Highest rank.
        energy: Share of their sum to keep, above 0 and up to 1.
        rounding: Share of the sum that is rounding error in `squares`: eigenvalues of a Gram matrix have some, for which an
            energy of 1 would keep every rank.
    """
    result = len(squares) if rank is None else min(rank, len(squares))
    if energy is not None:
        # What is cut off behind each rank, summed from the small end: there it is exact.
        behind = squares.flip(0).cumsum(0).flip(0)
        result = min(result, max(1, int((behind > (1 - energy * (1 - rounding)) * float(squares.sum())).sum())))
    return result
