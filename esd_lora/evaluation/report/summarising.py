"""Summarising: from scores to rates and means with intervals, differences from the base, stacks, and conditions that fail."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.measured import Interval, Number, Numbers
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.evaluation.cases import ROLES, Case
from esd_lora.evaluation.report.intervals import paired_difference, paired_rate_difference, wilson
from esd_lora.evaluation.report.report import MemberNumbers, StackNumbers
from esd_lora.evaluation.scoring import Scores
from esd_lora.evaluation.suites.suite_files import Suite
from esd_lora.evaluation.variants import alone_name, first_name

_DIGITS = 6
_MOST_WORST = 5
_MOST_LABELS = 1000  # more than ImageNet has classes are no classes


def summarise(cases: Sequence[Case], scores: Scores, variants: Sequence[str]) -> Numbers:
    """Return the numbers of an evaluation, by variant, then role, then metric.

    A metric that is yes or no of each picture becomes a rate with Wilson's interval, another one a mean with a bootstrap
    interval; beside the base's, each has its difference from it, paired by prompt and seed (see `intervals`).
    """
    prompts = {case.id: case.prompt for case in cases}
    numbers: Numbers = {}
    for variant in variants:
        for role in ROLES:
            own = [case for case in cases if case.role == role]
            base = values_by_metric("base", own, scores) if variant != "base" else {}
            for metric, values in values_by_metric(variant, own, scores).items():
                number = mean_or_rate(list(values.values()))
                if both := [case for case in values if case in base.get(metric, {})]:
                    after, before = [values[case] for case in both], [base[metric][case] for case in both]
                    difference = difference_between(after, before, [prompts[case] for case in both])
                    number = number.model_copy(update={"difference": _rounded(difference)})
                numbers.setdefault(variant, {}).setdefault(role, {})[metric] = number
    return numbers


def summarise_labels(cases: Sequence[Case], scores: Scores, variants: Sequence[str]) -> Numbers:
    """Return the numbers by part of a label, then variant, then metric; none where labels are too many to be classes."""
    by_part: dict[str, list[Case]] = {}
    for case in cases:
        for part in case.parts:
            by_part.setdefault(part, []).append(case)
    if len(by_part) > _MOST_LABELS or len(by_part) >= len(cases):
        return {}
    return {part: {v: _measure_all(values_by_metric(v, own, scores)) for v in variants} for part, own in by_part.items()}


def worst_kept(cases: Sequence[Case], scores: Scores) -> Numbers:
    """Return what lost most by erasing: part of a label to `base` and `erased` to metric to rate, worst first, at most five.

    Among neighbours and general prompts; a part that lost nothing is not among them.
    """
    kept = [case for case in cases if case.role in ("neighbour", "general")]
    metric = _rate_metric("erased", kept, scores)
    rates = summarise_labels(kept, scores, ("base", "erased")) if metric else {}
    lost = {
        part: both["base"][metric].value - both["erased"][metric].value
        for part, both in rates.items()
        if metric and all(metric in both[variant] for variant in ("base", "erased"))
    }
    worst = sorted((part for part in lost if lost[part] > 0), key=lambda part: -lost[part])[:_MOST_WORST]
    return {part: {name: {str(metric): rates[part][name][str(metric)]} for name in ("base", "erased")} for part in worst}


def _measure_all(metrics: Mapping[str, Mapping[str, bool | float]]) -> dict[str, Number]:
    return {metric: mean_or_rate(list(values.values())) for metric, values in metrics.items()}


def values_by_metric(variant: str, cases: Sequence[Case], scores: Scores) -> dict[str, dict[str, bool | float]]:
    """Return how one variant scored on some cases: metric to case to value."""
    metrics: dict[str, dict[str, bool | float]] = {}
    for case in cases:
        for score in scores.get((variant, case.id), {}).values():
            for metric, value in score.values.items():
                metrics.setdefault(metric, {})[case.id] = value
    return metrics


def mean_or_rate(values: Sequence[bool | float]) -> Number:
    """Return a rate with its hits, or a mean, with its interval and number of pictures; of counts the sum, too."""
    if all(isinstance(value, bool) for value in values):
        hits = sum(map(bool, values))
        return Number(**dict(_rounded(wilson(hits, len(values)))), hits=hits, of=len(values))
    mean = _rounded(paired_difference([float(value) for value in values], [0.0] * len(values)))
    total = sum(map(int, values)) if all(isinstance(value, int) for value in values) else None
    return Number(**dict(mean), of=len(values), sum=total)


def difference_between(after: Sequence[bool | float], before: Sequence[bool | float], prompts: Sequence[str] = ()) -> Interval:
    """Return the difference of two rates or means on the same pictures, with its interval.

    Args:
        after: Of each picture yes or no, or a number, in the same order as `before`.
        before: The same prompts and seeds without erasers.
        prompts: The prompt of each picture.
    """
    if all(isinstance(value, bool) for value in (*after, *before)):
        return paired_rate_difference([bool(value) for value in after], [bool(value) for value in before], prompts)
    return paired_difference([float(value) for value in after], [float(value) for value in before], prompts)


def _rounded(interval: Interval) -> Interval:
    return Interval(**{name: round(value, _DIGITS) for name, value in interval})


class FailCondition(NamedTuple):
    """A condition under which an evaluation counts as failed: `erased.accuracy>0.05`."""

    text: str
    path: tuple[str, str, str, str]
    """Variant, role, metric, and which of its numbers: `value`, `low`, `high` or `difference`."""
    above: bool
    """Whether it fails above the bound, not below."""
    bound: float

    def failure(self, numbers: Numbers) -> str | None:
        """Return why the evaluation fails, or `None`. A metric that was not measured fails: nothing was shown."""
        variant, role, metric, kind = self.path
        metrics = numbers.get(variant, {}).get(role, {})
        number = metrics.get(metric)
        measured = number.difference if number and kind == "difference" else number
        if number is None or measured is None:
            known = ", ".join(metrics) or "none"
            return f"{self.text}: {variant} has no {metric} on {role} prompts{did_you_mean(metric, metrics)}; measured: {known}"
        value: float = getattr(measured, "value" if kind == "difference" else kind)
        if (value > self.bound) if self.above else (value < self.bound):
            return f"{self.text}: it is {value:g} ({number.low:g} to {number.high:g}, {number.of} pictures)"
        return None


def read_condition(text: str, variants: Sequence[str]) -> FailCondition:
    """Read a condition: `VARIANT[.ROLE].METRIC[.low|.high|.difference]`, `>` or `<`, and a number.

    The role is `target` unless given; `erased.general.accuracy.difference<-0.05` fails where general prompts lose more than 5
    points of accuracy to the base.

    Raises:
        EsdLoraError: If it is not of that form, or names a variant that is not painted.
    """
    match = re.fullmatch(r"\s*([^<>]+?)\s*([<>])\s*(-?\d*\.?\d+(?:e-?\d+)?)\s*", text)
    if not match or "." not in match[1]:
        raise EsdLoraError(f"--fail-if {text!r}: expected VARIANT.METRIC>NUMBER or <, such as 'erased.accuracy>0.05'.")
    variant = next((name for name in sorted(variants, key=len, reverse=True) if match[1].startswith(f"{name}.")), None)
    if variant is None:
        first = match[1].partition(".")[0]
        raise EsdLoraError(
            f"--fail-if {text!r}: {first!r} is not painted{did_you_mean(first, variants)}. There are {', '.join(variants)}."
        )
    rest = match[1].removeprefix(f"{variant}.")
    role, _, metric = rest.partition(".")
    if role not in ROLES:
        role, metric = "target", rest
    name, _, kind = metric.rpartition(".")
    if kind not in ("low", "high", "difference"):
        name, kind = metric, "value"
    return FailCondition(text, (variant, role, name, kind), match[2] == ">", float(match[3]))


def compare_members(cases: Sequence[Case], scores: Scores, members: Sequence[Eraser]) -> StackNumbers | None:
    """Return how members of a stack do alone and together, by the first metric that is a rate; `None` if there is none."""
    metric = _rate_metric("erased", cases, scores)
    if metric is None:
        return None
    targets = [[case for case in cases if case.role == "target" and _erases(member, case)] for member in members]
    rest = [case for case in cases if case.role in ("neighbour", "general")]
    alone = [alone_name(member, i + 1) for i, member in enumerate(members)]
    growing = ["base", alone[0], *(first_name(count) for count in range(2, len(members))), "erased"]

    def rate(variant: str, own: Sequence[Case]) -> Number | None:
        return _measure_all(values_by_metric(variant, own, scores)).get(metric)

    return StackNumbers(
        metric=metric,
        members=tuple(
            MemberNumbers(
                name=", ".join(member.names), base=rate("base", own), alone=rate(name, own), together=rate("erased", own)
            )
            for member, name, own in zip(members, alone, targets, strict=True)
        ),
        matrix=tuple(tuple(rate(variant, own) for variant in (*alone, "erased")) for own in targets),
        kept=tuple(rate(variant, rest) for variant in growing),
    )


def paper_layout(
    suite: Suite, numbers: Numbers, cases: Sequence[Case], scores: Scores, members: Sequence[Eraser]
) -> dict[str, dict[str, float]]:
    """Return the numbers as a paper's table has them, for suites that follow one."""
    if suite.layout == "ua-ira-cra":
        return unlearning_accuracies(numbers)
    return erased_and_others(cases, scores, list(numbers), members) if suite.layout else {}


