"""From scores to numbers: rates and means with intervals, differences from the base, gates that fail."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.evaluation.detectors import AND
from esd_lora.evaluation.intervals import Interval, paired_difference, wilson
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.scoring import Scores
from esd_lora.evaluation.suite_files import ROLES

_DIGITS = 6
_LABELS = 1000  # more than ImageNet has classes are no classes


def summarise(asked: Sequence[Asked], scores: Scores, variants: Sequence[str]) -> dict[str, Any]:
    """The numbers of an evaluation, by variant, then role, then metric.

    A metric that says yes or no of each picture becomes a rate with Wilson's interval, another one a mean with a bootstrap
    interval; beside the base's, each has its difference from it, paired by prompt and seed (see `intervals`).
    """
    out: dict[str, Any] = {}
    for variant in variants:
        for role in ROLES:
            some = [one for one in asked if one.role == role]
            before = columns("base", some, scores) if variant != "base" else {}
            for metric, column in columns(variant, some, scores).items():
                measured = number(list(column.values()))
                base = before.get(metric, {})
                if both := [case for case in column if case in base]:
                    after, before_it = [float(column[case]) for case in both], [float(base[case]) for case in both]
                    measured["difference"] = _rounded(paired_difference(after, before_it))
                out.setdefault(variant, {}).setdefault(role, {})[metric] = measured
    return out


def by_label(asked: Sequence[Asked], scores: Scores, variants: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """The same for every part of a label: part, then variant, then metric. Empty where labels are too many to be classes."""
    parts: dict[str, list[Asked]] = {}
    for one in asked:
        for part in one.label.split(AND) if one.label else ():
            parts.setdefault(part, []).append(one)
    if len(parts) > _LABELS or len(parts) >= len(asked):
        return {}
    return {
        part: {
            variant: {metric: number(list(column.values())) for metric, column in columns(variant, some, scores).items()}
            for variant in variants
        }
        for part, some in parts.items()
    }


def columns(variant: str, some: Sequence[Asked], scores: Scores) -> dict[str, dict[str, bool | float]]:
    """What one variant was said to show on some prompts: metric to case to value."""
    out: dict[str, dict[str, bool | float]] = {}
    for one in some:
        for score in scores.get((variant, one.case), {}).values():
            for metric, value in score.values.items():
                out.setdefault(metric, {})[one.case] = value
    return out


def number(values: Sequence[bool | float]) -> dict[str, Any]:
    """A rate with hits, or a mean, with its interval and how many pictures it is of; of counts the sum, too."""
    if all(isinstance(value, bool) for value in values):
        hits = sum(map(bool, values))
        return {**_rounded(wilson(hits, len(values))), "hits": hits, "of": len(values)}
    found = {**_rounded(paired_difference([float(v) for v in values], [0.0] * len(values))), "of": len(values)}
    return found | ({"sum": sum(values)} if all(isinstance(value, int) for value in values) else {})


def _rounded(interval: Interval) -> dict[str, float]:
    return {name: round(value, _DIGITS) for name, value in interval._asdict().items()}


class Gate(NamedTuple):
    """A condition under which an evaluation counts as failed: `erased.accuracy>0.05`."""

    text: str
    path: tuple[str, ...]
    above: bool
    bound: float


def read_gate(text: str, variants: Sequence[str]) -> Gate:
    """Reads a gate: `VARIANT[.ROLE].METRIC[.low|.high|.difference]`, `>` or `<`, and a number.

    The role is `target` unless said; `erased.general.accuracy.difference<-0.05` fails where general prompts lose more than 5
    points of accuracy to the base.

    Raises:
        EsdLoraError: If it is not of that form, or names a variant that is not painted.
    """
    found = re.fullmatch(r"\s*([^<>]+?)\s*([<>])\s*(-?\d*\.?\d+(?:e-?\d+)?)\s*", text)
    if not found or "." not in found[1]:
        raise EsdLoraError(f"--fail-if {text!r}: expected VARIANT.METRIC>NUMBER or <, such as 'erased.accuracy>0.05'.")
    variant = next((name for name in sorted(variants, key=len, reverse=True) if found[1].startswith(f"{name}.")), None)
    if variant is None:
        first = found[1].partition(".")[0]
        raise EsdLoraError(
            f"--fail-if {text!r}: {first!r} is not painted{did_you_mean(first, variants)}. There are {', '.join(variants)}."
        )
    rest = found[1].removeprefix(f"{variant}.")
    role, _, metric = rest.partition(".")
    if role not in ROLES:
        role, metric = "target", rest
    metric, kind = next(
        ((metric.removesuffix(f".{end}"), end) for end in ("low", "high", "difference") if metric.endswith(f".{end}")),
        (metric, "value"),
    )
    return Gate(text, (variant, role, metric, kind), found[2] == ">", float(found[3]))


def failed(gate: Gate, summary: Mapping[str, Any]) -> str | None:
    """Why a gate fails, or `None`. One whose metric was not measured fails: nothing was shown."""
    variant, role, metric, kind = gate.path
    metrics = summary.get(variant, {}).get(role, {})
    if metric not in metrics or (kind == "difference" and "difference" not in metrics[metric]):
        known = ", ".join(metrics) or "none"
        return f"{gate.text}: {variant} has no {metric} on {role} prompts{did_you_mean(metric, metrics)}; measured: {known}"
    found = metrics[metric]
    value = found["difference"]["value"] if kind == "difference" else found[kind]
    if (value > gate.bound) if gate.above else (value < gate.bound):
        return f"{gate.text}: it is {value:g} ({found['low']:g} to {found['high']:g}, {found['of']} pictures)"
    return None
