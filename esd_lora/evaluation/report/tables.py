"""Tables: the numbers of a report as rows of text, and all of it in Markdown."""

from __future__ import annotations

from esd_lora.erasers.measured import HEAD, INTERVALS, TITLES, Numbers, cells, markdown_cell, markdown_table, role_rows
from esd_lora.evaluation.report.report import Report, StackNumbers

_MOST_ROWS = 60  # of a table by label that anyone reads


def markdown(report: Report) -> str:
    """Return a whole report as tables, one for each role, then one by label for each metric."""
    variants, labels = list(report.variants), report.labels
    parts = [f"# {report.suite}: {', '.join(map(markdown_cell, report.concepts)) or 'the base alone'}"]
    for role, title in TITLES.items():
        if rows := role_rows(report.variants, role):
            parts += [f"## {title}", markdown_table(HEAD, [cells(*row) for row in rows])]
    if report.layout:
        columns = list(next(iter(report.layout.values())))
        rows = [[name, *(f"{100 * row[column]:.1f} %" for column in columns)] for name, row in report.layout.items()]
        parts.append(markdown_table(["model", *columns], rows))
    for metric, rows in label_rows(labels, variants).items():
        head = [f"{metric} by label", *variants]
        parts.append(markdown_table(head, [[markdown_cell(label), *shares] for label, *shares in rows]))
    if report.stack:
        metric, kept = report.stack.metric, report.stack.kept
        rows = [[markdown_cell(name), *numbers] for name, *numbers in member_rows(report.stack)]
        parts += ["## Alone and together", markdown_table([f"{metric} on targets of", "base", "alone", "all together"], rows)]
        rows = [[str(count), number.text() if number else ""] for count, number in enumerate(kept)]
        parts.append(markdown_table(["erasers", f"{metric} on neighbours and the rest"], rows))
    for name, distances in report.distances.items():
        record = report.record["detectors"][name]
        rows = [[variant, f"{distance.value:g}", str(distance.of)] for variant, distance in distances.items()]
        parts += [f"## {record['metric']}, beside {record['beside']}", markdown_table(["model", name, "pictures"], rows)]
    if report.not_run:
        parts += ["## Not run", "\n".join(f"- {name}: {reason}" for name, reason in report.not_run.items())]
    return "\n\n".join([*parts, INTERVALS]) + "\n"


def member_rows(stack: StackNumbers) -> list[list[str]]:
    """Return members of a stack: name, and the rate of its targets on the base, alone and together."""
    rates = [(member.name, (member.base, member.alone, member.together)) for member in stack.members]
    return [[name, *(number.text() if number else "" for number in numbers)] for name, numbers in rates]


def label_rows(labels: Numbers, variants: list[str]) -> dict[str, list[list[str]]]:
    """Return for each metric that is a rate: label, then hits and pictures of every variant. None where labels are too many."""
    if len(labels) > _MOST_ROWS:
        return {}
    rates = dict.fromkeys(
        metric
        for by_variant in labels.values()
        for metrics in by_variant.values()
        for metric, number in metrics.items()
        if number.hits is not None
    )

    def share(label: str, variant: str, metric: str) -> str:
        number = labels[label].get(variant, {}).get(metric)
        return f"{number.hits}/{number.of}" if number else ""

    return {metric: [[label, *(share(label, v, metric) for v in variants)] for label in labels] for metric in rates}
