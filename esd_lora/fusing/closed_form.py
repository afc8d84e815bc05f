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

import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from tqdm.auto import tqdm

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.header import Fusion
from esd_lora.erasers.stacking import Strength, check_cut, stack, strengths_of, truncated
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.fusing.moments import Moment, Reading, Readings
from esd_lora.fusing.prompts import keep_list, own_prompts

_GROUP = 2**30
"""Bytes of second moments gathered at once; further layers have another pass over the same points."""
_RIDGE = 1e-3
"""Of members' second moments, in units of the mean square of an input: only numbers need it."""
_WIDEST = 12_000
"""Inputs of the widest layer that is fused: its second moments take 1.2 GB, and twice that more while they are solved."""


def fuse(
    erasers: Sequence[Eraser],
    base: Base,
    *,
    weights: Sequence[float | Strength] | None = None,
    keep: Sequence[str] | None = None,
    lam: float = 0.1,
    mu: float = 0.03,
    rank: int | None = None,
    energy: float | None = None,
    harmonise: int = 0,
    trajectories: int = 8,
    keep_trajectories: int = 64,
    steps: int = 4,
    guidance: float = 3.0,
    seed: int = 0,
    progress: bool = True,
) -> Eraser:
    """Fuses erasers into one that erases what they all do and draws the rest.

    The closed form above, layer by layer, for linears and convolutions (which read unfolded patches). `G_keep` has `mu` times
    the mean square of the layer's inputs on its diagonal, so that what stands in no list is kept too; one member with `lam` 0
    comes back as it is. A layer that a member lacks counts as `dW_i = 0` with its `G_i`. The result does not depend on the
    members' order, and without `rank` and `energy` is as large as their stack.

    Args:
        erasers: Of one base. Each is asked on the prompts it was trained on, or on its concepts' names if it knows none.
        base: The loaded base they were trained on.
        weights: Strength of each, 1 by default; at 0 a member is dropped.
        keep: Prompts to leave alone; the base's keep list or the package's broad one unless given. What the members preserved
            is kept too; what names a member's concept is left out, and recorded.
        lam: Weight of what is kept; 0.03 erases more, 1 keeps more.
        mu: Of the kept moment, the part that is the same in all directions, for what no list names; 0.01 to 1.
        rank: Highest rank of a layer; what is cut off is measured where the layer reads.
        energy: Share of every layer's effect there to keep, up to 1; .9 to .99 where harmonising follows.
        harmonise: Steps of a distillation afterwards (`harmonising.py`), 200 to 600; 0 for none.
        trajectories: Walked for each member, its prompts taking turns.
        keep_trajectories: Walked for the kept prompts, as far as there are so many.
        steps: Points of a trajectory, 3 to 6.
        guidance: Of the trajectories.
        seed: Of their noise.
        progress: Whether to show progress bars.

    Raises:
        EsdLoraError: If the erasers do not fit each other or the base, every weight is 0, no prompt to keep is left, or `rank`
            or `energy` is out of range.
    """
    started, strengths = time.monotonic(), strengths_of(erasers, weights)
    check_cut(rank, energy)
    base.check(stack(erasers, strengths))
    given = [stack([e], [s]) for e, s in zip(erasers, strengths, strict=True) if s.weight]
    if not given:
        raise EsdLoraError("every member has weight 0: there is nothing to fuse.")
    # In an order of their own, so that the result is the same bit for bit however the members are given.
    hashes = [hash_tensors(member.state_dict()) for member in given]
    members = [given[i] for i in sorted(range(len(given)), key=lambda i: hashes[i])]
    kept, dropped = keep_list(members, base.keep if keep is None else keep)
    if not kept:
        raise EsdLoraError(f"no prompt to keep is left: all {len(dropped)} name an erased concept. Give others.")
    readings = [Reading(own_prompts(member, kept, dropped), trajectories, member=i) for i, member in enumerate(members)]
    readings.append(Reading(kept, min(keep_trajectories, len(kept)), lam * len(members)))
    watched = Readings(base, readings if lam else readings[:-1], steps=steps, guidance=guidance, seed=seed)
    summed = stack(members)
    pairs = dict(summed.pairs)
    wide = [module for module, pair in pairs.items() if pair.down[0].numel() > _WIDEST]
    if wide:
        warnings.warn(
            f"{len(wide)} layers are wider than {_WIDEST} inputs ({wide[0]}, ...), which takes too much memory to fuse: their"
            " updates are added up.",
            stacklevel=2,
        )
    layers = dict(base.model.named_modules())
    gained, summed_up, none = 0.0, 0.0, 0.0
    groups = list(_groups({module: pair.down[0].numel() for module, pair in pairs.items() if module not in wide}))
    with tqdm(total=len(groups) * len(watched.readings), desc="fusing", unit="pass", disable=not progress) as bar:
        for group in groups:
            moments = {
                module: Moment(layers[module], {i: e.pairs[module].down for i, e in enumerate(members) if module in e.pairs})
                for module in group
            }
            for number in range(len(watched.readings)):
                watched.add(number, moments)
                bar.update()
            for module in group:
                moment, plain = moments.pop(module), pairs[module]
                pairs[module] = solve(moment, plain, len(members), lam, mu, rank, energy)
                gained += objective(moment, plain, pairs[module])
                summed_up += objective(moment, plain, plain)
                none += objective(moment, plain)
    record = Fusion(
        members=tuple(sorted(hashes)),
        lam=lam,
        mu=mu,
        kept=len(kept),
        kept_sha256=hashlib.sha256("\n".join(kept).encode()).hexdigest(),
        dropped=tuple(dropped),
        trajectories=trajectories,
        keep_trajectories=keep_trajectories,
        steps=steps,
        guidance=guidance,
        seed=seed,
        rank=rank,
        energy=energy,
        summed=tuple(wide),
        evaluations=watched.evaluations,
        seconds=time.monotonic() - started,
        objective=gained / none if none else None,
        objective_summed=summed_up / none if none else None,
    )
    fused = Eraser(pairs, summed.header.model_copy(update={"fusions": (*summed.header.fusions, record)}))
    if harmonise:
        from esd_lora.fusing.harmonising import harmonise as distill

        asked = [reading.prompts for reading in readings[:-1]]
        fused = distill(fused, members, asked, kept, base, steps=harmonise, seed=seed, progress=progress)
    return fused


