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
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.header import Fusion
from esd_lora.erasers.stacking import Strength, check_cut, stack, truncated
from esd_lora.fuse_specs import FuseSpec
from esd_lora.fusing.moments import Moment, MomentCollector, PromptGroup
from esd_lora.fusing.prompts import gather_members
from esd_lora.guarding import Guard
from esd_lora.recipe_files import load_fuse_spec
from esd_lora.trajectory import in_float64

_BYTES_AT_ONCE = 2**30
"""Bytes of second moments gathered at once; further layers have another pass over the same points."""
_RIDGE = 1e-3
"""Ridge on members' second moments, in units of the mean square of an input: only numbers need it."""
WIDEST = 12_000
"""Inputs of the widest layer that is fused: its second moments take 1.2 GB, and twice that more while they are solved."""


def fuse(
    erasers: Sequence[Eraser],
    base: Base,
    *,
    weights: Sequence[float | Strength] | None = None,
    keep: Sequence[str] | None = None,
    rank: int | None = None,
    energy: float | None = None,
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
        spec: How to fuse: loaded, a built-in name, or a YAML file.
        progress: Whether to show progress bars.
        **fields: Fields of `FuseSpec`, over those of `spec`: `lam=0.03`.

    Raises:
        EsdLoraError: If the erasers do not fit each other or the base, every weight is 0, no prompt to keep is left, or `rank`,
            `energy` or a field is out of range.
    """
    started, spec = time.monotonic(), load_fuse_spec(spec, **fields)
    check_cut(rank, energy)
    members = gather_members(erasers, base, weights, keep)
    count = len(members.erasers)
    groups = [PromptGroup(prompts, spec.trajectories, member=i) for i, prompts in enumerate(members.prompts)]
    walked = min(spec.keep_trajectories, len(members.kept)) if spec.lam else 0
    if walked:
        groups.append(PromptGroup(members.kept, walked, weight=spec.lam * count))
    collector = MomentCollector(base, groups, steps=spec.steps, guidance=spec.guidance, seed=spec.seed)
    summed = stack(members.erasers)
    pairs = dict(summed.pairs)
    wide = [module for module, pair in pairs.items() if pair.down[0].numel() > WIDEST]
    if wide:
        warnings.warn(
            f"{len(wide)} layers are wider than {WIDEST} inputs ({wide[0]}, ...), which takes too much memory to fuse: their"
            " updates are added up.",
            stacklevel=2,
        )
    guard = Guard(base, summed.header.guard, base.encode)
    layers = dict(base.model.named_modules())
    left_fused = left_summed = left_unchanged = 0.0
    batches = list(batches_of_layers({module: pair.down[0].numel() for module, pair in pairs.items() if module not in wide}))
    with tqdm(total=len(batches) * len(groups), desc="fusing", unit="pass", disable=not progress) as bar:
        for batch in batches:
            moments: dict[str, Moment] = {}
            for module in batch:
                downs = {i: e.pairs[module].down for i, e in enumerate(members.erasers) if module in e.pairs}
                moments[module] = Moment(layers[module], downs)
            for number in range(len(groups)):
                collector.collect(number, moments)
                bar.update()
            for module in batch:
                moment, plain = moments.pop(module), pairs[module]
                solved = solve(moment, plain, count, spec.lam, spec.mu, rank, energy)
                pairs |= guard.guarded({module: solved})
                left_fused += objective(moment, plain, pairs[module])
                left_summed += objective(moment, plain, plain)
                left_unchanged += objective(moment, plain)
    record = Fusion(
        **spec.model_dump(exclude={"method"}),
        **{**members.record(), **({} if spec.lam else {"kept": 0})},
        kept_walked=walked,
        rank=rank,
        energy=energy,
        summed=tuple(wide),
        evaluations=collector.evaluations,
        seconds=time.monotonic() - started,
        objective=left_fused / left_unchanged if left_unchanged else None,
        objective_summed=left_summed / left_unchanged if left_unchanged else None,
    )
    return Eraser(pairs, summed.header.model_copy(update={"fusions": (*summed.header.fusions, record)}))


def solve(
    moment: Moment, pair: LoraPair, count: int, lam: float, mu: float, rank: int | None = None, energy: float | None = None
) -> LoraPair:
    """Solve one layer's closed form in float64: `down_i G_i M` for every member i, beside the stack's own `up`.

    Args:
        moment: The layer's, with every member's `down_i G_i` and the sum of all second moments.
        pair: The plain stack's.
        count: N, the members, whether they have the layer or not.
        lam: Weight of what is kept.
        mu: Isotropic part of what is kept, in units of the mean square of an input.
        rank: Highest rank of the result; what is cut off is measured where the layer reads, not as a matrix.
        energy: Share of that to keep.
    """
    total = moment.total
    m_inverse = in_float64(total.clone() if total.dtype == torch.float64 else total)  # sum_j G_j + lam N G_keep
    square = float(m_inverse.diagonal().mean()) / (count * (1 + lam))
    ridge = _RIDGE * square  # on every member's moment, so that M exists, and one member with lam 0 comes back
    m_inverse.diagonal().add_(count * (ridge + lam * mu * square))
    down_g = torch.cat([moment.products[i] + ridge * moment.downs[i] for i in sorted(moment.products)])
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


def objective(moment: Moment, plain: LoraPair, update: LoraPair | None = None) -> float:
    """Return what the closed form minimises, for one layer and `mu` 0.

    Args:
        moment: The layer's, with its kept prompts weighted by lam N.
        plain: The plain stack's pair: the members' `up`, side by side.
        update: The update to judge; no update at all unless given.
    """
    ups = in_float64(plain.up.flatten(1).to(moment.total.device))
    down_g = torch.cat([moment.products[i] for i in sorted(moment.products)])
    value, first = 0.0, 0
    for i in sorted(moment.products):  # tr(dW_i G_i dW_i^T) of each
        own = ups[:, first : first + len(moment.downs[i])]
        value += float((own.T @ own * (moment.products[i] @ moment.downs[i].T)).sum())
        first += len(moment.downs[i])
    if update is not None:
        down, up = update.down.flatten(1).to(ups), update.up.flatten(1).to(ups)
        value += float((up.T @ up * (down @ in_float64(moment.total) @ down.T)).sum())
        value -= 2 * float((up.T @ ups * (down @ down_g.T)).sum())
    return value


def batches_of_layers(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield layers whose second moments fit into memory together.

    Args:
        widths: Layer to its number of inputs.
    """
    batch: list[str] = []
    held = 0
    for module, inputs in widths.items():
        if batch and held + 8 * inputs**2 > _BYTES_AT_ONCE:
            yield batch
            batch, held = [], 0
        batch.append(module)
        held += 8 * inputs**2
    if batch:
        yield batch
