"""What an eraser's header says of the machine that it was made on, and nobody else needs to know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from esd_lora.built_in import BUILT_IN
from esd_lora.erasers.header import EraserHeader
from esd_lora.errors import EsdLoraError
from esd_lora.wording import is_hub_id

_PROMPTS = {"concepts", "preserve", "fill", "synonyms"}  # of a header and its recipes: what people say, never a path


def without_paths(header: EraserHeader, base_model: str | None) -> EraserHeader:
    """The header without names that files and bases have on this machine alone.

    Raises:
        EsdLoraError: If the base has no other name.
    """
    base, _, revision = (base_model or header.base).partition("@")
    if base not in BUILT_IN and (not is_hub_id(base) or (_is_local(base) and not base_model)):
        raise EsdLoraError(
            f"the eraser was made for base {header.base!r}, which nobody else has under that name. Say which model on the Hub"
            " it is with --base-model owner/name."
        )

    def scrubbed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            named = cast("dict[str, Any]", value)
            return {name: v if name in _PROMPTS else scrubbed(v, name) for name, v in named.items()}
        if isinstance(value, list):
            return [scrubbed(v, key) for v in cast("list[Any]", value)]
        if not isinstance(value, str) or not (_is_local(value) or (value == header.base != base)):
            return value
        return base if key in ("base", "id") else None if key == "base_config" else re.split(r"[\\/]", value.rstrip("\\/"))[-1]

    plain = scrubbed(header.model_dump(mode="json"))
    plain["base"] = base
    if base != header.base or revision:
        plain["base_revision"] = revision or None
    clean = EraserHeader.model_validate(plain)
    for place in (Path.home(), Path.cwd()):
        if len(place.parts) > 1 and f"{place}/" in clean.model_dump_json():
            raise EsdLoraError(
                f"the eraser's header names files below {place}, which would become public. Make it without them."
            )
    return clean


def _is_local(text: str) -> bool:
    """Whether a text is the path of something here, or looks like one."""
    if re.match(r"(/|~|\.\.?/|[A-Za-z]:[\\/])", text):
        return True
    return len(text) < 250 and text.isprintable() and bool(re.search(r"[\\/]|\.\w+$", text)) and Path(text).exists()
