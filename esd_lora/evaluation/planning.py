"""From a suite and what was erased to the pictures that will be painted, each with its prompt, seed, role and label."""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from esd_lora.built_in import domain
from esd_lora.erasers.header import ErasedConcept
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors import AND
from esd_lora.evaluation.domain_suite import Shot, every_pair, of_object, of_style
from esd_lora.evaluation.prompt_files import PromptFile, read_cases
from esd_lora.evaluation.suite_files import PromptSet, Role, Suite
from esd_lora.wording import without_article


class Asked(NamedTuple):
    """One picture to paint."""

    case: str
    """Of its own in the evaluation; names the file."""
    role: Role
    prompt: str
    seed: int
    label: str | None = None
    """What it should show, or of a target, what it should no longer show."""
    rest: str | None = None
    """What a target should show still: the object in an erased style."""
    guidance: float | None = None
    """The suite's unless given."""


class Plan(NamedTuple):
    """What a suite comes to."""

    asked: list[Asked]
    files: dict[str, dict[str, Any]]
    """Prompt set to name, SHA-256, release and rows of its file."""
    not_run: dict[str, str]
    """Prompt set to the reason."""


def plan(suite: Suite, concepts: Sequence[ErasedConcept], limit: int | None = None) -> Plan:
    """Lays out the pictures of a suite.

    Args:
        suite: From `load_suite`.
        concepts: What was erased; decides which prompts are targets and neighbours, and fills `{concept}`.
        limit: Most pictures of each prompt set, evenly spaced among all.

    Raises:
        EsdLoraError: If a file that is needed is not given or cannot be read, or nothing that was erased stands in the suite.
    """
    made = Plan([], {}, {})
    for name, prompts in suite.prompts.items():
        if prompts.source and not prompts.file:
            reason = f"no file; give it as -s prompts.{name}.file=PATH ({prompts.source})"
            if not prompts.optional:
                raise EsdLoraError(f"the prompts {name!r} of this suite have {reason}.")
            made.not_run[name] = reason
            continue
        if prompts.file:
            found = read_cases(prompts.file)
            made.files[name] = _record(found, prompts)
            asked = _filed(name, prompts, found)
        else:
            asked = list(_domain(name, prompts, suite, concepts) if prompts.domain else _filled(name, prompts, concepts))
        if limit is not None and len(asked) > limit:
            asked = [asked[i * len(asked) // limit] for i in range(limit)]
        made.asked.extend(_cast(one, suite, concepts) for one in asked)
    if suite.targets and concepts and not any(one.role == "target" for one in made.asked):
        names = ", ".join(concept.name for concept in concepts)
        raise EsdLoraError(
            f"no prompt of this suite is about what was erased ({names}). Choose another suite, or give --concept."
        )
    return made


def _filled(name: str, prompts: PromptSet, concepts: Sequence[ErasedConcept]) -> Iterator[Asked]:
    """Templates with every combination of what fills them."""
    said = "".join([*prompts.templates, prompts.label or ""])
    fill = dict(prompts.fill)
    if "{concept}" in said:
        fill["concept"] = tuple(without_article(concept.name) for concept in concepts)
    used = [word for word in fill if any(word == field for _, field, _, _ in string.Formatter().parse(said))]
    number = 0
    for words in product(*(fill[word] for word in used)):
        values = dict(zip(used, words, strict=True))
        label = prompts.label.format(**values) if prompts.label else None
        for i in range(prompts.count or len(prompts.templates)):
            prompt = prompts.templates[i % len(prompts.templates)].format(**values)
            yield Asked(f"{name}-{number:05d}", prompts.role, _article(prompt), prompts.seed + number, label)
            number += 1


def _article(prompt: str) -> str:
    """ "a owl" is "an owl": templates do not know what fills them. A protocol that says "A Architectures image" is quoted."""
    return re.sub(r"\ba (?=[aeiouAEIO])", "an ", prompt)


def _domain(name: str, prompts: PromptSet, suite: Suite, concepts: Sequence[ErasedConcept]) -> Iterator[Asked]:
    """Prompts for a built-in base."""
    base = suite.base or "emoji"
    known = domain(base)
    trained = {prompt for concept in concepts for prompt, _ in concept.pairs}
    count, shots = prompts.count or 1, list[Shot]()
    if prompts.domain == "pairs":
        erased = [s for s in every_pair(base, prompts.seed) if any(c.named_in(_label(s)) for c in concepts)]
        shots = [shot for shot in every_pair(base, prompts.seed) if shot not in erased]
    for kind, make in (("object", of_object), ("style", of_style)):
        chosen = [word for word in known[f"{kind}s"] if any(concept.named_in(word) for concept in concepts)]
        for i, word in enumerate(chosen if prompts.domain == kind else []):
            shots += make(word, trained, count, base, prompts.seed + i * count)
    for i, shot in enumerate(shots):
        yield Asked(f"{name}-{i:05d}", prompts.role, shot.prompt, shot.seed, _label(shot))


def _label(shot: Shot) -> str:
    return AND.join(filter(None, (shot.object, shot.style)))


def _filed(name: str, prompts: PromptSet, found: PromptFile) -> list[Asked]:
    """The rows of a prompt file."""
    safe = all(re.fullmatch(r"[\w.-]+", case.case) for case in found.cases)
    empty = sum(not case.prompt for case in found.cases)
    if empty:
        warnings.warn(f"{found.path}: {empty} of {len(found.cases)} prompts are empty; they are painted as such.", stacklevel=3)
    return [
        Asked(
            f"{name}-{case.case if safe else f'{i:05d}'}",
            prompts.role,
            case.prompt,
            case.seed,
            case.label if prompts.label is None else prompts.label.format(**case.columns),
            guidance=case.guidance if prompts.own_guidance else None,
        )
        for i, case in enumerate(found.cases)
    ]


def _record(found: PromptFile, prompts: PromptSet) -> dict[str, Any]:
    if prompts.release and found.release != prompts.release:
        what = found.release or "no release that is known"
        warnings.warn(f"{found.path} is {what}, not {prompts.release}: its numbers compare with nobody else's.", stacklevel=3)
    rows = len(found.cases)
    return {"name": found.path.name, "sha256": found.sha256, "release": found.release, "rows": rows}


def _cast(one: Asked, suite: Suite, concepts: Sequence[ErasedConcept]) -> Asked:
    """The role and label of a picture, given what was erased."""
    parts = (one.label or one.prompt).split(AND)
    erased = [part for part in parts if any(concept.named_in(part) for concept in concepts)]
    if erased:
        role: Role = one.role if one.role == "paraphrase" else "target"
        if one.label:
            rest = AND.join(part for part in parts if part not in erased)
            one = one._replace(label=AND.join(erased), rest=rest or None)
        return one._replace(role=role)
    beside = [group for group in suite.neighbours.values() if any(c.named_in(word) for word in group for c in concepts)]
    near = one.role == "general" and any(part in group for part in parts for group in beside)
    return one._replace(role="neighbour") if near else one
