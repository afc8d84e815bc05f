"""The page of an evaluation: numbers with their intervals, and pictures before and after, in one file that opens anywhere.

It holds no script and asks for nothing from outside; whatever a prompt, a label or a path says is escaped.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from esd_lora.erasers.measured import TITLES, difference, number, role_rows
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.scoring import Scores, open_painted
from esd_lora.evaluation.stacks import heat_map
from esd_lora.evaluation.suite_files import ROLES, Suite
from esd_lora.evaluation.tables import label_tables, member_rows

_SAMPLES = 10  # pictures of each role on the page
_SIDE = 256  # pixels; larger ones are made smaller for the page
_COLOURS = ("#8a8a8a", "#b3452c", "#2f6f9f", "#5b8c3e", "#8d5a97", "#b8860b")


def page(
    summary: Mapping[str, Any],
    suite: Suite,
    asked: Sequence[Asked],
    scores: Scores,
    pictures: Mapping[str, Mapping[str, Path]],
) -> str:
    """Renders the page.

    Args:
        summary: What `summary.json` holds.
        suite: Says whether pictures are blurred.
        asked: All prompts.
        scores: Of all pictures.
        pictures: Variant to case to file.
    """
    variants: Mapping[str, Any] = summary["variants"]
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(variants)}
    sections: list[dict[str, Any]] = []
    for role in ROLES:
        some = [one for one in asked if one.role == role]
        if not some:
            continue
        rows = role_rows(variants, role)
        bars = [
            {"name": f"{metric}, {name}", "colour": colours[name], **found} for name, metric, found in rows if "hits" in found
        ]
        chosen = [some[i * len(some) // min(_SAMPLES, len(some))] for i in range(min(_SAMPLES, len(some)))]
        samples = [
            {
                **one._asdict(),
                "shown": [_shown(of[one.case], one, name, scores) for name, of in pictures.items() if one.case in of],
            }
            for one in chosen
        ]
        cells = [[name, metric, number(n), difference(n), n["of"]] for name, metric, n in rows]
        sections.append({"title": TITLES[role], "bars": bars, "rows": cells, "samples": samples})
    template = Path(__file__).with_name("page.html").read_text("utf-8")
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            summary=summary,
            description=suite.description,
            sensitive=suite.sensitive,
            cards=_cards(variants),
            sections=sections,
            columns=list(pictures),
            stack=_stack(summary["stack"]),
            labels=label_tables(summary["labels"], list(variants)),
            record=json.dumps(summary["record"], indent=1, ensure_ascii=False),
        )
    )


def _stack(found: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of members alone and together."""
    if not found:
        return {}
    kept = [share for share in found["kept"] if share]
    return {"members": member_rows(found), "kept": kept, "picture": base64.b64encode(heat_map(found)).decode()}


def _cards(variants: Mapping[str, Any]) -> list[dict[str, str]]:
    """The first metric of each role, of the erased model where there is one."""
    last = "erased" if "erased" in variants else list(variants)[-1]
    cards: list[dict[str, str]] = []
    for role in ROLES:
        for metric, found in list(variants[last].get(role, {}).items())[:1]:
            value, _, interval = number(found).partition(" (")
            before = variants.get("base", {}).get(role, {}).get(metric) if last != "base" else None
            cards.append(
                {
                    "title": f"{role}: {metric}",
                    "number": value,
                    "interval": f"{interval.replace(')', '')}, of {found['of']}",
                    "before": number(before).partition(" (")[0] if before else "",
                }
            )
    return cards


def _shown(file: Path, one: Asked, variant: str, scores: Scores) -> dict[str, Any]:
    """A picture of the sheet, built in, with what was said of it."""
    image = open_painted(file)
    small = max(image.size) < _SIDE
    image.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    kind = "png" if small else "jpeg"
    image.save(content, kind)
    found = scores[variant, one.case].values()
    seen = [str(score.details["seen"]) for score in found if "seen" in score.details]
    said = {metric: value for score in found for metric, value in score.values.items()}
    words = [f"{metric}: {'yes' if v else 'no'}" if isinstance(v, bool) else f"{metric}: {v:.3g}" for metric, v in said.items()]
    return {
        "variant": variant,
        "data": f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}",
        "small": small,
        "alt": f"{variant}: {one.prompt}",
        "caption": ", ".join(seen) or "; ".join(words[:4]),
    }
