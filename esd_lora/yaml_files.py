"""YAML files that people write, strangers among them: every value's file and line, bounds, and faults in words.

A file is data and nothing else: an alias (`*name`), which stands for a value elsewhere and may multiply it, and a tag
(`!!type`), which has a value made into something else, are refused. Size, number of values and depth are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError, ValidationInfo

from esd_lora.errors import EsdLoraError, did_you_mean, shortened
from esd_lora.faults import Fault, Place, faults_of, listed
from esd_lora.registry import require_code_names
from esd_lora.wording import is_text, printable_lines

Mark: TypeAlias = tuple[str, int]
"""File and line (from 1) where a value stands."""
MAX_BYTES = 2**20
"""Longest document that is read: a stack manifest of a thousand members has a tenth of it."""
MAX_VALUES = 30_000
"""Most values of a document, mappings, lists and keys included."""
MAX_DEPTH = 20
"""Most levels that values are nested."""
_MAX_DIGITS = 100

Model = TypeVar("Model", bound=BaseModel)
_ALLOW_CODE = "allow_code"


class Document(NamedTuple):
    """The content of a YAML file, and where each value stands in it."""

    values: dict[str, Any]
    marks: dict[Place, Mark]

    def where(self, place: Place) -> str | None:
        """Return `file:line` of a value, or of the nearest thing around it that stands in a file."""
        near = next((self.marks[place[:i]] for i in range(len(place), -1, -1) if place[:i] in self.marks), None)
        return f"{near[0]}:{near[1]}" if near else None


class _Refusal(yaml.MarkedYAMLError):
    """YAML that is valid and more than plain data."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases and tags, for a bounded number of values to a bounded depth."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node and what is in it, as PyYAML does."""
        event = cast("Callable[[], Any]", self.peek_event)()  # pyright: ignore[reportUnknownMemberType]
        self.values += 1
        refusal = None
        if isinstance(event, yaml.AliasEvent):
            refusal = f"holds an alias (*{event.anchor}). Write the value out"
        elif event.tag not in (None, "!"):
            refusal = "holds a tag (!). Leave it out; quote the value if it is text"
        elif self.values > MAX_VALUES:
            refusal = f"holds more than {MAX_VALUES:,} values. Write fewer"
        elif self.depth > MAX_DEPTH:
            refusal = f"nested too deep, beyond {MAX_DEPTH} levels"
        if refusal:
            raise _Refusal(problem=refusal, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Compose a scalar, as PyYAML does."""
        node = super().compose_scalar_node(anchor)
        number = node.tag.endswith((":int", ":float"))
        if number and len(node.value) > _MAX_DIGITS:
            raise _Refusal(problem=f"holds a number of more than {_MAX_DIGITS} digits", problem_mark=node.start_mark)
        if not is_text(node.value):
            raise _Refusal(problem="holds half a character. Write it whole", problem_mark=node.start_mark)
        return node


def parse_yaml(text: str, name: str) -> tuple[yaml.Node | None, Any]:
    """Return the node and the value of a YAML document.

    Args:
        text: The document.
        name: What it is, for messages: a path.

    Raises:
        EsdLoraError: If it is not valid YAML, or more than data of a bounded size.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        build = cast("Callable[[yaml.Node], Any]", loader.construct_document)  # pyright: ignore[reportUnknownMemberType]
        return node, build(node) if node else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = error.problem if isinstance(error, _Refusal) else f"not valid YAML: {error.problem}. Mend that line"
        raise EsdLoraError(f"{name}:{line}: {what}.") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # PyYAML lets numbers' and dates' through
        raise EsdLoraError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from error


def read_yaml(path: Path, kind: str, example: str) -> Document:
    """Read one file, which must hold a mapping.

    Args:
        path: The file.
        kind: What it is, for messages: `"recipe"`.
        example: A line that may stand in one, for messages.

    Raises:
        EsdLoraError: If it cannot be read, is not YAML, is no mapping, holds a key twice, or is more than data of a bounded
            size: see `parse_yaml`.
    """
    try:
        with path.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise EsdLoraError(f"{path}: has more than {MAX_BYTES:,} bytes, too many for a {kind}.")
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EsdLoraError(f"{path}: cannot be read as a {kind}: {error}.") from error
    root, values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise EsdLoraError(f"{path}: holds {type(values).__name__}, expected a mapping such as '{example}'.")
    marks: dict[Place, Mark] = {}

    def note(node: yaml.Node, loc: Place) -> None:
        marks[loc] = (str(path), node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if (*loc, key.value) in marks:
                    line, first = key.start_mark.line + 1, marks[(*loc, key.value)][1]
                    raise EsdLoraError(
                        f"{path}:{line}: {shortened(key.value)}: already given in line {first}. Keep one of the two."
                    )
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
    allow_code: Collection[str] = (),
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
        allow_code: Every `module:attribute` that it may name where a name is expected: code that will run.

    Raises:
        EsdLoraError: With every fault at once, each as `file:line: field: what is wrong`.
    """
    require_code_names(allow_code)
    fields, above = fields or {}, dict[str, Any]()
    for dotted, value in (overrides or {}).items():
        *parents, last = dotted.split(".")
        nested: dict[str, Any] = {last: value}
        for key in reversed(parents):
            nested = {key: nested}
        above = laid_over(above, nested)
    above = laid_over(above, fields)

    def sentence(fault: Fault) -> str:
        place, where = fault.place, document.where(fault.place) or source
        name = shortened(".".join(map(str, place)))
        if fault.type == "missing":
            return f"{where}: {name}: missing{hint(place)}"
        if _overridden(place, above):
            where = "given" if place[0] in fields else "--set"
        if fault.type == "extra_forbidden":
            return f"{where}: {name}: unknown key{did_you_mean(str(place[-1]), _fields(model, place[:-1]))}"
        if not place:  # of several fields together
            return f"{where}: {fault.message}"
        return f"{where}: {name}: {fault.message}, found {shortened(repr(fault.value))}"

    try:
        return model.model_validate(laid_over(document.values, above), context={_ALLOW_CODE: allow_code})
    except ValidationError as error:
        sentences = list(dict.fromkeys(map(sentence, faults_of(error))))
        raise EsdLoraError(f"the {kind} has faults:\n  " + "\n  ".join(listed(sentences))) from error


def allowed_code(info: ValidationInfo) -> Collection[str] | None:
    """Return the `allow_code` of the check that is going on; `None` outside of one, where a model is data alone."""
    context: Mapping[str, Collection[str]] = info.context or {}
    return context.get(_ALLOW_CODE)


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
            inner = model_in(model.model_fields[part].annotation) if part in model.model_fields else None
            if inner is None:
                return []
            model = inner
    return list(model.model_fields)


def model_in(annotation: object) -> type[BaseModel] | None:
    """Return the model that a field's type holds: `tuple[Concept, ...]` holds `Concept`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := model_in(part))), None)
