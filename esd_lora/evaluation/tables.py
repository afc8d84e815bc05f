"""Numbers of an evaluation in words and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esd_lora.erasers.measured import HEAD, INTERVALS, TITLES, cells, markdown_cell, markdown_table, number, role_rows

_ROWS = 60  # of a table by label that anyone reads


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
