"""What ships inside the package: the built-in base models, what they know, and prompts to leave alone."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.files import PICKLES, read_bounded
from esd_lora.wording import HubId

BUILT_IN = ("emoji",)
"""Names of the base models that ship."""
BASES = Path(__file__).parent / "bases"
"""Folder with one folder for each of them."""

MAX_PROMPT_FILE = 2**26
"""Bytes of the largest file of prompts that is read; COCO's 40,504 captions have 3 MB."""
MAX_PROMPTS = 200_000
"""Most lines or rows of one."""
_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # at which `str.splitlines` splits


def base_files(name: str) -> Path:
    """Return the diffusers directory of a built-in base."""
    return BASES / name / "pipeline"


def require_base(name: str) -> None:
    """Refuse a base that is neither built in nor a path that exists, and cannot be a Hub id.

    Raises:
        EsdLoraError: With what it may be.
    """
    place = Path(name)
    if name in BUILT_IN or os.path.lexists(place):
        return
    if place.suffix.lower() in (".safetensors", *PICKLES):
        raise EsdLoraError(f"no base {name!r}: there is no such file. Check its path.")
    if HubId.read(name) is None:
        raise EsdLoraError(no_base(name))


def no_base(name: str) -> str:
    """Return the sentence about a name that is no base's."""
    return (
        f"no base {name!r}: expected a built-in base ({', '.join(BUILT_IN)}), a diffusers directory, a .safetensors"
        f" checkpoint, or a Hub id 'owner/name'{did_you_mean(name, BUILT_IN)}."
    )


@cache
def domain(name: str) -> dict[str, Any]:
    """Return what a built-in base knows: objects, styles, backgrounds, prompt templates, held-out pairs, keep list."""
    return json.loads((BASES / name / "domain.json").read_text("utf-8"))


def keep_prompts(base: str) -> tuple[str, ...]:
    """Return the keep list of a base: its own if it is built in, otherwise the package's broad one."""
    if base in BUILT_IN:
        return tuple(domain(base)["keep"])
    return read_prompts(Path(__file__).parent / "prompts" / "keep.txt")


def read_prompts(file: str | Path) -> tuple[str, ...]:
    """Return the prompts of a text file, one a line; empty lines and those that begin with `#` aside.

    Raises:
        EsdLoraError: If it cannot be read, is too large, or holds none.
    """
    try:
        text = read_bounded(Path(file), MAX_PROMPT_FILE).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EsdLoraError(f"prompts cannot be read from {file} ({error}). Give a text file, one prompt a line.") from error
    if (count := sum(map(text.count, _BREAKS))) > MAX_PROMPTS:
        raise EsdLoraError(f"{file} has {count:,} lines, more than {MAX_PROMPTS:,}. Give a file of fewer prompts.")
    lines = [line.strip() for line in text.splitlines()]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise EsdLoraError(f"{file} holds no prompt. Expected a text file, one prompt a line.")
    return prompts
