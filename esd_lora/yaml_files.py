"""YAML files that people write: every value's file and line, and faults in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast, get_args

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from esd_lora.errors import EsdLoraError, did_you_mean

Place: TypeAlias = tuple[str | int, ...]
"""Keys and list positions that lead to a value."""
Mark: TypeAlias = tuple[str, int]
"""File and line (from 1) where a value stands."""


class Document(NamedTuple):
    """What a file says, and where."""

    values: dict[str, Any]
    marks: dict[Place, Mark]

    def where(self, place: Place) -> str | None:
        """`file:line` of a value, or of the nearest thing around it that stands in a file."""
        near = next((self.marks[place[:i]] for i in range(len(place), -1, -1) if place[:i] in self.marks), None)
        return f"{near[0]}:{near[1]}" if near else None


def read_yaml(path: Path, kind: str, example: str) -> Document:
    """Reads one file, which must hold a mapping.

    Args:
        path: Of the file.
        kind: What it is, for messages: `"recipe"`.
        example: Of a line that may stand in one.

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


def place_of(fault: ErrorDetails) -> Place:
    """Where a fault of pydantic's lies, without the names of the types that it tried."""
    return tuple(part for part in fault["loc"] if not str(part).startswith(("function-", "literal", "tuple", "str")))


def describe(fault: ErrorDetails, model: type[BaseModel]) -> str:
    """A fault in words: the field, what was found, what was expected.

    Args:
        fault: From pydantic's `ValidationError.errors()`.
        model: That the whole file was checked against; says what keys there are.
    """
    place = place_of(fault)
    name = ".".join(map(str, place))
    if fault["type"] == "extra_forbidden":
        return f"{name}: unknown key{did_you_mean(str(place[-1]), _fields(model, place[:-1]))}"
    if fault["type"] == "missing":
        return f"{name}: missing"
    return f"{name}: {fault['msg'].removeprefix('Value error, ')}, found {fault['input']!r}"


def _fields(model: type[BaseModel], place: Place) -> list[str]:
    """Field names at a place in a document."""
    for part in place:
        if isinstance(part, str):
            inner = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
            if inner is None:
                return []
            model = inner
    return list(model.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The model that a field's type holds: `tuple[Concept, ...]` holds `Concept`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