def unlearning_accuracies(numbers: Numbers) -> dict[str, dict[str, float]]:
    """Return UA, IRA and CRA by model: unlearning, in-domain and cross-domain retain accuracy.

    Zhang et al., *UnlearnCanvas*, NeurIPS 2024, arXiv:2402.11846: how often what was erased is not recognised on its prompts;
    how often the others of its kind are on theirs; how often what is of the other kind is there. The kind is that of the
    detector that scored the targets' `accuracy`.
    """
    layout: dict[str, dict[str, float]] = {}
    for name, roles in numbers.items():
        target, general = (
            {
                metric.removesuffix(".accuracy"): number.value
                for metric, number in roles.get(role, {}).items()
                if metric.endswith(".accuracy")
            }
            for role in ("target", "general")
        )
        own = next((kind for kind in target if kind in general), None)
        other = next((kind for kind in general if kind != own), None)
        if own is not None and other is not None:
            layout[name] = {"UA": 1 - target[own], "IRA": general[own], "CRA": general[other]}
    return layout


def erased_and_others(
    cases: Sequence[Case], scores: Scores, variants: Sequence[str], members: Sequence[Eraser] = ()
) -> dict[str, dict[str, float]]:
    """Return accuracy on the erased class and on all others, before and after: table 2 of the ESD paper (arXiv:2303.07345).

    Args:
        cases: All cases.
        scores: Of all pictures.
        variants: Models, `base` among them.
        members: Of a stack that was measured member by member: each is a row, with its own class erased and all others kept;
            the last row is their average. Otherwise each model but the base is a row.
    """
    metric = _rate_metric(variants[-1], cases, scores) if "base" in variants else None
    if metric is None:
        return {}
    rows: dict[str, Eraser | None] = {alone_name(member, i + 1): member for i, member in enumerate(members)}
    layout: dict[str, dict[str, float]] = {}
    for name, member in (rows or {variant: None for variant in variants if variant != "base"}).items():
        erased = {case.id for case in cases if (_erases(member, case) if member else case.role == "target")}
        row: dict[str, float] = {}
        for part, own in {
            "erased class": [case for case in cases if case.id in erased],
            "other classes": [case for case in cases if case.id not in erased],
        }.items():
            for when, variant in {"base": "base", "erased": name}.items():
                if values := list(values_by_metric(variant, own, scores).get(metric, {}).values()):
                    row[f"{part}, {when}"] = sum(values) / len(values)
        if len(row) == 4:  # a member may erase nothing that the suite has
            layout[name] = row
    if members and layout:
        heads = next(iter(layout.values()))
        layout["average"] = {head: sum(row[head] for row in layout.values()) / len(layout) for head in heads}
    return layout


def _erases(member: Eraser, case: Case) -> bool:
    return any(concept.named_in(case.label or case.prompt) for concept in member.header.concepts)


def _rate_metric(variant: str, cases: Sequence[Case], scores: Scores) -> str | None:
    """Return the first metric that is yes or no of every picture."""
    metrics = values_by_metric(variant, cases, scores).items()
    return next((metric for metric, values in metrics if all(isinstance(value, bool) for value in values.values())), None)
