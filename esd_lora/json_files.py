"""JSON that strangers wrote: bounded in size and depth, and faults in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from esd_lora.errors import EsdLoraError

MAX_JSON = 2**20
"""Longest JSON that is read, in bytes: the longest configuration of a published model has a hundredth of it."""


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Return what a JSON document says.

    Args:
        text: The document.
        finite: Whether to refuse NaN and infinities, which JSON lacks and diffusers writes into configurations of schedulers.

    Raises:
        ValueError: If it is no JSON, longer than `MAX_JSON`, nested too deep, or holds what is no finite number.
    """
    if len(text) > MAX_JSON:
        raise ValueError(f"it is longer than {MAX_JSON:,} bytes")
    try:
        return json.loads(text, parse_constant=_refuse_constant if finite else None)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_json(file: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds.

    Raises:
        EsdLoraError: If it cannot be read, `parse_json` refuses it, or it holds no mapping.
    """
    try:
        with file.open("rb") as opened:
            values = parse_json(opened.read(MAX_JSON + 1), finite=False)
    except (OSError, ValueError) as error:
        raise EsdLoraError(f"{file} is damaged: expected JSON ({error}). Fetch it again.") from error
    if not isinstance(values, dict):
        raise EsdLoraError(f"{file} is damaged: it holds {type(values).__name__}, expected a mapping. Fetch it again.")
    return cast("dict[str, Any]", values)
