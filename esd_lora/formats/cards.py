"""An eraser in words: the model card that the Hub shows, filled from the header alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import yaml

from esd_lora.built_in import BUILT_IN
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept, EraserHeader
from esd_lora.erasers.measured import (
    HEAD,
    INTERVALS,
    NOTHING,
    TITLES,
    Measured,
    Number,
    cells,
    markdown_cell,
    markdown_table,
    role_rows,
    worst_line,
)
from esd_lora.families import FAMILIES
from esd_lora.files import write_files
from esd_lora.formats.licenses import License, base_license
from esd_lora.wording import HubId, in_one_line, is_hub_id, mask_of, slug, without_article
from esd_lora.yaml_files import dump_yaml

CARD_NAME = "README.md"
_TAGS = ("text-to-image", "diffusers", "lora", "template:sd-lora", "concept-erasure", "esd", "esd-lora")
_RECORD = ("sampler", "detectors", "files", "versions")  # of an evaluation, for the card
_MAX_RECIPE_LINES = 120  # longer ones are read in their own file
_MAX_LISTED = 12  # concepts in a heading, tags for them, and prompts
_HERE = "path/to/this/folder"


class Sample(NamedTuple):
    """What the base and the eraser paint for one prompt and seed; files are relative to the card."""

    prompt: str
    erased: str
    base: str | None = None


class Publication(NamedTuple):
    """What a card on the Hub says beyond the header."""

    hub_id: HubId
    """Repository, and its branch where that is not the main one."""
    license: License
    samples: Sequence[Sample] = ()
    kohya: str | None = None
    """File for A1111, Forge and ComfyUI in the repository, if there is one."""
    sensitive: bool = False
    """Mask the concepts' names, and warn of the page."""


def save_with_card(
    eraser: Eraser, directory: str | Path, more: Mapping[str, bytes | Path] | None = None, replaces: Collection[str] = ()
) -> Path:
    """Write an eraser's directory for people, its model card included, and return it; the files appear together or not at all.

    Args:
        eraser: The eraser.
        directory: Made when missing. Files of other names in it are left alone.
        more: Further files, by name: their content, or a file that is copied.
        replaces: Names of files of an earlier eraser that are not there afterwards, unless they are written.
    """
    card = {CARD_NAME: render_card(eraser).encode()}
    write_files(Path(directory), {**card, **eraser.files(), **(more or {})}, replaces)
    return Path(directory)


def render_card(eraser: Eraser, publication: Publication | None = None) -> str:
    """Return the card in Markdown, with the YAML front matter that the Hub indexes.

    Args:
        eraser: The eraser.
        publication: Where it will stand; without, the card is one for its own directory.
    """
    header, ranks = eraser.header, sorted({pair.rank for pair in eraser.pairs.values()})
    front, recipe = _front_matter(header, publication), _recipe(header)
    samples = publication.samples if publication else ()
    mask: Callable[[str], str] = str
    if publication and publication.sensitive:
        mask, recipe = mask_of(name for concept in header.concepts for name in (concept.name, *concept.synonyms)), ""
        header, samples = _masked(header, mask), [sample._replace(prompt=mask(sample.prompt)) for sample in samples]
    if samples:
        front["widget"] = _widget(samples)
    place = _word(str(publication.hub_id) if publication else _HERE)
    template = Template(Path(__file__).with_name("card.md").read_text("utf-8"))
    return template.substitute(
        front=dump_yaml(front, width=1000),
        names=markdown_cell(_listed([concept.name for concept in header.concepts])),
        effect=markdown_cell(header.effect()),
        base=_code(header.base),
        base_word=_word(header.base),
        place=place,
        gallery=_gallery(samples),
        diffusers=_diffusers(header, publication),
        kohya=(
            f"take {_code(publication.kohya)}"
            if publication and publication.kohya
            else f"make kohya's file with `esd-lora export {place} --layout kohya -o eraser.safetensors`"
        ),
        revision=f" at {_code(header.base_revision)}" if header.base_revision else "",
        weights=f", weights {_code(header.base_hash())}" if header.base_hashes else "",
        family=_code(header.family),
        prediction_type=markdown_cell(header.prediction_type or "unknown"),
        scope=_code(header.scope),
        objective=_code(header.objective),
        etas=", ".join("unknown" if eta is None else f"{eta:g}" for eta in dict.fromkeys(c.eta for c in header.concepts)),
        layers=len(eraser.pairs),
        ranks=f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(*ranks) or "unknown",
        steps=_steps(header),
        pairs=_pairs(header.concepts),
        preserve=f"{len(header.preserve)}{_guarded(header)}" if header.preserve else "none",
        created=markdown_cell(header.created),
        origin="".join(
            f"\n- {o.how.capitalize()} from {', '.join(map(_code, o.files))}: provenance unknown" for o in header.origins
        ),
        making="".join(f"\n- {line[:1].upper()}{line[1:]}" for line in header.making()),
        versions=", ".join(f"{markdown_cell(name)} {markdown_cell(version)}" for name, version in header.versions.items()),
        measured=mask(_measured(header.evaluation)),
        license=_license(header.base, publication),
        recipe=recipe,
    )


