"""An eraser in words: the model card that the Hub shows, filled from the header alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple

import yaml

from esd_lora.built_in import BUILT_IN
from esd_lora.erasers.describing import base_hash, effect, making, measured_numbers
from esd_lora.erasers.header import EraserHeader
from esd_lora.erasers.licences import Licence, base_licence
from esd_lora.erasers.measured import HEAD, INTERVALS, cells, markdown_cell, markdown_table
from esd_lora.recipe_files import dump_recipe
from esd_lora.wording import is_hub_id, mask_of, slug, without_article

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from esd_lora.erasers.header import EraserHeader

_TAGS = ("text-to-image", "diffusers", "lora", "template:sd-lora", "concept-erasure", "esd", "esd-lora")
_FAMILY_TAGS = {"sd": ["stable-diffusion", "stable-diffusion-diffusers"], "sdxl": ["stable-diffusion-xl"]}
_RECORD = ("sampler", "detectors", "files", "versions")  # of an evaluation, for the card
_RECIPE_LINES = 120  # longer ones are read in their own file
_FEW = 12  # concepts in a heading, tags for them, and prompts


class Sample(NamedTuple):
    """What the base and the eraser paint for one prompt and seed; places are relative to the card."""

    prompt: str
    erased: str
    base: str | None = None


class Publication(NamedTuple):
    """What a card on the Hub says beside the header."""

    repo: str
    licence: Licence
    revision: str | None = None
    """Branch, where it is not the main one."""
    samples: Sequence[Sample] = ()
    kohya: str | None = None
    """Place of the file for A1111, Forge and ComfyUI, if there is one."""
    sensitive: bool = False
    """Masks the concepts' names, and warns of the page."""

    @property
    def place(self) -> str:
        """As this toolkit takes it."""
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def render_card(header: EraserHeader, layers: int, ranks: Sequence[int] = (), published: Publication | None = None) -> str:
    """Renders the card in Markdown, with the YAML front matter that the Hub indexes.

    Args:
        header: Of the eraser.
        layers: How many it touches.
        ranks: Of its layers.
        published: Where it will stand; without, the card is one for its own directory.
    """
    front, recipe = _front(header, published), _recipe(header)
    samples = published.samples if published else ()
    mask: Callable[[str], str] = str
    if published and published.sensitive:
        mask, recipe = mask_of(name for concept in header.concepts for name in (concept.name, *concept.synonyms)), ""
        header, samples = masked_header(header, mask), [s._replace(prompt=mask(s.prompt)) for s in samples]
    if samples:
        front["widget"] = _widget(samples)
    place = _word(published.place if published else "path/to/this/folder")
    template = Template(Path(__file__).with_name("card.md").read_text("utf-8"))
    return template.substitute(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000),
        names=markdown_cell(_few([concept.name for concept in header.concepts])),
        effect=markdown_cell(effect(header.concepts)),
        base=_code(header.base),
        base_word=_word(header.base),
        place=place,
        gallery=_gallery(samples),
        diffusers=_diffusers(header, published),
        kohya=(
            f"take {_code(published.kohya)}"
            if published and published.kohya
            else f"make kohya's file with `esd-lora export {place} --layout kohya -o eraser.safetensors`"
        ),
        revision=f" at {_code(header.base_revision)}" if header.base_revision else "",
        weights=f", weights {_code(base_hash(header))}" if header.base_hashes else "",
        family=_code(header.family),
        prediction_type=markdown_cell(header.prediction_type or "unknown"),
        scope=_code(header.scope),
        objective=_code(header.objective),
        etas=", ".join("unknown" if eta is None else f"{eta:g}" for eta in dict.fromkeys(c.eta for c in header.concepts)),
        layers=layers,
        ranks=f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else str(*set(ranks)) or "unknown",
        steps=", ".join(str(n) for n in dict.fromkeys(recipe.train.steps for recipe in header.recipes)) or "unknown",
        pairs=_pairs(header),
        preserve=f"{len(header.preserve)}" if header.preserve else "none",
        created=markdown_cell(header.created),
        origin="".join(
            f"\n- {o.how.capitalize()} from {', '.join(map(_code, o.files))}: provenance unknown" for o in header.origins
        ),
        making="".join(f"\n- {line.capitalize()}" for line in making(header)),
        versions=", ".join(f"{markdown_cell(name)} {markdown_cell(version)}" for name, version in header.versions.items()),
        measured=mask(_measured(header)),
        licence=_licence(header.base, published),
        recipe=recipe,
    )


def _front(header: EraserHeader, published: Publication | None) -> dict[str, object]:
    """What the Hub indexes. No `instance_prompt`: its page would call that a trigger word."""
    front: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    tags = [*_TAGS, *_FAMILY_TAGS.get(header.family, [])]
    if published:
        front |= published.licence.front()
        tags += ["not-for-all-audiences"] if published.sensitive else [erases(c.name) for c in header.concepts[:_FEW]]
    front["tags"] = list(dict.fromkeys(tags))
    if is_hub_id(header.base):  # other bases have no page to point at
        front |= {"base_model": header.base, "base_model_relation": "adapter"}
    return front


