"""YAML files that people write: every value's file and line, and faults in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.wording import is_text, printable_lines

Place: TypeAlias = tuple[str | int, ...]
"""Keys and list positions that lead to a value."""
Mark: TypeAlias = tuple[str, int]
"""File and line (from 1) where a value stands."""


Model = TypeVar("Model", bound=BaseModel)


class Document(NamedTuple):
    """The content of a YAML file, and where each value stands in it."""

    values: dict[str, Any]
    marks: dict[Place, Mark]

    def where(self, place: Place) -> str | None:
        """Return `file:line` of a value, or of the nearest thing around it that stands in a file."""
        near = next((self.marks[place[:i]] for i in range(len(place), -1, -1) if place[:i] in self.marks), None)
        return f"{near[0]}:{near[1]}" if near else None


def read_yaml(path: Path, kind: str, example: str) -> Document:
    """Read one file, which must hold a mapping.

    Args:
        path: The file.
        kind: What it is, for messages: `"recipe"`.
        example: A line that may stand in one, for messages.

    Raises:
        EsdLoraError: If it cannot be read, is not YAML, is no mapping, holds a key twice or is nested too deep.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        root = cast("yaml.Node | None", yaml.compose(text, yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise EsdLoraError(f"{path}:{line}: not valid YAML: {error.problem}. Mend that line.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EsdLoraError(f"{path}: cannot be read as a {kind}: {error}.") from error
    if not isinstance(values, dict):
        raise EsdLoraError(f"{path}: holds {type(values).__name__}, expected a mapping such as '{example}'.")
    marks: dict[Place, Mark] = {}

    def note(node: yaml.Node, loc: Place) -> None:
        if len(loc) > 20:
            raise EsdLoraError(f"{path}:{node.start_mark.line + 1}: nested too deep for a {kind}.")
        marks[loc] = (str(path), node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode) and not is_text(node.value):
            raise EsdLoraError(f"{path}:{node.start_mark.line + 1}: {node.value!r} holds half a character. Write it whole.")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if (*loc, key.value) in marks:
                    line, first = key.start_mark.line + 1, marks[(*loc, key.value)][1]
                    raise EsdLoraError(f"{path}:{line}: {key.value}: already given in line {first}. Keep one of the two.")
                note(value, (*loc, key.value))
                marks[(*loc, key.value)] = (str(path), key.start_mark.line + 1)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                note(value, (*loc, i))

    if root is not None:
        note(root, ())
    return Document(cast("dict[str, Any]", values), marks)


def dump_yaml(values: Mapping[str, Any], *, width: int = 80) -> str:
    """Return values as YAML, in their order; text that is not printable is written as escapes, and reads back as it was."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=width)
    # PyYAML writes marks of direction bare, and line breaks such as U+2028, which it reads as spaces.
    return text if text == printable_lines(text) else yaml.safe_dump(values, sort_keys=False, width=width)


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `above` laid over `below`, mapping by mapping; lists are replaced whole."""
    out = dict(below)
    for key, value in above.items():
        under = out.get(key)
        both = isinstance(under, dict) and isinstance(value, dict)
        out[key] = laid_over(cast("dict[str, Any]", under), cast("dict[str, Any]", value)) if both else value
    return out


def checked(
    model: type[Model],
    document: Document,
    overrides: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    *,
    kind: str,
    source: str,
    hint: Callable[[Place], str] = lambda _: "",
) -> Model:
    """Return a document as a checked model.

    Args:
        model: To check it against.
        document: From `read_yaml`.
        overrides: Dotted keys to values, over what the file says: `{"train.steps": 200}`.
        fields: Top-level fields, over both.
        kind: What it is, for messages.
        source: Where it is from, for what stands in no file.
        hint: What to add where a field is missing.

    Raises:
        EsdLoraError: With every fault at once, each as `file:line: field: what is wrong`.
    """
    fields, above = fields or {}, dict[str, Any]()
    for dotted, value in (overrides or {}).items():
        *parents, last = dotted.split(".")
        nested: dict[str, Any] = {last: value}
        for key in reversed(parents):
            nested = {key: nested}
        above = laid_over(above, nested)
    above = laid_over(above, fields)

    def sentence(fault: ErrorDetails) -> str:
        # Without the names of the types that pydantic tried.
        place = tuple(part for part in fault["loc"] if not str(part).startswith(("function-", "literal", "tuple", "str")))
        name = ".".join(map(str, place))
        if fault["type"] == "missing":
            return f"{document.where(place) or source}: {name}: missing{hint(place)}"
        where = document.where(place) or source
        if _overridden(place, above):
            where = "given" if place[0] in fields else "--set"
        if fault["type"] == "extra_forbidden":
            return f"{where}: {name}: unknown key{did_you_mean(str(place[-1]), _fields(model, place[:-1]))}"
        return f"{where}: {name}: {fault['msg'].removeprefix('Value error, ')}, found {fault['input']!r}"

    try:
        return model.model_validate(laid_over(document.values, above))
    except ValidationError as error:
        faults = dict.fromkeys(map(sentence, error.errors()))
        raise EsdLoraError(f"the {kind} has faults:\n  " + "\n  ".join(faults)) from error


def _overridden(place: Place, above: Mapping[str, Any]) -> bool:
    """Return whether a value given over the file hides what stands there at a place: its line is not to blame then."""
    value: Any = above
    for key in place:
        if not isinstance(value, dict):
            return True
        if key not in value:
            return False
        value = cast("dict[str | int, Any]", value)[key]
    return bool(place) and not isinstance(value, dict)


def _fields(model: type[BaseModel], place: Place) -> list[str]:
    """Return the names of the fields at a place in a document."""
    for part in place:
        if isinstance(part, str):
            inner = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
            if inner is None:
                return []
            model = inner
    return list(model.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Return the model that a field's type holds: `tuple[Concept, ...]` holds `Concept`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)
