"""The request: one thing that somebody wants erased, as a frozen, checked document.

No field asks who sent it; `reference` may point to where that is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from esd_lora.errors import did_you_mean, shortened
from esd_lora.faults import faults_of
from esd_lora.recipe_files import recipe_fields
from esd_lora.wording import in_one_line

Kind: TypeAlias = Literal["person", "style", "character", "object", "unsafe"]
Basis: TypeAlias = Literal["tdm-art4", "gdpr-17", "takedown", "licence", "policy"]
Status: TypeAlias = Literal["open", "ambiguous", "refused", "done", "withdrawn"]
SEPARATOR = ";"
"""What stands between names where several are in one text."""
MAX_NAME = 200
"""Most characters of a concept or another name: a prompt, of which text encoders read some 77 tokens."""
MAX_NAMES = 200
"""Most synonyms, and most kept names, of one request."""
MAX_REFERENCE = 2000
"""Most characters of a reference."""


def _text(value: object) -> object:
    if not isinstance(value, str):
        return value
    line = " ".join(value.split())
    if in_one_line(line) != line:
        raise ValueError("expected text without characters that are not seen")
    return line


def _item(value: str) -> str:
    if SEPARATOR in value:
        raise ValueError(f"expected a name without {SEPARATOR!r}, which separates names")
    return value


def _items(value: object) -> object:
    return [item for item in value.split(SEPARATOR) if item.strip()] if isinstance(value, str) else value


def _id(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError(
            "expected a name for a folder: up to 64 of a-z, A-Z, 0-9, '.', '_' and '-', the first a letter or digit"
        )
    return value


def _day(value: object) -> object:
    if value is None or isinstance(value, date):
        return value
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
        raise ValueError("expected a day such as 2026-11-30")  # a number would be seconds since 1970
    return date.fromisoformat(value)


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    if hidden := [name for name in values if name in COLUMNS]:
        raise ValueError(f"{hidden[0]} is a field of the request, expected those of a recipe")
    try:
        return json.loads(json.dumps(values, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError) as error:  # half a character among them
        raise ValueError("expected numbers, text, lists and mappings alone") from error


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), BeforeValidator(_text)]
Names = Annotated[tuple[Annotated[Name, AfterValidator(_item)], ...], Field(max_length=MAX_NAMES), BeforeValidator(_items)]
Day = Annotated[date, BeforeValidator(_day)]


class Request(BaseModel):
    """One thing that somebody wants erased.

    Two requests are equal when they say the same, wherever they stand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: Annotated[str, AfterValidator(_id)]
    """Its name among the others, and its folder's; no two differ in case alone."""
    concept: Name
    """What to erase, in words: `a cat`, `Van Gogh`."""
    synonyms: Names = ()
    """Other names of the concept."""
    kind: Kind
    """What the concept is, which decides how it is erased and measured."""
    anchor: Name | None = None
    """What should appear instead, as `train --anchor` takes it: chosen unless given; `none` is the empty prompt."""
    keep: Names = ()
    """Names and prompts that must not suffer."""
    basis: Basis | None = None
    """Why: a reservation of text and data mining (Directive (EU) 2019/790, article 4), a right to erasure (GDPR, article 17), a
    takedown notice, a licence, or the publisher's own policy."""
    reference: Annotated[str, Field(max_length=MAX_REFERENCE), BeforeValidator(_text)] = ""
    """Where more about it is kept: a ticket, an address, a hash of evidence. Free text, and no place for personal data."""
    received: Day | None = None
    """Day it came in."""
    due: Day | None = None
    """Last day on which it is in time."""
    status: Status = "open"
    """Where it stands; only what is `open` is erased."""
    private: bool = False
    """Whether what is published names its id alone."""
    settings: Annotated[dict[str, Any], AfterValidator(_settings)] = {}
    """Overrides of the recipe by dotted name, `{"train.steps": 200}`, to plain values, as JSON holds them. `read_requests`
    checks them, and so does loading a recipe with them."""
    line: int = Field(default=0, ge=0, exclude=True)
    """Line of the file in which it stands, 0 where unknown; no part of what it says."""

    @model_validator(mode="after")
    def _in_time(self) -> Request:
        if self.received and self.due and self.due < self.received:
            raise ValueError(f"due: {self.due} is before {self.received}, the day it was received")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The concept and its synonyms."""
        return (self.concept, *self.synonyms)

    def record(self) -> dict[str, Any]:
        """Return what it says as a line of JSON holds it: name of a column to a plain value, without what is empty."""
        values = self.model_dump(mode="json", exclude={"settings"})
        return {name: value for name, value in values.items() if value not in (None, "", [])} | self.settings

    @classmethod
    def of_record(cls, record: Mapping[str, Any], line: int = 0) -> Request:
        """Return the request that a record is of; what is no column is an override of the recipe.

        Raises:
            ValidationError: If it is none.
        """
        own = {name: value for name, value in record.items() if name in COLUMNS}
        return cls(**own, settings={name: value for name, value in record.items() if name not in COLUMNS}, line=line)

    def _content(self) -> str:
        return json.dumps(self.record(), sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Request) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())


COLUMNS = tuple(name for name in Request.model_fields if name not in ("settings", "line"))
"""Columns of a list of requests, those of recipe overrides aside."""


@cache
def setting_names() -> tuple[str, ...]:
    """Return the fields of a recipe that a request may override: all but the base, and what it says in columns of its own."""
    own = ("base", "base_config", "anchor")
    return tuple(name for name in recipe_fields() if not name.startswith("concepts.") and name not in own)


@cache
def _setting(name: str) -> TypeAdapter[Any]:
    """Return what checks a value for one field of a recipe."""
    field = recipe_fields()[name]
    annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def setting_fault(name: str, value: object) -> str | None:
    """Return what is wrong with an override of a recipe, `None` where nothing is.

    The name of code is data here; loading the recipe refuses it unless it is allowed.
    """
    if name not in setting_names():
        return f"unknown field of a recipe{did_you_mean(name, setting_names())}"
    try:
        _setting(name).validate_python(value)
        _settings({name: value})
    except ValidationError as error:
        return f"{faults_of(error)[0].message}, found {shortened(repr(value))}"
    except ValueError as error:
        return f"{error}, found {shortened(repr(value))}"
    return None
