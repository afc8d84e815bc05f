"""How the members of a stack interfere: by their subspaces, and by what they do to a base together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import Strength, stack, strengths_of
from esd_lora.errors import EsdLoraError
from esd_lora.progress import stage

if TYPE_CHECKING:
    from esd_lora.bases.base import Base

REPORT_FILES = ("interference.json", "interference.png")
_PROMPTS = 4  # of each member
_STEPS = 6  # of a trajectory
_GUIDANCE = 3.0


class Interference(NamedTuple):
    """The report on N members; every matrix is N x N, rows and columns in the members' order."""

    names: list[str]
    reads: list[list[float]]
    """Overlap of what two members read: mean squared cosine of the principal angles between their input subspaces, over the
    layers both have, weighted by the product of the updates' norms. 0 orthogonal, 1 one inside the other."""
    writes: list[list[float]]
    """Overlap of what two members write: the same of their output subspaces."""
    cosine: list[list[float]]
    """Cosine of the updates themselves: below 0 they work against each other, near 1 they are the same."""
    shared: list[list[int]]
    """Number of layers that both have."""
    effect: list[list[float]] | None = None
    """On a base: how far member j (column) moves predictions for member i's prompts (row), relative to how far i does."""
    together: list[float] | None = None
    """On a base: how far the whole stack's predictions for member i's prompts are from those of i alone, relative to i's
    effect. 0 is undisturbed, 1 as much again as the eraser itself."""

    def lines(self) -> list[str]:
        """Return the report as a table in text."""
        width = max(10, *(len(name) for name in self.names))
        rows = [f"{'members':<{2 * width + 3}}  shared layers  read overlap  write overlap  cosine"]
        for i in range(len(self.names)):
            for j in range(i + 1, len(self.names)):
                rows.append(
                    f"{self.names[i]:<{width}} | {self.names[j]:<{width}}  {self.shared[i][j]:>13}  {self.reads[i][j]:>12.3f}"
                    f"  {self.writes[i][j]:>13.3f}  {self.cosine[i][j]:>+6.3f}"
                )
        if self.effect and self.together:
            rows += ["", f"{'on prompts of':<{width}}  changed in the stack by  of others' effects, most from"]
            for i, name in enumerate(self.names):
                others = [(self.effect[i][j], self.names[j]) for j in range(len(self.names)) if j != i]
                most, by = max(others, default=(0.0, "nobody"))
                rows.append(f"{name:<{width}}  {self.together[i]:>23.1%}  {most:.1%} {by}")
        return rows

    def files(self) -> dict[str, bytes]:
        """Return `interference.json` and the heat maps, `interference.png`."""
        from esd_lora.pictures import heat_maps, png

        # `company` is the file's name for it.
        content = {"company" if name == "together" else name: value for name, value in self._asdict().items()}
        maps: dict[str, Sequence[Sequence[float]]] = {"read overlap": self.reads, "write overlap": self.writes}
        maps["cosine of updates"] = self.cosine
        if self.effect and self.together:
            maps["effect on row's prompts"] = [[*row, more] for row, more in zip(self.effect, self.together, strict=True)]
        sheet = heat_maps(maps, self.names, last_column="in the stack")
        return dict(zip(REPORT_FILES, (json.dumps(content, indent=1, ensure_ascii=False).encode(), png(sheet)), strict=True))


def measure_interference(
    erasers: Sequence[Eraser],
    weights: Sequence[float | Strength] | None = None,
    *,
    names: Sequence[str] | None = None,
    base: Base | None = None,
    whole: Eraser | None = None,
    seed: int = 0,
) -> Interference:
    """Report how the members of a stack interfere.

    Args:
        erasers: The members, two or more.
        weights: Their strengths, 1 by default.
        names: What to call them; their concepts unless given.
        base: A loaded base to measure effects on, at the points of short trajectories (6 DDIM or Euler steps, guidance 3)
            under up to four prompts of each member. Without one only the files are compared.
        whole: The stack as it is, if it is not the plain sum: fused, or at lower ranks.
        seed: Seed of the trajectories' noise.

    Raises:
        EsdLoraError: If the members do not fit each other or the base.
    """
    members = [stack([e], [s]) for e, s in zip(erasers, strengths_of(erasers, weights), strict=True)]
    stack(members)  # refuses what does not belong together
    size = range(len(members))
    titles = list(names or [", ".join(member.names)[:40] for member in members])
    spans = [_spans(member) for member in members]
    pairs = {(i, j): _compare(members[i], members[j], spans[i], spans[j]) for i in size for j in range(i + 1)}
    reads, writes, cosine = ([[pairs[max(i, j), min(i, j)][k] for j in size] for i in size] for k in range(3))
    shared = [[len(members[i].pairs.keys() & members[j].pairs.keys()) for j in size] for i in size]
    report = Interference(titles, reads, writes, cosine, shared)
    if base is None:
        return report
    if changing := [member for member in members if member.changes_text]:
        raise EsdLoraError(
            f"eraser of {changing[0].names} changes the text encoder, and effects are measured on texts as the base reads them:"
            " leave out the base, so that the files are compared."
        )
    with stage("measuring what members do to each other"):
        effect, together = _effects(members, [whole] if whole else members, base, seed)
    return report._replace(effect=effect, together=together)


