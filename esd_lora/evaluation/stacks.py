"""What the members of a stack do alone and in company: more models to paint with, and what their pictures say."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import Strength
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.scoring import Scores
from esd_lora.evaluation.suite_files import Suite
from esd_lora.evaluation.summarising import columns, number
from esd_lora.evaluation.tables import unlearning_accuracies
from esd_lora.evaluation.variants import Variant, erased
from esd_lora.pictures import heat_maps
from esd_lora.wording import slug


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
    targets = [[one for one in asked if one.role == "target" and _erases(member, one)] for member in members]
    rest = [one for one in asked if one.role in ("neighbour", "general")]
    metric = _rate_metric("erased", asked, scores)
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


def as_in_paper(
    suite: Suite, numbers: Mapping[str, Any], asked: Sequence[Asked], scores: Scores, members: Sequence[Eraser]
) -> dict[str, dict[str, float]]:
    """The numbers as a paper's table has them, for suites that follow one."""
    if suite.layout == "ua-ira-cra":
        return unlearning_accuracies(numbers)
    return erased_and_others(asked, scores, list(numbers), members) if suite.layout else {}


def erased_and_others(
    asked: Sequence[Asked], scores: Scores, variants: Sequence[str], members: Sequence[Eraser] = ()
) -> dict[str, dict[str, float]]:
    """Accuracy on the erased class and on all others, before and after: table 2 of the ESD paper (arXiv:2303.07345).

    Args:
        asked: All prompts.
        scores: Of all pictures.
        variants: Models, `base` among them.
        members: Of a stack that was measured member by member: each is a row, with its own class erased and all others kept;
            the last row is their average. Otherwise each model but the base is a row.
    """
    metric = _rate_metric(variants[-1], asked, scores)
    if metric is None or "base" not in variants:
        return {}

    def share(variant: str, some: Sequence[Asked]) -> float | None:
        found = list(columns(variant, some, scores).get(metric, {}).values())
        return sum(found) / len(found) if found else None

    whole: dict[str, Eraser | None] = {variant: None for variant in variants if variant != "base"}
    out: dict[str, dict[str, float]] = {}
    for name, member in ({alone(m, i + 1): m for i, m in enumerate(members)} or whole).items():
        own = {one.case for one in asked if (_erases(member, one) if member else one.role == "target")}
        for part, some in {
            "erased class": [one for one in asked if one.case in own],
            "other classes": [one for one in asked if one.case not in own],
        }.items():
            for when, model in {"base": "base", "erased": name}.items():
                if (value := share(model, some)) is not None:
                    out.setdefault(name, {})[f"{part}, {when}"] = value
    out = {name: found for name, found in out.items() if len(found) == 4}  # a member may erase nothing that the suite has
    if members and out:
        heads = next(iter(out.values()))
        out["average"] = {head: sum(found[head] for found in out.values()) / len(out) for head in heads}
    return out


def _erases(member: Eraser, one: Asked) -> bool:
    return any(concept.named_in(one.label or one.prompt) for concept in member.header.concepts)


def _rate_metric(variant: str, asked: Sequence[Asked], scores: Scores) -> str | None:
    """The first metric that says yes or no of every picture."""
    found = columns(variant, asked, scores).items()
    return next((metric for metric, column in found if all(isinstance(value, bool) for value in column.values())), None)


def heat_map(found: dict[str, Any]) -> bytes:
    """The matrix as a picture, PNG: rows are targets of a member, columns what was on."""
    names = [member["name"] for member in found["members"]]
    shares = [[cell["value"] if cell else 0.0 for cell in row] for row in found["matrix"]]
    content = io.BytesIO()
    heat_maps({found["metric"]: shares}, names, last_column="all").save(content, "PNG")
    return content.getvalue()