def concept_tag(concept: str) -> str:
    """Return the tag that the cards of a concept's erasers have on the Hub, whatever its article and case."""
    return f"erases:{slug(without_article(concept)).casefold()}"


def measured_line(evaluation: Measured | None) -> str:
    """Return the numbers on what was erased in a line; `no` where nothing was measured."""
    if evaluation is None:
        return "no"
    targets = [f"{metric} {number.text()} ({name})" for role, name, metric, number in _numbers(evaluation) if role == "target"]
    return f"suite {evaluation.suite}, {evaluation.date}: {'; '.join(targets) or 'nothing on what was erased'}"


def _numbers(evaluation: Measured) -> list[tuple[str, str, str, Number]]:
    """Return role, model, metric and number of everything that was measured."""
    return [(role, *row) for role in TITLES for row in role_rows(evaluation.variants, role)]


def _front_matter(header: EraserHeader, publication: Publication | None) -> dict[str, object]:
    """Return what the Hub indexes; no `instance_prompt`, which its page would call a trigger word."""
    front: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    tags = [*_TAGS, *(tag for family in FAMILIES if family.name == header.family for tag in family.tags)]
    if publication:
        front |= publication.license.front_matter()
        concepts = [concept_tag(concept.name) for concept in header.concepts[:_MAX_LISTED]]
        tags += ["not-for-all-audiences"] if publication.sensitive else concepts
    front["tags"] = list(dict.fromkeys(tags))
    if is_hub_id(header.base):  # other bases have no page to point at
        front |= {"base_model": header.base, "base_model_relation": "adapter"}
    return front


def _steps(header: EraserHeader) -> str:
    """Return how many steps were trained; what the recipes of a stack's members say."""
    if len(header.recipes) == 1 and "steps" in header.cost:
        return f"{header.cost['steps']:.0f}"
    return ", ".join(str(steps) for steps in dict.fromkeys(recipe.train.steps for recipe in header.recipes)) or "unknown"


