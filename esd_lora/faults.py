"""What is wrong with a document, in plain words: pydantic finds it, and says it in the terms of Python's types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from esd_lora.errors import shortened

Place: TypeAlias = tuple[str | int, ...]
"""Keys and list positions that lead to a value."""
MAX_FAULTS = 50
"""Most faults that are listed."""
_MAPPING, _LIST, _TEXT = "expected a mapping of names to values", "expected a list", "expected text"
_WHOLE, _NUMBER, _TRUTH = "expected a whole number", "expected a number", "expected true or false"
_WORDS = {
    "missing": "missing",
    "extra_forbidden": "unknown key",
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "dict_type": _MAPPING,
    "mapping_type": _MAPPING,
    "list_type": _LIST,
    "tuple_type": _LIST,
    "set_type": _LIST,
    "iterable_type": _LIST,
    "string_type": _TEXT,
    "string_unicode": "expected text in UTF-8",
    "string_too_short": "expected text of {min_length} characters or more",
    "string_too_long": "expected text of {max_length} characters or fewer",
    "string_pattern_mismatch": "expected text that fits {pattern}",
    "too_short": "expected {min_length} entries or more",
    "too_long": "expected {max_length} entries or fewer",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "expected a finite number",
    "bool_type": _TRUTH,
    "bool_parsing": _TRUTH,
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected {ge} or more",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected {le} or less",
    "literal_error": "expected {expected}",
    "none_required": "expected nothing",
    "json_invalid": "no JSON ({error})",
    "json_type": "expected JSON",
    "timezone_aware": "expected a time with its zone, such as 2026-11-30T12:00:00Z",
    "recursion_loop": "holds itself",
}
"""Pydantic's name of a fault to a sentence's end, with the fault's own values in it."""
_DATE, _TIME = "expected a date, such as 2026-11-30", "expected a time, such as 2026-11-30T12:00:00Z"
_AUTO = "'auto'"  # the word that may stand for a number


class Fault(NamedTuple):
    """What is wrong with one value of a document."""

    place: Place
    type: str
    """Pydantic's name of it: `"missing"`."""
    message: str
    value: object

    def sentence(self) -> str:
        """Return place and message: `train.steps: expected a whole number`."""
        name = shortened(".".join(map(str, self.place)))
        return f"{name}: {self.message}" if name else self.message


def faults_of(error: ValidationError) -> list[Fault]:
    """Return what is wrong with a document, as far as a reader wants to know."""
    errors = error.errors()[: 4 * MAX_FAULTS]
    # A number or a word: pydantic finds two faults where neither fits, which are one.
    others = {_place(fault) for fault in errors if not _wants_auto(fault)}
    measurable = {_place(fault) for fault in errors if _wants_auto(fault)} & others

    def fault_of(details: ErrorDetails) -> Fault:
        place = _place(details)
        return Fault(place, details["type"], _words(details) + ", or 'auto'" * (place in measurable), details["input"])

    return [fault_of(details) for details in errors if not _wants_auto(details) or _place(details) not in others]


def first_fault(error: ValidationError) -> str:
    """Return the first thing that is wrong with a document, with its place."""
    return faults_of(error)[0].sentence()


def listed(sentences: list[str]) -> list[str]:
    """Return as many sentences as are read, the last of which says where there are more."""
    more = [f"and more than {MAX_FAULTS} others"] if len(sentences) > MAX_FAULTS else []
    return sentences[:MAX_FAULTS] + more


def _words(details: ErrorDetails) -> str:
    """Return what is wrong with a value."""
    kind = details["type"]
    if kind in ("value_error", "assertion_error"):  # raised by a check of our own, in words of its own
        return details["msg"].partition(", ")[2].removesuffix(".")
    if kind in _WORDS:
        context: Mapping[str, Any] = details.get("ctx", {})
        if context.get("min_length") == 1:  # of text or of a list
            return "expected one or more" if kind == "too_short" else "expected text"
        return _WORDS[kind].format(**context)
    return _DATE if kind.startswith("date_") else _TIME if kind.startswith("datetime_") else "expected another kind of value"


def _wants_auto(details: ErrorDetails) -> bool:
    return details["type"] == "literal_error" and details.get("ctx", {}).get("expected") == _AUTO


def _place(fault: ErrorDetails) -> Place:
    """Return where a fault is, without the names of the types that pydantic tried."""
    tried = ("function-", "literal", "tuple", "str", "constrained-")
    return tuple(part for part in fault["loc"] if part not in ("float", "int") and not str(part).startswith(tried))