def erases(concept: str) -> str:
    """The tag that erasers of a concept have, whatever its article and case."""
    return f"erases:{slug(without_article(concept)).casefold()}"


def _few(names: Sequence[str]) -> str:
    """Names with commas between; of many the first ones."""
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more


def _widget(samples: Sequence[Sample]) -> list[dict[str, object]]:
    """What the Hub shows on top of the page."""
    shown = [pair for s in samples for pair in ((f"{s.prompt} (base)", s.base), (s.prompt, s.erased))]
    return [{"text": text, "output": {"url": place}} for text, place in shown if place]


def _gallery(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    rows = [[markdown_cell(s.prompt), f"![]({s.base})" if s.base else "", f"![]({s.erased})"] for s in samples]
    return "\n" + markdown_table(["prompt", "base", "with the eraser"], rows) + "\n"


def _diffusers(header: EraserHeader, published: Publication | None) -> str:
    built_in = header.base in BUILT_IN
    base = (
        f"esd_lora.load_base({header.base!r}).pipe"
        if built_in
        else f'DiffusionPipeline.from_pretrained("{_word(header.base)}")'
    )
    lines = ["import esd_lora" if built_in else "from diffusers import DiffusionPipeline", "", f"pipe = {base}"]
    told = f', revision="{_word(published.revision)}"' if published and published.revision else ""
    place = _word(published.repo if published else "path/to/this/folder")
    return "\n".join([*lines, f'pipe.load_lora_weights("{place}"{told})', 'image = pipe("a prompt").images[0]'])


def _pairs(header: EraserHeader) -> str:
    shown = [pair for concept in header.concepts for pair in concept.pairs]
    rows = [[markdown_cell(prompt), markdown_cell(anchor) or "(empty prompt)"] for prompt, anchor in shown[:_FEW]]
    if len(shown) > len(rows):
        rows.append([f"and {len(shown) - len(rows)} more, in `recipe.yaml`", ""])
    return markdown_table(["erased prompt", "what should appear instead"], rows) if rows else "Its prompts are not known."


def _licence(base: str, published: Publication | None) -> str:
    theirs = base_licence(base)
    named = f"{_code(base)} ({theirs.told()})" if theirs else _code(base)
    terms = f"The terms of the base, {named}, hold for whoever uses the two together."
    return f"{published.licence.told()}. {terms}" if published else terms


def _recipe(header: EraserHeader) -> str:
    text = "---\n".join(dump_recipe(recipe) for recipe in header.recipes)
    if not text or text.count("\n") > _RECIPE_LINES:
        return ""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"\n## Recipe\n\n{fence}yaml\n{text}{fence}\n"


def _measured(header: EraserHeader) -> str:
    """What it does, in numbers, with all that they depend on."""
    found = header.evaluation
    if found is None:
        return "## What else it costs\n\nNot measured: neither what it removes nor what else it costs (`esd-lora evaluate`)."
    table = markdown_table(
        ["prompts", *HEAD], [[role, *cells(name, metric, n)] for role, name, metric, n in measured_numbers(found)]
    )
    notes = [
        f"- {name}: {yaml.safe_dump(found.record[name], width=1000, default_flow_style=True).strip()}"
        for name in _RECORD
        if found.record.get(name)
    ]
    notes += [f"- Not run: {name}, {reason}" for name, reason in found.not_run.items()]
    lines = "\n".join(map(markdown_cell, notes))
    head = "## Measured: is it gone, and what else does it cost?"
    return f"{head}\n\n{table}\n\nSuite {_code(found.suite)}, {markdown_cell(found.date)}. {INTERVALS}\n\n{lines}"


def _code(text: str) -> str:
    """Inline code in Markdown."""
    return f"`{_word(text)}`"


def _word(text: str) -> str:
    """A name as it may stand in code: what would end the code, a line or a string is left out."""
    return re.sub(r"[`\s\"'$\\<>|;&]+", " ", text).strip()


def masked_header(header: EraserHeader, mask: Callable[[str], str]) -> EraserHeader:
    """A header for showing: concepts and their prompts masked, and synonyms left out."""
    concepts = [
        concept.model_copy(
            update={
                "name": mask(concept.name),
                "synonyms": (),
                "pairs": tuple((mask(prompt), mask(anchor)) for prompt, anchor in concept.pairs),
            }
        )
        for concept in header.concepts
    ]
    origins = [o.model_copy(update={"files": {mask(name): digest for name, digest in o.files.items()}}) for o in header.origins]
    return header.model_copy(update={"concepts": tuple(concepts), "origins": tuple(origins)})