def solve(
    moment: Moment, pair: LoraPair, count: int, lam: float, mu: float, rank: int | None = None, energy: float | None = None
) -> LoraPair:
    """One layer's closed form, in float64: `down_i G_i M` for every member, beside the stack's own `up`.

    Args:
        moment: Of the layer.
        pair: The plain stack's.
        count: N, the members, whether they have the layer or not.
        lam: Weight of what is kept.
        mu: Isotropic part of what is kept, in units of the mean square of an input.
        rank: Highest rank of the result; what is cut off is measured where the layer reads, not as a matrix.
        energy: Share of that to keep.
    """
    total = moment.total.to(torch.float64, copy=True)
    square = float(total.diagonal().mean()) / (count * (1 + lam))
    ridge = _RIDGE * square  # on every member's moment, so that M exists, and one member with lam 0 comes back
    total.diagonal().add_(count * (ridge + lam * mu * square))
    factor = torch.linalg.cholesky(total)
    read = torch.cat([moment.reads[i] + ridge * moment.downs[i] for i in sorted(moment.reads)])
    down = torch.cholesky_solve(read.T, factor).T
    up = pair.up.flatten(1).double()
    if rank is not None or energy is not None:
        (down, up), _ = truncated(LoraPair(down @ factor, up.to(down.device)), rank, energy)
        down = torch.linalg.solve_triangular(factor, down, upper=False, left=False)
    shape = (len(down), *pair.down.shape[1:]), (len(up), len(down), *pair.up.shape[2:])
    precise = torch.promote_types(pair.down.dtype, torch.float32)
    return LoraPair(down.to("cpu", precise).reshape(shape[0]), up.to("cpu", precise).reshape(shape[1]))


def objective(moment: Moment, plain: LoraPair, update: LoraPair | None = None) -> float:
    """What the closed form minimises, for one layer and `mu` 0.

    Args:
        moment: Of the layer, with its kept prompts weighted by lam N.
        plain: The plain stack's pair: the members' `up`, side by side.
        update: What to judge; no update at all unless given.
    """
    ups = plain.up.flatten(1).to(moment.total.device, torch.float64)
    read = torch.cat([moment.reads[i] for i in sorted(moment.reads)])
    value, first = 0.0, 0
    for i in sorted(moment.reads):  # tr(dW_i G_i dW_i^T) of each
        own = ups[:, first : first + len(moment.downs[i])]
        value += float((own.T @ own * (moment.reads[i] @ moment.downs[i].T)).sum())
        first += len(moment.downs[i])
    if update is not None:
        down, up = update.down.flatten(1).to(ups), update.up.flatten(1).to(ups)
        value += float((up.T @ up * (down @ moment.total.double() @ down.T)).sum())
        value -= 2 * float((up.T @ ups * (down @ read.T)).sum())
    return value


def _groups(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Layers whose second moments fit into memory together, in groups.

    Args:
        widths: Layer to its number of inputs.
    """
    group: list[str] = []
    held = 0
    for module, inputs in widths.items():
        if group and held + 8 * inputs**2 > _GROUP:
            yield group
            group, held = [], 0
        group.append(module)
        held += 8 * inputs**2
    if group:
        yield group
