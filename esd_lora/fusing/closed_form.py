"""Fusing a stack: one update that does what each member does on that member's prompts, and nothing on the others.

Adding updates adds their damage: what an eraser does to prompts that are not its own is small, and N times as much in a
stack of N. For one linear layer the best compromise has a closed form. Let `dW_i` be the members' updates,
`G_i = mean x x^T` the second moment of what the layer reads under member i's prompts, and `G_keep` the same under prompts to
keep. The update that minimises

    sum_i tr((dW - dW_i) G_i (dW - dW_i)^T)  +  lam N tr(dW G_keep dW^T)

is

    dW = sum_i dW_i G_i M,    M = (sum_j G_j + lam N G_keep)^-1

and as `dW_i = up_i @ down_i`, it is still the stack, with `down_i G_i M` in the place of `down_i`. UCE (Gandikota et al., WACV
2024, arXiv:2308.14761) and MACE (Lu et al., CVPR 2024, arXiv:2403.06135) solve it for keys and values of cross-attention; here
it is solved for every layer an eraser may change, from what the layers read on short trajectories of the base.

All of `G_i` and `G_keep` that is needed are sums, so a stack whose sums are kept can have one member more or less for what that
member takes alone (`growing`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.header import Fusion
from esd_lora.erasers.stacking import Strength, check_cut, outline, stack_layer, truncated
from esd_lora.fuse_specs import FuseSpec
from esd_lora.fusing.moments import MomentCollector
from esd_lora.fusing.prompts import Members, gather_members
from esd_lora.fusing.reading import LayerProblem, read_problems
from esd_lora.fusing.states import FusionState, writing_state
from esd_lora.guarding import Guard
from esd_lora.recipe_files import load_fuse_spec
from esd_lora.trajectory import in_float64

_RIDGE = 1e-3
"""Ridge on members' second moments, in units of the mean square of an input: only numbers need it."""
_DIGITS = 6
"""Digits of the objective in a header."""
WIDEST = 12_000
"""Inputs of the widest layer that is fused: its sums take 2.3 GB, and as much again while they are solved."""


def fuse(
    erasers: Sequence[Eraser],
    base: Base,
    *,
    weights: Sequence[float | Strength] | None = None,
    keep: Sequence[str] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    state: str | Path | None = None,
    spec: FuseSpec | str | Path = "fuse",
    progress: bool = True,
    **fields: Any,
) -> Eraser:
    """Fuse erasers into one that erases what they all do and draws the rest.

    The closed form above, layer by layer, for linears and convolutions (which read unfolded patches). `G_keep` has `mu` times
    the mean square of the layer's inputs on its diagonal, so that what stands in no list is kept too; one member with `lam` 0
    comes back as it is. A layer that a member lacks counts as `dW_i = 0` with its `G_i`. The result does not depend on the
    members' order, and without `rank` and `energy` is as large as their stack. `harmonise` erases more, afterwards.

    Args:
        erasers: The members, trained on one base. Each counts on the prompts it was trained on, or on its concepts' names if it
            knows none.
        base: The loaded base they were trained on.
        weights: Strength of each, 1 by default; at 0 a member is dropped.
        keep: Prompts to leave alone; the base's keep list or the package's broad one unless given. What the members preserved
            is kept too; what names a member's concept is left out, and recorded.
        rank: Highest rank of a layer; what is cut off is measured where the layer reads.
        energy: Share of every layer's effect there to keep, up to 1; .9 to .99 where harmonising follows.
        state: File to keep all sums and members in, for `growing.change_members`; none unless given.
        spec: How to fuse: loaded, a built-in name, or a YAML file.
        progress: Whether to show progress bars.
        **fields: Fields of `FuseSpec`, over those of `spec`: `lam=0.03`.

    Raises:
        EsdLoraError: If the erasers do not fit each other or the base, every weight is 0, no prompt to keep is left, `rank`,
            `energy` or a field is out of range, or the state cannot be written.
    """
    started, spec = time.monotonic(), load_fuse_spec(spec, **fields)
    check_cut(rank, energy)
    members = gather_members(erasers, base, weights, keep)
    return fuse_members(members, base, spec, rank, energy, state=state, started=started, progress=progress)


