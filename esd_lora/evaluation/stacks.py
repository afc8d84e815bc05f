"""What the members of a stack do alone and in company: more models to paint with, and what their pictures say."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from esd_lora.eraser import Eraser
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.scoring import Scores
from esd_lora.evaluation.summarising import columns, number
from esd_lora.evaluation.variants import Variant, erased
from esd_lora.families import Base
from esd_lora.outputs import slug
from esd_lora.pictures import heat_maps
from esd_lora.stacking import Strength


def alone(member: Eraser, number: int) -> str:
    """What a member's own pictures are called, counted from 1."""
    return f"{number}-{slug(' '.join(member.names))}"


def first(count: int) -> str:
    """What the pictures of the first `count` members together are called."""
    return f"first-{count}"


def member_variants(
    base: Base, members: Sequence[Eraser], weights: Sequence[Strength], steps: int, guidance: float
) -> list[Variant]:
    """Every member alone, then the first two together, the first three, and so on; all of them are `erased` already."""
    out = [
        erased(base, [m], [w], steps, guidance, alone(m, i + 1)) for i, (m, w) in enumerate(zip(members, weights, strict=True))
    ]
    for count in range(2, len(members)):
        out.append(erased(base, members[:count], weights[:count], steps, guidance, first(count)))
    return out


def company(asked: Sequence[Asked], scores: Scores, members: Sequence[Eraser]) -> dict[str, Any]:
    """How members do alone and together, by the first metric that says yes or no.

    Returns:
        `metric`; `members`, for each its targets' rate on the base, alone, and among all; `matrix`, the rate of member i's
        targets (row) under member j alone (column) and under all (last column); `kept`, the rate on all other prompts by number
        of members, from 0. Empty if there is no such metric.
    """
    names = [", ".join(member.names) for member in members]
    single = [alone(member, i + 1) for i, member in enumerate(members)]
    growing = ["base", single[0], *(first(count) for count in range(2, len(members))), "erased"]
    targets = [
        [
            one
            for one in asked
            if one.role == "target" and any(c.named_in(one.label or one.prompt) for c in member.header.concepts)
        ]
        for member in members
    ]
    rest = [one for one in asked if one.role in ("neighbour", "general")]
    metric = next(
        (m for m, column in columns("erased", asked, scores).items() if all(isinstance(v, bool) for v in column.values())), None
    )
    if metric is None:
        return {}

    def rate(variant: str, some: Sequence[Asked]) -> dict[str, Any] | None:
        found = columns(variant, some, scores).get(metric)
        return number(list(found.values())) if found else None

    return {
        "metric": metric,
        "members": [
            {"name": name, "base": rate("base", some), "alone": rate(own, some), "together": rate("erased", some)}
            for name, own, some in zip(names, single, targets, strict=True)
        ],
        "matrix": [[rate(variant, some) for variant in (*single, "erased")] for some in targets],
        "kept": [rate(variant, rest) for variant in growing],
    }


def heat_map(found: dict[str, Any]) -> bytes:
    """The matrix as a picture, PNG: rows are targets of a member, columns what was on."""
    names = [member["name"] for member in found["members"]]
    shares = [[cell["value"] if cell else 0.0 for cell in row] for row in found["matrix"]]
    content = io.BytesIO()
    heat_maps({found["metric"]: shares}, names, last_column="all").save(content, "PNG")
    return content.getvalue()
