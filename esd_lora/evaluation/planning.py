"""Planning: from a suite and what was erased to the cases that will be painted."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from esd_lora.built_in import domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import (
    AND,
    MAX_CASES,
    Case,
    bare_cases,
    fill_words,
    object_cases,
    pair_cases,
    style_cases,
    template_parts,
)
from esd_lora.evaluation.suites.prompt_files import PromptFile, read_prompt_file
from esd_lora.evaluation.suites.suite_files import PromptSet, Suite
from esd_lora.wording import without_article


class Plan(NamedTuple):
    """The cases that a suite comes to, given what was erased."""

    cases: list[Case]
    """All pictures to paint."""
    files: dict[str, dict[str, Any]]
    """Prompt set to name, SHA-256, release and rows of its file."""
    not_run: dict[str, str]
    """Prompt set to the reason why it is left out."""


Likeness = Callable[[Sequence[str]], Sequence[float]]
"""How near each of some texts lies to what was erased, as a base's text encoder sees it."""


def plan_cases(
    suite: Suite, concepts: Sequence[ErasedConcept], limit: int | None = None, likeness: Likeness | None = None
) -> Plan:
    """Lay out the pictures of a suite.

    Args:
        suite: From `load_suite`.
        concepts: What was erased; decides which prompts are targets and neighbours, and fills `{concept}`.
        limit: Most pictures of each prompt set, evenly spaced among all.
        likeness: Says which neighbours are nearest; without it, prompts that are chosen so are not run.

    Raises:
        EsdLoraError: If a file that is needed is not given or cannot be read, or nothing that was erased stands in the suite.
    """
    plan = Plan([], {}, {})
    for name, prompts in suite.prompts.items():
        if prompts.source and not prompts.file:
            reason = f"no file; give it as -s prompts.{name}.file=PATH ({prompts.source})"
            if not prompts.optional:
                raise EsdLoraError(f"the prompts {name!r} of this suite have {reason}.")
            plan.not_run[name] = reason
            continue
        if prompts.nearest and (likeness is None or not concepts):
            plan.not_run[name] = f"its prompts are chosen by {'a base' if concepts else 'what was erased'}, and none is given"
            continue
        if prompts.file:
            file = read_prompt_file(prompts.file)
            plan.files[name] = _file_record(file, prompts)
            cases = _cases_of_file(name, prompts, file)
        elif prompts.domain:
            cases = _cases_of_domain(name, prompts, suite.base or "emoji", concepts, likeness)
        else:
            cases = list(_cases_of_templates(name, prompts, concepts, likeness))
        if limit is not None and len(cases) > limit:
            cases = [cases[i * len(cases) // limit] for i in range(limit)]
        plan.cases.extend(_assign_role(case, suite, concepts) for case in cases)
    if suite.targets and concepts and not any(case.role == "target" for case in plan.cases):
        names = ", ".join(concept.name for concept in concepts)
        raise EsdLoraError(
            f"no prompt of this suite is about what was erased ({names}). Choose another suite, or give --concept."
        )
    return plan


def erased_concepts(erasers: Sequence[Eraser], names: Sequence[str] = ()) -> list[ErasedConcept]:
    """Return what counts as erased: what the erasers' headers hold, or else these names, with what the headers know of them."""
    known = [concept for eraser in erasers for concept in eraser.header.concepts if concept.weight > 0]
    if not names:
        return known
    return [
        next((concept for concept in known if concept.named_in(name)), ErasedConcept(name=name, pairs=(), eta=None))
        for name in names
    ]


def _nearest(
    prompts: PromptSet, words: Sequence[str], concepts: Sequence[ErasedConcept], likeness: Likeness | None
) -> list[str]:
    """Return the words of a prompt set that name nothing erased, nearest first where that was asked for."""
    others = [word for word in words if not any(concept.named_in(word) for concept in concepts)]
    if not prompts.nearest or likeness is None or not others:
        return others
    near = likeness(others)
    return [others[i] for i in sorted(range(len(others)), key=lambda i: -near[i])[: prompts.nearest]]


def _cases_of_templates(
    name: str, prompts: PromptSet, concepts: Sequence[ErasedConcept], likeness: Likeness | None
) -> Iterator[Case]:
    """Fill templates with every combination of what fills them."""
    text = "".join([*prompts.templates, prompts.label or ""])
    fill = dict(prompts.fill)
    if prompts.nearest:
        fill = {word: tuple(_nearest(prompts, words, concepts, likeness)) for word, words in fill.items()}
    if "{concept}" in text:
        fill["concept"] = tuple(without_article(concept.called[0]) for concept in concepts)
    used = [word for word in fill if word in {field for _, field in template_parts(text)}]
    _check_count(name, math.prod(len(fill[word]) for word in used) * (prompts.count or len(prompts.templates)))
    number = 0
    for words in product(*(fill[word] for word in used)):
        values = dict(zip(used, words, strict=True))
        label = fill_words(prompts.label, values) if prompts.label else None
        for i in range(prompts.count or len(prompts.templates)):
            prompt = fill_words(prompts.templates[i % len(prompts.templates)], values)
            # "a owl" is "an owl": templates do not know what fills them. A protocol's "A Architectures image" is quoted.
            prompt = re.sub(r"\ba (?=[aeiouAEIO])", "an ", prompt)
            yield Case(f"{name}-{number:05d}", prompts.role, prompt, prompts.seed + number, label)
            number += 1


def _check_count(name: str, count: int) -> None:
    if count > MAX_CASES:
        raise EsdLoraError(f"the prompts {name!r} of this suite come to {count:,} pictures, more than {MAX_CASES:,}.")


def _cases_of_domain(
    name: str, prompts: PromptSet, base: str, concepts: Sequence[ErasedConcept], likeness: Likeness | None
) -> list[Case]:
    """Return cases for a built-in base."""

    def erased(text: str) -> bool:
        return any(concept.named_in(text) for concept in concepts)

    if prompts.domain == "pairs":
        cases = [case for case in pair_cases(base, prompts.seed) if not erased(str(case.label))]
    elif prompts.domain == "bare":
        chosen = _nearest(prompts, domain(base)["objects"], concepts, likeness)
        _check_count(name, (prompts.count or 1) * len(chosen))
        cases = bare_cases(chosen, prompts.count or 1, prompts.seed)
    else:
        trained = {prompt for concept in concepts for prompt, _ in concept.pairs}
        cases_of, words = (object_cases, "objects") if prompts.domain == "object" else (style_cases, "styles")
        count, seed = prompts.count or 1, prompts.seed
        chosen = [word for word in domain(base)[words] if erased(word)]
        _check_count(name, count * len(chosen))
        cases = [case for i, word in enumerate(chosen) for case in cases_of(word, trained, count, base, seed + i * count)]
    return [case._replace(id=f"{name}-{i:05d}", role=prompts.role) for i, case in enumerate(cases)]


def _cases_of_file(name: str, prompts: PromptSet, file: PromptFile) -> list[Case]:
    """Return the rows of a prompt file as cases of a prompt set."""
    _check_count(name, len(file.cases))
    safe = all(re.fullmatch(r"[\w.-]+", case.id) for case in file.cases)
    if empty := sum(not case.prompt for case in file.cases):
        warnings.warn(f"{file.path}: {empty} of {len(file.cases)} prompts are empty; they are painted as such.", stacklevel=3)
    return [
        case._replace(
            id=f"{name}-{case.id if safe else f'{i:05d}'}",
            role=prompts.role,
            label=case.label if prompts.label is None else fill_words(prompts.label, row),
            guidance=case.guidance if prompts.own_guidance else None,
        )
        for i, (case, row) in enumerate(zip(file.cases, file.rows, strict=True))
    ]


def _file_record(file: PromptFile, prompts: PromptSet) -> dict[str, Any]:
    """Return what a record holds of a prompt file, and warn where it is not the release that the suite is about."""
    if prompts.release and file.release != prompts.release:
        release = file.release or "no release that is known"
        warnings.warn(f"{file.path} is {release}, not {prompts.release}: its numbers compare with nobody else's.", stacklevel=3)
    return {"name": file.path.name, "sha256": file.sha256, "release": file.release, "rows": len(file.cases)}


def _assign_role(case: Case, suite: Suite, concepts: Sequence[ErasedConcept]) -> Case:
    """Return a case with the role and label that it has given what was erased."""
    parts = case.parts or [case.prompt]
    erased = [part for part in parts if any(concept.named_in(part) for concept in concepts)]
    if erased:
        if case.label:
            rest = AND.join(part for part in parts if part not in erased)
            case = case._replace(label=AND.join(erased), rest=rest or None)
        return case if case.role == "paraphrase" else case._replace(role="target")
    groups = [group for group in suite.neighbours.values() if any(c.named_in(word) for word in group for c in concepts)]
    near = case.role == "general" and any(part in group for part in parts for group in groups)
    return case._replace(role="neighbour") if near else case
