"""Numbers of an evaluation in words and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "target": "Target: prompts about what was erased",
    "paraphrase": "Paraphrase: the same in other words",
    "neighbour": "Neighbour: what lies close to it",
    "general": "General: everything else",
}
"""What the roles mean."""
INTERVALS = (
    "Rates have Wilson's interval, means and differences a bootstrap one over prompts, all of 95 %. Differences are paired by"
    " prompt and seed."
)
HEAD = ("model", "metric", "measured", "beside the base", "pictures")
"""Of a table of `cells`."""
_ROWS = 60  # of a table by label that anyone reads


def number(found: Mapping[str, Any]) -> str:
    """A measured number with its interval: `5.0 % (1.7 to 13.7)`, `0.25 (0 to 0.75), 1 in all`."""
    if "hits" in found:
        return f"{100 * found['value']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
    whole = f", {found['sum']} in all" if "sum" in found else ""
    return f"{found['value']:.4g} ({found['low']:.4g} to {found['high']:.4g}){whole}"


def difference(found: Mapping[str, Any]) -> str:
    """The paired difference from the base, in points for rates; empty where there is none."""
    if "difference" not in found:
        return ""
    scale, unit, form = (100, " points", "+.1f") if "hits" in found else (1, "", "+.4g")
    value, low, high = (format(scale * found["difference"][key], form) for key in ("value", "low", "high"))
    return f"{value}{unit} ({low} to {high})"


def cells(model: str, metric: str, found: Mapping[str, Any]) -> list[str]:
    """A row of a table of numbers."""
    return [markdown_cell(model), markdown_cell(metric), number(found), difference(found), str(found["of"])]


def markdown(summary: Mapping[str, Any]) -> str:
    """The whole summary as tables, one for each role, then one by label for each metric."""
    variants: Mapping[str, Any] = summary["variants"]
    parts = [f"# {summary['suite']}: {', '.join(map(markdown_cell, summary['concepts'])) or 'the base alone'}"]
    for role, title in TITLES.items():
        if rows := role_rows(variants, role):
            parts.append(f"## {title}")
            parts.append(markdown_table(HEAD, [cells(*row) for row in rows]))
    if summary["layout"]:
        names = list(next(iter(summary["layout"].values())))
        rows = [[name, *(f"{100 * found[key]:.1f} %" for key in names)] for name, found in summary["layout"].items()]
        parts.append(markdown_table(["model", *names], rows))
    for metric, rows in label_tables(summary["labels"], list(variants)).items():
        parts.append(
            markdown_table([f"{metric} by label", *variants], [[markdown_cell(label), *shares] for label, *shares in rows])
        )
    if summary["stack"]:
        parts += _stack(summary["stack"])
    for name, found in summary["distances"].items():
        metric = summary["record"]["detectors"][name]
        parts.append(f"## {metric['metric']}, beside {metric['beside']}")
        parts.append(
            markdown_table(["model", name, "pictures"], [[v, f"{n['value']:g}", str(n["of"])] for v, n in found.items()])
        )
    if summary["not_run"]:
        parts.append("## Not run")
        parts.append("\n".join(f"- {name}: {reason}" for name, reason in summary["not_run"].items()))
    parts.append(INTERVALS)
    return "\n\n".join(parts) + "\n"


def unlearning_accuracies(variants: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """UA, IRA and CRA by model: unlearning, in-domain and cross-domain retain accuracy.

    Zhang et al., *UnlearnCanvas*, NeurIPS 2024, arXiv:2402.11846: how often what was erased is not recognised on its prompts;
    how often the others of its kind are on theirs; how often what is of the other kind is there. The kind is told by the
    detector that scored the targets' `accuracy`.
    """
    out: dict[str, dict[str, float]] = {}
    for name, roles in variants.items():
        target, general = (
            {
                metric.removesuffix(".accuracy"): n["value"]
                for metric, n in roles.get(role, {}).items()
                if metric.endswith(".accuracy")
            }
            for role in ("target", "general")
        )
        own = next((kind for kind in target if kind in general), None)
        other = next((kind for kind in general if kind != own), None)
        if own is not None and other is not None:
            out[name] = {"UA": 1 - target[own], "IRA": general[own], "CRA": general[other]}
    return out


def member_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Members of a stack: name, and how its targets do on the base, alone and together."""
    keys = ("base", "alone", "together")
    return [[member["name"], *(number(member[key]) if member[key] else "" for key in keys)] for member in found["members"]]


def _stack(found: Mapping[str, Any]) -> list[str]:
    """Members alone and together, and what is kept by their number."""
    metric = found["metric"]
    rows = [[markdown_cell(name), *numbers] for name, *numbers in member_rows(found)]
    kept = [[str(count), number(n) if n else ""] for count, n in enumerate(found["kept"])]
    return [
        "## Alone and in company",
        markdown_table([f"{metric} on targets of", "base", "alone", "all together"], rows),
        markdown_table(["erasers", f"{metric} on neighbours and the rest"], kept),
    ]


def role_rows(variants: Mapping[str, Any], role: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Variant, metric and number of one role, variants of a metric side by side."""
    metrics = dict.fromkeys(metric for found in variants.values() for metric in found.get(role, {}))
    found = ((name, metric, variants[name].get(role, {}).get(metric)) for metric in metrics for name in variants)
    return [(name, metric, number) for name, metric, number in found if number]


def label_tables(labels: Mapping[str, Any], variants: Sequence[str]) -> dict[str, list[list[str]]]:
    """For each metric that says yes or no: label, then hits and pictures of every variant. None where labels are too many."""
    if len(labels) > _ROWS:
        return {}
    metrics = dict.fromkeys(
        metric for found in labels.values() for said in found.values() for metric, number in said.items() if "hits" in number
    )
    return {
        metric: [[label, *(_share(found.get(name, {}).get(metric)) for name in variants)] for label, found in labels.items()]
        for metric in metrics
    }


def _share(found: Mapping[str, Any] | None) -> str:
    return f"{found['hits']}/{found['of']}" if found else ""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells are escaped already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_cell(text: str) -> str:
    """A user's text as it may stand in a cell, or anywhere in Markdown: no line breaks, HTML, links, pictures, or emphasis."""
    return " ".join(re.sub(r"([\\|\[\]*`~]|(?<!\w)_|_(?!\w))", r"\\\1", text).replace("<", "&lt;").split())
