"""Names without paths: what a file says of the machine that it was made on does not leave it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

from esd_lora.built_in import BUILT_IN
from esd_lora.erasers.header import EraserHeader
from esd_lora.errors import EsdLoraError
from esd_lora.wording import HubId

_PROMPTS = {"concepts", "preserve", "fill", "synonyms"}  # of a header and its recipes: what people say, never a path


def without_folders(name: str) -> str:
    """Return the name of a base or a file as it may travel: of a path its last part, built-in names and Hub ids whole."""
    hub_id = HubId.read(name)
    return name if hub_id and not os.path.exists(hub_id.repo) else _last_part(name)  # noqa: PTH110, which raises nothing


def scrub(value: Any, key: str = "", *, base: str | None = None, known_as: str | None = None) -> Any:
    """Return a document that may travel, such as a header or a record, with paths of this machine cut to their last part.

    Args:
        value: As JSON; prompts and names of concepts in it are left alone.
        key: The field that it stands in.
        base: Takes the place of every base that is a path.
        known_as: Another name that counts as a path.
    """
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {
            field: inner if field in _PROMPTS else scrub(inner, field, base=base, known_as=known_as)
            for field, inner in fields.items()
        }
    if isinstance(value, list):
        return [scrub(inner, key, base=base, known_as=known_as) for inner in cast("list[Any]", value)]
    if not isinstance(value, str) or not (_is_local(value) or value == known_as):
        return value
    if key == "base_config":
        return None
    return base if base and key in ("base", "id") else _last_part(value)


def without_local_paths(header: EraserHeader) -> EraserHeader:
    """Return the header for a file that is made for other programs: of every path of this machine the last part is left."""
    fields = scrub(header.model_dump(mode="json"))
    return EraserHeader.model_validate(fields | {"base": without_folders(header.base)})


def without_paths(header: EraserHeader, base_model: str | None) -> EraserHeader:
    """Return the header for everybody, without names that files and bases have on this machine alone.

    Args:
        header: The header as it is.
        base_model: Hub id that takes the place of the base's name, where that is a path.

    Raises:
        EsdLoraError: If the base has no other name, or files of this machine are named in an unexpected place.
    """
    name = base_model or header.base
    hub_id = HubId(name) if name in BUILT_IN else HubId.read(name)
    if hub_id is None or (not base_model and hub_id.repo not in BUILT_IN and _is_local(hub_id.repo)):
        raise EsdLoraError(
            f"the eraser was made for base {header.base!r}, which nobody else has under that name. Say which model on the Hub"
            " it is with --base-model owner/name."
        )
    base, revision = hub_id
    known_as = header.base if header.base != base else None
    fields = scrub(header.model_dump(mode="json"), base=base, known_as=known_as)
    fields["base"] = base
    if base != header.base or revision:
        fields["base_revision"] = revision
    clean = EraserHeader.model_validate(fields)
    for folder in (Path.home(), Path.cwd()):
        if len(folder.parts) > 1 and f"{folder}/" in clean.model_dump_json():
            raise EsdLoraError(
                f"the eraser's header names files below {folder}, which would become public. Make it without them."
            )
    return clean


def _is_local(text: str) -> bool:
    """Return whether a text is the path of something here, or looks like one."""
    if re.match(r"(/|~|\.\.?/|[A-Za-z]:[\\/])", text):
        return True
    return len(text) < 250 and text.isprintable() and bool(re.search(r"[\\/]|\.\w+$", text)) and Path(text).exists()


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
