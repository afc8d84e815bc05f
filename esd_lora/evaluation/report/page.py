"""The page of an evaluation: numbers with their intervals, and pictures before and after, in one file that opens anywhere.

It holds no script and asks for nothing from outside; whatever a prompt, a label or a path says is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from esd_lora.erasers.measured import NOTHING, REST, TITLES, Numbers, role_rows, worst_line
from esd_lora.evaluation.cases import ROLES, Case
from esd_lora.evaluation.picture_files import open_painted
from esd_lora.evaluation.report.report import Report, StackNumbers, label_rows, member_rows
from esd_lora.evaluation.scoring import Pictures, Scores
from esd_lora.evaluation.suites.suite_files import Suite
from esd_lora.pictures import data_uri, heat_maps, png
from esd_lora.wording import printable_value

_SAMPLES = 10  # pictures of each role on the page
_SIDE = 256  # pixels; larger ones are made smaller for the page
_COLOURS = ("#8a8a8a", "#b3452c", "#2f6f9f", "#5b8c3e", "#8d5a97", "#b8860b")


def render_page(report: Report, suite: Suite, cases: Sequence[Case], scores: Scores, pictures: Pictures) -> str:
    """Render the page as HTML.

    Args:
        report: All numbers.
        suite: Its description, and whether pictures are blurred.
        cases: All cases.
        scores: Of all pictures.
        pictures: Their files.
    """
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(report.variants)}
    sections: list[dict[str, Any]] = []
    for role in ROLES:
        own = [case for case in cases if case.role == role]
        if not own:
            continue
        rows = role_rows(report.variants, role)
        chosen = [own[i * len(own) // min(_SAMPLES, len(own))] for i in range(min(_SAMPLES, len(own)))]
        sections.append(
            {
                "title": TITLES[role],
                "bars": [(f"{metric}, {name}", colours[name], n) for name, metric, n in rows if n.hits is not None],
                "rows": [[name, metric, n.text(), n.difference_text(), n.of] for name, metric, n in rows],
                "note": REST if any(metric == "rest" for _, metric, _ in rows) else "",
                "samples": [
                    (case, [_show(files[case.id], case, name, scores) for name, files in pictures.items() if case.id in files])
                    for case in chosen
                ],
            }
        )
    template = Environment(autoescape=True, finalize=printable_value).from_string(
        Path(__file__).with_name("page.html").read_text("utf-8")
    )
    return template.render(
        report=report,
        nothing=NOTHING,
        worst=worst_line(report.worst) if report.worst else "",
        suite=suite,
        cards=_cards(report.variants),
        sections=sections,
        columns=list(pictures),
        labels=label_rows(report.labels, list(report.variants)),
        members=member_rows(report.stack) if report.stack else [],
        kept=[number for number in report.stack.kept if number] if report.stack else [],
        matrix=base64.b64encode(heat_map(report.stack)).decode() if report.stack else "",
        record=json.dumps(report.record, indent=1, ensure_ascii=False),
    )


def heat_map(stack: StackNumbers) -> bytes:
    """Return the matrix of a stack as a picture, PNG: rows are targets of a member, columns the members that were on."""
    rates = [[number.value if number else 0.0 for number in row] for row in stack.matrix]
    return png(heat_maps({stack.metric: rates}, [member.name for member in stack.members], last_column="all"))


def _cards(numbers: Numbers) -> list[dict[str, str]]:
    """Return the first metric of each role, of the erased model where there is one."""
    last = "erased" if "erased" in numbers else next(reversed(numbers), "base")
    cards: list[dict[str, str]] = []
    for role in ROLES:
        for metric, number in list(numbers.get(last, {}).get(role, {}).items())[:1]:
            value, _, interval = number.text().partition(" (")
            base = numbers.get("base", {}).get(role, {}).get(metric) if last != "base" else None
            cards.append(
                {
                    "title": f"{role}: {metric}",
                    "number": value,
                    "interval": f"{interval.replace(')', '')}, of {number.of}",
                    "before": base.text().partition(" (")[0] if base else "",
                }
            )
    return cards


def _show(file: Path, case: Case, variant: str, scores: Scores) -> dict[str, Any]:
    """Return a picture of the page, embedded, with its scores as a caption."""
    image = open_painted(file)
    small = max(image.size) < _SIDE
    own = scores[variant, case.id].values()
    seen = [str(score.details["seen"]) for score in own if "seen" in score.details]
    values = {metric: value for score in own for metric, value in score.values.items()}
    words = [f"{m}: {'yes' if v else 'no'}" if isinstance(v, bool) else f"{m}: {v:.3g}" for m, v in values.items()]
    return {
        "variant": variant,
        "data": data_uri(image, _SIDE),
        "small": small,
        "alt": f"{variant}: {case.prompt}",
        "caption": ", ".join(seen) or "; ".join(words[:4]),
    }