def _compare(first: Eraser, second: Eraser, first_spans: _Spans, second_spans: _Spans) -> tuple[float, float, float]:
    """Return overlap of inputs, overlap of outputs and cosine of the updates; zeros where no layer is shared."""
    read = write = inner = whole = 0.0
    for module in (name for name in first.pairs if name in second.pairs):  # in their order, for sums
        a, b = first.pairs[module], second.pairs[module]
        weight = a.norm() * b.norm()
        whole += weight
        read += weight * _overlap(first_spans[module][0], second_spans[module][0])
        write += weight * _overlap(first_spans[module][1], second_spans[module][1])
        inner += a.inner(b)
    norms = [sum(pair.norm() ** 2 for pair in eraser.pairs.values()) ** 0.5 for eraser in (first, second)]
    return (read / whole if whole else 0.0), (write / whole if whole else 0.0), inner / (norms[0] * norms[1] or 1.0)


def _overlap(a: Tensor, b: Tensor) -> float:
    """Return the mean squared cosine of the principal angles between two spaces, given orthonormal bases."""
    least = min(a.shape[1], b.shape[1])
    return float((a.T @ b).double().square().sum()) / least if least else 0.0


_Spans = dict[str, tuple[Tensor, Tensor]]


def _spans(eraser: Eraser) -> _Spans:
    """Return orthonormal bases of what every layer's update reads and writes."""
    return {m: (_span(pair.down.flatten(1).T), _span(pair.up.flatten(1))) for m, pair in eraser.pairs.items()}


def _span(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of a column space, as precise as it was stored."""
    u, s, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    kept = u[:, s > 1e-6 * s.max()] if s.max() > 0 else u[:, :0]
    return kept.to(torch.promote_types(columns.dtype, torch.float32))


def _effects(
    members: Sequence[Eraser], stacked: Sequence[Eraser], base: Base, seed: int
) -> tuple[list[list[float]], list[float]]:
    """Return `Interference.effect`, and `Interference.together` of the erasers that are all on."""
    from esd_lora.adapter import applied
    from esd_lora.trajectory import concatenate, walk

    points: list[tuple[Tensor, Tensor, Any]] = []
    noise = torch.Generator().manual_seed(seed)
    for member in members:
        prompts = [prompt for c in member.header.concepts for prompt, _ in c.pairs][:_PROMPTS] or member.names[:_PROMPTS]
        condition, null = base.encode(prompts), base.encode([""] * len(prompts))
        shape = base.latent_shape()
        scheduler = base.family.scheduler(base.pipe, _STEPS, shape, base.model.device)
        start = torch.randn(len(prompts), *shape, generator=noise).to(base.model.device)
        visited = walk(base.predict, scheduler, start, condition, null, guidance=_GUIDANCE)
        x_t, t = torch.cat([p.x_t for p in visited]), torch.cat([p.t for p in visited])
        points.append((x_t, t, concatenate(*[condition] * len(visited))))

    def predictions(erasers: Sequence[Eraser]) -> list[Tensor]:
        with applied(base, erasers), torch.no_grad():
            return [base.predict(*point) for point in points]

    before, together = predictions([]), predictions(stacked)
    alone = [predictions([member]) for member in members]
    own = [float((alone[i][i] - before[i]).norm()) or 1.0 for i in range(len(members))]
    effect = [[float((moved[i] - before[i]).norm()) / own[i] for moved in alone] for i in range(len(members))]
    return effect, [float((together[i] - alone[i][i]).norm()) / own[i] for i in range(len(members))]
