"""The demo's page: pictures first, then the table, in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>esd-lora: what was erased, what was kept</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1a1a1a }
img { max-width: 100%; height: auto; image-rendering: pixelated; border: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } td.low { background: #fde2e1 } .scroll { overflow-x: auto }
small, p.note { color: #555 }
</style></head><body>
<h1>Erased: {{ summary.erased.object }} and the {{ summary.erased.style }} style</h1>
<p>Same prompts and seeds in every row: the base as it is, with one eraser, with both stacked, with both merged.</p>
<img src="data:image/png;base64,{{ picture }}" alt="Grid of pictures: one row a model, one column a prompt">
<h2>What the judge saw</h2>
<table><tr>{% for cell in lines[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for line in lines[1:] %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<p class="note">"Left" is the share of pictures, on prompts no eraser was trained on, where the judge still names the erased
object or style. "Object right" is counted on the prompts of the erased style. "Kept" is the share of all other pictures
with object and style both right, relative to the base on the same prompts and seeds. The judge has no answer "none of
these": a picture of nothing gets the nearest name.</p>
<h2>Every concept</h2>
{% for kind in ["styles", "objects"] %}
<div class="scroll"><table><tr><th>{{ kind }}</th>
{% for name in summary.models %}<th>{{ name }}</th>{% endfor %}</tr>
{% for concept in summary.models.base[kind] %}<tr><td>{{ concept }}</td>
{% for model in summary.models.values() %}{% set c = model[kind][concept] %}
<td{% if c.share < 0.9 %} class="low"{% endif %}>{{ c.hits }}/{{ c.of }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% endfor %}
<p><small>Training: {{ summary.training.object.seconds }} s and {{ summary.training.style.seconds }} s; whole demo
{{ summary.seconds }} s.
{% for name, number in summary.versions.items() %}{{ name }} {{ number }}{{ ", " if not loop.last }}{% endfor %}.
Sampling: DDIM, {{ summary.sampling.steps }} steps, guidance {{ summary.sampling.guidance }}.</small></p>
</body></html>
"""


def table(summary: dict[str, Any]) -> list[list[str]]:
    """The summary's main figures as rows of text, the head first."""
    lines = [["model", f"{summary['erased']['object']} left", f"{summary['erased']['style']} left", "object right", "kept"]]
    for name, model in summary["models"].items():
        counts = [model["object_left"], model["style_left"], model["object_right_on_style_prompts"]]
        lines.append([name, *(f"{c['share']:.1%} of {c['of']}" for c in counts), f"{model['kept']:.1%}"])
    return lines


def write_report(path: Path, picture: Path, lines: list[list[str]], summary: dict[str, Any]) -> None:
    """Writes the page.

    Args:
        path: The HTML file to write.
        picture: PNG that is built into the page.
        lines: From `table`.
        summary: What `summary.json` holds.
    """
    encoded = base64.b64encode(picture.read_bytes()).decode()
    page = Environment(autoescape=True).from_string(_PAGE).render(lines=lines, summary=summary, picture=encoded)
    path.write_text(page, "utf-8")