def _listed(names: Sequence[str]) -> str:
    """Return names with commas between; of many the first ones."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def _widget(samples: Sequence[Sample]) -> list[dict[str, object]]:
    """Return the pictures that the Hub shows on top of the page."""
    pictures = [pair for s in samples for pair in ((f"{s.prompt} (base)", s.base), (s.prompt, s.erased))]
    return [{"text": text, "output": {"url": file}} for text, file in pictures if file]


def _gallery(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    rows = [[markdown_cell(s.prompt), f"![]({s.base})" if s.base else "", f"![]({s.erased})"] for s in samples]
    return "\n" + markdown_table(["prompt", "base", "with the eraser"], rows) + "\n"


def _diffusers(header: EraserHeader, publication: Publication | None) -> str:
    """Return the Python that loads the eraser with diffusers alone, and with peft where diffusers has no loader."""
    if header.base in BUILT_IN:
        library, base = "import esd_lora", f"esd_lora.load_base({header.base!r}).pipe"
    else:
        library = "from diffusers import DiffusionPipeline"
        base = f'DiffusionPipeline.from_pretrained("{_word(header.base)}")'
    place, revision = publication.hub_id if publication else (_HERE, None)
    at = f', revision="{_word(revision)}"' if revision else ""
    load = f'pipe.load_lora_weights("{_word(place)}"{at})'
    if not all(family.pipelines_load_loras for family in FAMILIES if family.name == header.family):
        library += "\nfrom peft import PeftModel"
        exported = f"# esd-lora export {_word(place)} --layout peft -o for-peft"
        load = f'{exported}\nPeftModel.from_pretrained(pipe.{header.prefix}, "for-peft")'
    moving = any(family.name == header.family and family.frames_per_latent for family in FAMILIES)
    kind, output = ("video", "frames") if moving else ("image", "images")
    return "\n".join([library, "", f"pipe = {base}", load, f'{kind} = pipe("a prompt").{output}[0]'])


def _pairs(concepts: Sequence[ErasedConcept]) -> str:
    pairs = [pair for concept in concepts for pair in concept.pairs]
    rows = [[markdown_cell(prompt), markdown_cell(anchor) or "(empty prompt)"] for prompt, anchor in pairs[:_MAX_LISTED]]
    if len(pairs) > len(rows):
        rows.append([f"and {len(pairs) - len(rows)} more, in `recipe.yaml`", ""])
    return markdown_table(["erased prompt", "what should appear instead"], rows) if rows else "Its prompts are not known."


def _license(base: str, publication: Publication | None) -> str:
    of_base = base_license(base)
    named = f"{_code(base)} ({of_base.markdown()})" if of_base else _code(base)
    terms = f"The terms of the base, {named}, hold for whoever uses the two together."
    return f"{publication.license.markdown()}. {terms}" if publication else terms


def _recipe(header: EraserHeader) -> str:
    text = header.recipe_document()
    if not text or text.count("\n") > _MAX_RECIPE_LINES:
        return ""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"\n## Recipe\n\n{fence}yaml\n{text}{fence}\n"


def _guarded(header: EraserHeader) -> str:
    """Return which prompts no update touches."""
    if not header.guard:
        return ""
    return f"; exactly as they were in layers that read text: {', '.join(markdown_cell(prompt) for prompt in header.guard)}"


def _measured(evaluation: Measured | None) -> str:
    """Return what it does in numbers, with all that they depend on."""
    if evaluation is None:
        return "## What else it costs\n\nNot measured: neither what it removes nor what else it costs (`esd-lora evaluate`)."
    rows = [[role, *cells(name, metric, number)] for role, name, metric, number in _numbers(evaluation)]
    table = markdown_table(["prompts", *HEAD], rows) if rows else NOTHING
    notes = [
        f"- {name}: {yaml.safe_dump(evaluation.record[name], width=1000, default_flow_style=True).strip()}"
        for name in _RECORD
        if evaluation.record.get(name)
    ]
    notes += [f"- Not run: {name}, {reason}" for name, reason in evaluation.not_run.items()]
    return (
        f"## Measured: is it gone, and what else does it cost?\n\n{table}\n\n"
        f"Suite {_code(evaluation.suite)}, {markdown_cell(evaluation.date)}. {INTERVALS if rows else ''}".rstrip()
        + (f" {markdown_cell(worst_line(evaluation.worst))}" if evaluation.worst else "")
        + "\n\n"
        + "\n".join(map(markdown_cell, notes))
    )


def _code(text: str) -> str:
    """Return inline code in Markdown."""
    return f"`{_word(text)}`"


def _word(text: str) -> str:
    """Return a name as it may stand in code: what would end the code, a line or a string is left out."""
    return re.sub(r"[`\s\"'$\\<>|;&]+", " ", in_one_line(text)).strip()


def _masked(header: EraserHeader, mask: Callable[[str], str]) -> EraserHeader:
    """Return a header for showing: concepts and their prompts masked, and synonyms left out."""
    concepts = [
        concept.model_copy(
            update={
                "name": mask(concept.name),
                "synonyms": (),
                "pairs": tuple((mask(prompt), mask(anchor)) for prompt, anchor in concept.pairs),
                "shown": concept.shown and concept.shown.model_copy(update={"explained_by": {}}),
            }
        )
        for concept in header.concepts
    ]
    origins = [o.model_copy(update={"files": {mask(name): digest for name, digest in o.files.items()}}) for o in header.origins]
    return header.model_copy(update={"concepts": tuple(concepts), "origins": tuple(origins)})
