"""An eraser in words: the model card that the Hub shows, and the few lines that `inspect` prints."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from esd_lora.eraser import Eraser, EraserHeader

_TAGS = {"sd": ["stable-diffusion", "stable-diffusion-diffusers"]}

_CARD = """---
{front}---

# Eraser: {names}

A LoRA that **removes** {names} from `{base}`. It has no trigger word: load it and prompt as before.

```python
pipe.load_lora_weights("path/to/this/folder")
```

| erased prompt | what should appear instead |
|---|---|
{pairs}

- Base: `{base}`{revision}, family `{family}`, {prediction_type} prediction
- Scope `{scope}`, objective `{objective}`, eta {etas}, {layers} layers
- Prompts held in place during training: {preserve}
- Made {created} with {versions}

Whoever holds both the base and this file can leave the file out. To ship a model without the concept, merge it:
`esd-lora merge path/to/this/folder --base {base} -o merged`.
"""


def render_card(header: EraserHeader) -> str:
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
    cells = [[" ".join(text.replace("|", "\\|").split()) for text in pair] for pair in shown]
    rows = [f"| {prompt} | {anchor or '(empty prompt)'} |" for prompt, anchor in cells]
    total = sum(len(concept.pairs) for concept in header.concepts)
    if total > len(rows):
        rows.append(f"| and {total - len(rows)} more, in `recipe.yaml` | |")
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        names=names,
        base=header.base,
        revision=f" at `{header.base_revision}`" if header.base_revision else "",
        family=header.family,
        prediction_type=header.prediction_type,
        scope=header.scope,
        objective=header.objective,
        etas=", ".join(f"{eta:g}" for eta in dict.fromkeys(concept.eta for concept in header.concepts)),
        layers=len(header.base_hashes),
        pairs="\n".join(rows),
        preserve=f"{len(header.preserve)}" if header.preserve else "none",
        created=header.created,
        versions=", ".join(f"{name} {version}" for name, version in header.versions.items()),
    )


def describe(eraser: Eraser) -> dict[str, str]:
    """What an eraser removes and where it came from, a line a topic."""
    header = eraser.header
    ranks = sorted({pair.rank for pair in eraser.pairs.values()})
    size = sum(tensor.nbytes for tensor in eraser.state_dict().values())
    return {
        "erases": ", ".join(f"{c.name} (eta {c.eta:g}, weight {c.weight:g})" for c in header.concepts),
        "prompts": "; ".join(f"{p!r} -> {a!r}" for c in header.concepts for p, a in c.pairs[:3]),
        "preserves": f"{len(header.preserve)} prompts",
        "base": f"{header.base}{'@' + header.base_revision if header.base_revision else ''}"
        f" (family {header.family}, {header.prediction_type})",
        "scope": f"{header.scope}: {len(eraser.pairs)} layers, rank {', '.join(map(str, ranks))}, {size / 1000:.0f} kB",
        "trained": f"objective {header.objective}, " + ", ".join(f"{k} {v:g}" for k, v in header.cost.items()),
        "made": f"{header.created}, format {header.format}, " + ", ".join(f"{k} {v}" for k, v in header.versions.items()),
    }
