"""An eraser in words: the model card that the Hub shows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import yaml

from esd_lora.tables import HEAD, INTERVALS, TITLES, cells, markdown_cell, markdown_table, number, role_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from esd_lora.header import ErasedConcept, EraserHeader, Measured

_RECORD = ("sampler", "detectors", "files", "versions")  # of an evaluation, for the card
_TAGS = {"sd": ["stable-diffusion", "stable-diffusion-diffusers"]}

_CARD = """---
{front}---

# Eraser: {names}

A LoRA for `{base}` that {effect}. It has no trigger word: load it and prompt as before.

```python
pipe.load_lora_weights("path/to/this/folder")
```

{pairs}

- Base: `{base}`{revision}, family `{family}`, {prediction_type} prediction
- Scope `{scope}`, objective `{objective}`, eta {etas}, {layers} layers
- Prompts held in place during training: {preserve}
- Made {created} with {versions}{origin}{making}

{measured}

Whoever holds both the base and this file can leave the file out. To ship a model without the concept, merge it:
`esd-lora merge path/to/this/folder --base {base} -o merged`.
"""


def render_card(header: EraserHeader, layers: int) -> str:
    """Renders the card in Markdown, with the YAML front matter that the Hub indexes (FORMATS: model cards)."""
    names = ", ".join(concept.name for concept in header.concepts)
    front: dict[str, object] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "concept-erasure", "esd-lora", *_TAGS.get(header.family, [])],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", header.base):  # a Hub id; other bases have no page to point at
        front |= {"base_model": header.base, "base_model_relation": "adapter"}
    shown = [(prompt, anchor) for concept in header.concepts for prompt, anchor in concept.pairs][:12]
    rows = [[markdown_cell(prompt), markdown_cell(anchor) or "(empty prompt)"] for prompt, anchor in shown]
    total = sum(len(concept.pairs) for concept in header.concepts)
    if total > len(shown):
        rows.append([f"and {total - len(shown)} more, in `recipe.yaml`", ""])
    pairs = markdown_table(["erased prompt", "what should appear instead"], rows) if rows else "Its prompts are not known."
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        names=names,
        effect=effect(header.concepts),
        base=header.base,
        revision=f" at `{header.base_revision}`" if header.base_revision else "",
        family=header.family,
        prediction_type=header.prediction_type or "unknown",
        scope=header.scope,
        objective=header.objective,
        etas=", ".join("unknown" if eta is None else f"{eta:g}" for eta in dict.fromkeys(c.eta for c in header.concepts)),
        layers=layers,
        pairs=pairs,
        preserve=f"{len(header.preserve)}" if header.preserve else "none",
        created=header.created,
        origin="".join(
            f"\n- {o.how.capitalize()} from {', '.join(map(_code, o.files))}: provenance unknown" for o in header.origins
        ),
        making="".join(f"\n- {line.capitalize()}" for line in making(header)),
        versions=", ".join(f"{name} {version}" for name, version in header.versions.items()),
        measured=_measured(header),
    )


def effect(concepts: Sequence[ErasedConcept]) -> str:
    """What the eraser does to a base, concept by concept, strengths included where they are not 1."""

    def told(chosen: list[ErasedConcept]) -> str:
        return ", ".join(
            c.name if c.weight == 1 and not c.blocks else f"{c.name} (at strength {c.weight:g}{_blocks(c)})" for c in chosen
        )

    removed, amplified = [c for c in concepts if c.weight >= 0], [c for c in concepts if c.weight < 0]
    effects = [f"removes {told(removed)}"] * bool(removed) + [f"amplifies {told(amplified)}"] * bool(amplified)
    return " and ".join(effects)


def making(header: EraserHeader) -> list[str]:
    """How a stack was fused and harmonised, a line each."""
    lines: list[str] = []
    for fusion in header.fusions:
        text = (
            f"fused from {len(fusion.members)} erasers beside {fusion.kept} kept prompts (lam {fusion.lam:g}, mu {fusion.mu:g})"
        )
        if fusion.objective is not None:
            text += f": objective {fusion.objective:.2f} of no update's, plain sum {fusion.objective_summed:.2f}"
        lines.append(f"{text}; {fusion.evaluations} evaluations of the base, {fusion.seconds:.0f} s")
    for spent in header.distillations:
        text = f"harmonised in {spent.steps} steps"
        if spent.last_loss is not None:
            text += f": loss {spent.first_loss:.2g} to {spent.last_loss:.2g}"
        lines.append(f"{text}; {spent.evaluations} evaluations, {spent.seconds:.0f} s")
    return lines


def _measured(header: EraserHeader) -> str:
    """What it does, in numbers, with all that they depend on."""
    found = header.evaluation
    if found is None:
        return "What it removes, and what else it costs, was not measured (`esd-lora evaluate`)."
    table = markdown_table(["prompts", *HEAD], [[role, *cells(name, metric, n)] for role, name, metric, n in _numbers(found)])
    notes = [
        f"- {name}: {yaml.safe_dump(found.record[name], width=1000, default_flow_style=True).strip()}"
        for name in _RECORD
        if name in found.record
    ]
    notes += [f"- Not run: {name}, {reason}" for name, reason in found.not_run.items()]
    lines = "\n".join(map(markdown_cell, notes))
    return f"## Measured\n\n{table}\n\nSuite {_code(found.suite)}, {markdown_cell(found.date)}. {INTERVALS}\n\n{lines}"


def measured(header: EraserHeader) -> str:
    """The numbers on what was erased, in a line."""
    found = header.evaluation
    if found is None:
        return "no"
    targets = [f"{metric} {number(n)} ({name})" for role, name, metric, n in _numbers(found) if role == "target"]
    return f"suite {found.suite}, {found.date}: {'; '.join(targets)}"


def _numbers(found: Measured) -> list[tuple[str, str, str, Mapping[str, Any]]]:
    """Role, model, metric and number of everything measured."""
    plain = found.model_dump(exclude_none=True)["variants"]
    return [(role, *row) for role in TITLES for row in role_rows(plain, role)]


def _blocks(concept: ErasedConcept) -> str:
    return "".join(f", {block} x {factor:g}" for block, factor in concept.blocks.items())


def _code(text: str) -> str:
    """Inline code in Markdown."""
    return f"`{text.replace('`', '')}`"
