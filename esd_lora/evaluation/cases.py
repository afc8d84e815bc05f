"""Cases: the pictures that an evaluation asks for, and those that a built-in base's domain comes to."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from esd_lora.built_in import domain
from esd_lora.errors import EsdLoraError
from esd_lora.files import read_bounded
from esd_lora.json_files import parse_json

Role = Literal["target", "paraphrase", "neighbour", "general"]
ROLES: tuple[Role, ...] = ("target", "paraphrase", "neighbour", "general")
"""What a prompt is there for: to show what was erased; the same in other words; what lies close to it; all the rest."""
MAX_CASES = 100_000
"""Most pictures that a prompt set of a suite may come to; COCO's have 40,504 captions, of which papers take 30,000."""
MAX_PROMPT = 10_000
"""Longest text that a suite's template may come to, in characters: text encoders read 77 to 512 tokens."""
_LARGEST = 2**26  # bytes of a file of cases; `MAX_CASES` of usual length come to a third
AND = " + "
"""Between the parts of a label: "cat + ink"."""


class Case(NamedTuple):
    """One picture to paint: a row of a prompt file, a filled template, or a pair of a built-in base's domain."""

    id: str
    """Unique in the evaluation; names the picture's file."""
    role: Role
    prompt: str
    """May be empty, as one of I2P's is."""
    seed: int
    label: str | None = None
    """What the picture should show, or of a target, what it should no longer show; parts with `AND` between."""
    rest: str | None = None
    """What a target should show still: the object in an erased style."""
    guidance: float | None = None
    """Guidance scale; the suite's unless given."""
    size: tuple[int, int] | None = None
    """(width, height) in pixels that a prompt file names; pictures are painted at the base's own size all the same."""

    @property
    def parts(self) -> list[str]:
        """The parts of the label; none without a label."""
        return self.label.split(AND) if self.label else []

    def to_dict(self) -> dict[str, Any]:
        """Return the case as a line of `cases.jsonl`, where the id is called `case`."""
        names = {"id": "case"} | {name: name for name in ("role", "prompt", "seed", "label", "rest", "guidance")}
        return {key: getattr(self, name) for name, key in names.items()}


def read_cases(file: Path) -> list[Case]:
    """Return the cases of an evaluation, from its `cases.jsonl`.

    Raises:
        EsdLoraError: If it cannot be read, is too large, or a line is no case.
    """
    cases: list[Case] = []
    try:
        for line in read_bounded(file, _LARGEST).decode("utf-8").split("\n")[:-1]:
            values = parse_json(line)
            case = Case(values["case"], values["role"], values["prompt"], values["seed"])
            if case.role not in ROLES or not isinstance(case.prompt, str):
                raise ValueError("it names no role or prompt")
            if Path(case.id).name != case.id or len(case.id) > 200:  # it names a picture's file
                raise ValueError("its name is none")
            cases.append(case)
    except (OSError, ValueError, LookupError, TypeError) as error:
        where = f"{file}, line {len(cases) + 1}"
        raise EsdLoraError(f"{where}: damaged ({type(error).__name__}: {error}). Expected what an evaluation wrote.") from error
    return cases


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Return what a template of a suite consists of: texts, and after each the name in braces that follows, if one does.

    A suite is a stranger's, so there are none of Python's ways to format, which reach into objects and pad to any width.

    Raises:
        ValueError: If something stands in braces that is no plain name.
    """
    parts: list[tuple[str, str | None]] = []
    for text, name, width, conversion in string.Formatter().parse(template):
        if width or conversion or (name is not None and (not name or set(name) & set(".[]{}"))):
            raise ValueError(f"{{{name}...}} is more than a plain name in braces, such as {{concept}}")
        parts.append((text, name))
    return parts


def fill_words(template: str, words: Mapping[str, str]) -> str:
    """Return a template of a suite with words in the place of their names in braces.

    Raises:
        EsdLoraError: If nothing fills a name, or the text becomes longer than `MAX_PROMPT`.
    """
    try:
        parts = [part for text, name in template_parts(template) for part in (text, "" if name is None else words[name])]
    except KeyError as error:
        raise EsdLoraError(f"nothing fills {{{error.args[0]}}}. Known: {', '.join(words) or 'nothing'}.") from error
    if sum(map(len, parts)) > MAX_PROMPT:
        raise EsdLoraError(f"a template comes to a text of more than {MAX_PROMPT:,} characters. Shorten it or its words.")
    return "".join(parts)


def fill_template(template: str, object: str = "", style: str = "") -> str:
    """Return a domain template filled in, with the object's article in the place of `{a}`."""
    article = "an" if object[:1] in "aeiou" else "a"
    return template.format(a=f"{article} {object}", object=object, style=style)


