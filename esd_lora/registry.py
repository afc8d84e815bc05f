"""Names for things that live in modules too heavy to import before they are needed, and for code that a user allows."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection
from typing import Generic, TypeVar, cast

from esd_lora.errors import EsdLoraError, did_you_mean, shortened

T = TypeVar("T")

_CODE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


class Registry(Generic[T]):
    """A map from a name to an object at `"module:attribute"`, imported when first asked for.

    Users reach their own objects by writing `module:attribute` where a name is expected. As importing one runs code, and
    recipes, suites and headers travel, that is data until whoever runs them allows that very name.

    Args:
        kind: What the names stand for, in the singular, for error messages: `"objective"`.
        entries: Name to `"module:attribute"`.
    """

    def __init__(self, kind: str, entries: dict[str, str]):
        self.kind = kind
        self.entries = entries

    def names(self) -> list[str]:
        """Return the known names, in the order they were given."""
        return list(self.entries)

    def check(self, name: str, allowed: Collection[str] | None = ()) -> None:
        """Refuse a name that stands for nothing here, or for code that was not allowed; nothing is imported.

        Args:
            name: One of `names`, or `module:attribute`.
            allowed: Every `module:attribute` that may be imported; `None` where the name is only data, as in a header.

        Raises:
            EsdLoraError: With what is known, or how to allow it.
        """
        if name in self.entries:
            return
        known = f"Known: {', '.join(self.entries)}"
        if ":" not in name:
            raise EsdLoraError(f"unknown {self.kind} {shortened(repr(name))}{did_you_mean(name, self.entries)}. {known}.")
        if not is_code(name):
            raise EsdLoraError(f"{self.kind} {shortened(repr(name))} is neither a known name nor module:attribute. {known}.")
        if allowed is not None and name not in allowed:
            raise EsdLoraError(
                f"{self.kind} {name!r} is code, which no file runs by itself: if you trust it, add --allow-code {name} (in"
                f" Python allow_code=[{name!r}])."
            )

    def get(self, name: str, allowed: Collection[str] = ()) -> T:
        """Return the object called `name`.

        Args:
            name: One of `names`, or `module:attribute`.
            allowed: Every `module:attribute` that may be imported.

        Raises:
            EsdLoraError: If the name is unknown or not allowed, or its `module:attribute` cannot be imported or called.
        """
        self.check(name, allowed)
        module, _, attribute = self.entries.get(name, name).partition(":")
        try:
            entry = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if name in self.entries:
                raise
            raise EsdLoraError(f"{self.kind} {name!r} cannot be imported: {error}.") from error
        if not callable(entry):
            raise EsdLoraError(f"{self.kind} {name!r} is a {type(entry).__name__}, expected a function or a class.")
        return cast(T, entry)


def is_code(name: str) -> bool:
    """Return whether a name is `module:attribute`, by its form."""
    return _CODE.fullmatch(name) is not None


def require_code_names(allowed: Collection[str]) -> None:
    """Refuse what cannot be allowed, because it is no `module:attribute`.

    Raises:
        EsdLoraError: With the first such name.
    """
    if strange := next((name for name in allowed if not is_code(name)), None):
        raise EsdLoraError(f"code to allow is named module:attribute, such as my_module:my_objective, not {strange!r}.")
