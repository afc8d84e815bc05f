"""Names for things that live in modules too heavy to import before they are needed."""

from __future__ import annotations

import importlib
from typing import Generic, TypeVar, cast

from esd_lora.errors import EsdLoraError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A map from a name to an object at `"module:attribute"`, imported when first asked for.

    Users reach their own objects by writing `module:attribute` where a name is expected.

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

    def get(self, name: str) -> T:
        """Return the object called `name`.

        Raises:
            EsdLoraError: If the name is unknown, or its `module:attribute` cannot be imported.
        """
        target = self.entries.get(name, name)
        module, colon, attribute = target.partition(":")
        if not colon:
            raise EsdLoraError(
                f"unknown {self.kind} {name!r}{did_you_mean(name, self.entries)}."
                f" Known: {', '.join(self.entries)}, or your own as 'module:attribute'."
            )
        try:
            return cast(T, getattr(importlib.import_module(module), attribute))
        except (ModuleNotFoundError, AttributeError) as error:
            if name in self.entries:
                raise
            raise EsdLoraError(f"{self.kind} {name!r} cannot be imported: {error}.") from error