def pair_cases(base: str = "emoji", seed: int = 0) -> list[Case]:
    """Return a case for every object in every style, held-out pairs left out; wordings and seeds take turns."""
    known, templates = domain(base), domain(base)["templates"]["both"]
    pairs = [(name, style) for name in known["objects"] for style in known["styles"] if [name, style] not in known["held_out"]]
    prompts = [fill_template(templates[i % len(templates)], *pair) for i, pair in enumerate(pairs)]
    return [
        Case(str(i), "general", prompt, seed + i, AND.join(pair))
        for i, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True))
    ]


def bare_cases(names: Sequence[str], count: int, seed: int = 0) -> list[Case]:
    """Return `count` cases of each object with nothing around it, with and without article in turn."""
    prompts = [(name, (fill_template("{a}", name), name)[i % 2]) for name in names for i in range(count)]
    return [Case(str(i), "general", prompt, seed + i, name) for i, (name, prompt) in enumerate(prompts)]


def object_cases(name: str, trained: Collection[str], count: int, base: str = "emoji", seed: int = 0) -> list[Case]:
    """Return `count` cases of one object on prompts that are not in `trained`, over wordings, styles and backgrounds."""
    known, templates = domain(base), domain(base)["templates"]
    styles = [style for style in known["styles"] if [name, style] not in known["held_out"]]
    prompts = [(fill_template(t, name, style), AND.join((name, style))) for t in templates["both"] for style in styles]
    prompts += [(fill_template(t, name), name) for t in templates["object"]]
    plain = fill_template(templates["object"][0], name)
    prompts += [(plain + templates["background"].format(background=b), name) for b in known["backgrounds"]]
    fresh = _untrained(prompts, trained)
    chosen = [fresh[i % len(fresh)] for i in range(count)]
    return [Case(str(i), "general", prompt, seed + i, label) for i, (prompt, label) in enumerate(chosen)]


def style_cases(style: str, trained: Collection[str], count: int, base: str = "emoji", seed: int = 0) -> list[Case]:
    """Return `count` cases of every object in turn in one style, on prompts that are not in `trained`."""
    known = domain(base)
    objects = [name for name in known["objects"] if [name, style] not in known["held_out"]]
    prompts = [(fill_template(t, name, style), AND.join((name, style))) for t in known["templates"]["both"] for name in objects]
    fresh = _untrained(prompts, trained)
    stride = 7  # coprime to the number of prompts in the shipped domain: wordings and objects mix early
    chosen = [fresh[i * stride % len(fresh)] for i in range(count)]
    return [Case(str(i), "general", prompt, seed + i, label) for i, (prompt, label) in enumerate(chosen)]


def _untrained(prompts: list[tuple[str, str]], trained: Collection[str]) -> list[tuple[str, str]]:
    fresh = [(prompt, label) for prompt, label in prompts if prompt not in trained]
    if not fresh:
        raise EsdLoraError(f"the erasers were trained on every prompt of {prompts[0][1]!r}, so none is left to measure on.")
    return fresh