def fuse_members(
    members: Members,
    base: Base,
    spec: FuseSpec,
    rank: int | None = None,
    energy: float | None = None,
    *,
    known: FusionState | None = None,
    state: str | Path | None = None,
    started: float,
    progress: bool = True,
) -> Eraser:
    """Fuse members that were gathered; the arguments beside these are those of `fuse`.

    Args:
        members: The members with their prompts.
        base: The loaded base.
        spec: How to fuse.
        rank: Highest rank of a layer.
        energy: Share of every layer's effect to keep.
        known: What was read for a stack of most of these members, so that only what changed is.
        state: File to keep all sums and members in.
        started: When the work began, by `time.monotonic`.
        progress: Whether to show progress bars.
    """
    whole = outline(members.erasers)
    whole.header.to_json()  # which refuses a stack that nobody could read, before the work is done
    widths = {path: pair.down[0].numel() for path, pair in whole.pairs.items()}
    wide = [path for path, width in widths.items() if width > WIDEST]
    if wide:
        warnings.warn(
            f"{len(wide)} layers are wider than {WIDEST} inputs ({wide[0]}, ...), which takes too much memory to fuse: their"
            " updates are added up.",
            stacklevel=3,
        )
    named = dict(zip(members.keys(), members.erasers, strict=True))
    collector = MomentCollector(base, named, steps=spec.steps, guidance=spec.guidance, seed=spec.seed)
    guard = Guard(base, whole.header.guard, base.encode)
    pairs = {path: stack_layer(path, members.erasers) if path in wide else whole.pairs[path] for path in widths}
    left = torch.zeros(3, dtype=torch.float64)
    narrow = {path: width for path, width in widths.items() if path not in wide}
    problems = read_problems(members, base, collector, spec, narrow, known, progress=progress)
    with writing_state(state, members, base, spec, rank, energy, wide) if state else nullcontext() as keep:
        for problem in problems:
            solved = solve(problem, spec.lam, spec.mu, rank, energy)
            pairs |= guard.guarded({problem.path: solved})
            left += objective(problem, spec.lam, [pairs[problem.path], problem.pair, None])
            if keep:
                keep(problem)
    fused, summed, unchanged = left.tolist()
    record = Fusion(
        **spec.model_dump(exclude={"method"}),
        **{**members.record(), **({} if spec.lam else {"kept": 0})},
        kept_walked=min(spec.keep_trajectories, len(members.kept)) if spec.lam else 0,
        rank=rank,
        energy=energy,
        summed=tuple(wide),
        evaluations=collector.evaluations,
        seconds=time.monotonic() - started,
        objective=round(fused / unchanged, _DIGITS) if unchanged else None,
        objective_summed=round(summed / unchanged, _DIGITS) if unchanged else None,
    )
    return Eraser(pairs, whole.header.model_copy(update={"fusions": (*whole.header.fusions, record)}))


def solve(problem: LayerProblem, lam: float, mu: float, rank: int | None = None, energy: float | None = None) -> LoraPair:
    """Solve one layer's closed form in float64: `down_i G_i M` for every member i, beside the stack's own `up`.

    Args:
        problem: The layer's: every member's `down_i G_i`, and the sums of all second moments.
        lam: Weight of what is kept.
        mu: Isotropic part of what is kept, in units of the mean square of an input.
        rank: Highest rank of the result; what is cut off is measured where the layer reads, not as a matrix.
        energy: Share of that to keep.
    """
    pair, count = problem.pair, problem.count
    m_inverse = problem.total(lam)
    square = float(m_inverse.diagonal().mean()) / (count * (1 + lam))
    ridge = _RIDGE * square  # on every member's moment, so that M exists, and one member with lam 0 comes back
    m_inverse.diagonal().add_(count * (ridge + lam * mu * square))
    down_g = problem.down_g + ridge * in_float64(pair.down.flatten(1)).to(m_inverse.device)
    root = torch.linalg.cholesky(m_inverse)
    down = torch.cholesky_solve(down_g.T, root).T  # down_i G_i M: M is symmetric
    up = pair.up.flatten(1).double()
    if rank is not None or energy is not None:
        (down, up), _ = truncated(LoraPair(down @ root, up.to(down.device)), rank, energy)
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    precise = torch.promote_types(pair.down.dtype, torch.float32)
    return LoraPair(
        down.to("cpu", precise).reshape(len(down), *pair.down.shape[1:]),
        up.to("cpu", precise).reshape(len(up), len(down), *pair.up.shape[2:]),
    )


def objective(problem: LayerProblem, lam: float, updates: Sequence[LoraPair | None]) -> Tensor:
    """Return what the closed form minimises, for one layer and `mu` 0, at several updates, [updates].

    Args:
        problem: The layer's.
        lam: Weight of what is kept.
        updates: The updates to judge; `None` for no update at all.
    """
    total = problem.total(lam)
    downs, ups = (in_float64(factor.flatten(1)).to(total.device) for factor in problem.pair)
    parts = zip(*(x.split(problem.ranks) for x in (downs, ups.T, problem.down_g)), strict=True)
    alone = sum(float(((up @ up.T) * (down_g @ down.T)).sum()) for down, up, down_g in parts)  # tr(dW_i G_i dW_i^T) of each
    ups, down_g = _narrowed(ups, problem.down_g)
    values: list[float] = []
    for update in updates:
        value = alone
        if update is not None:
            down, up = (in_float64(factor.flatten(1)).to(total.device) for factor in update)
            up, down = _narrowed(up, down)
            value += float(((up.T @ up) * (down @ total @ down.T)).sum())
            value -= 2 * float(((up.T @ ups) * (down @ down_g.T)).sum())
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def _narrowed(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product of a rank no higher than there are outputs, so that no product is larger than that."""
    return (up, down) if down.shape[0] <= up.shape[0] else (torch.eye(len(up)).to(up), up @ down)
