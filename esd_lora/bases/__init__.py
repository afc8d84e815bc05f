"""Base models that ship inside the package, and the prompts an eraser should leave alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

BUILT_IN = ("emoji",)


def base_files(name: str) -> Path:
    """The diffusers directory of a built-in base."""
    return Path(__file__).parent / name / "pipeline"


@cache
def domain(name: str) -> dict[str, Any]:
    """What a built-in base knows: objects, styles, backgrounds, prompt templates, held-out pairs, keep list."""
    return json.loads((Path(__file__).parent / name / "domain.json").read_text("utf-8"))


def keep_prompts(base: str) -> tuple[str, ...]:
    """The keep list of a base: its own if it is built in, otherwise the package's broad one."""
    if base in BUILT_IN:
        return tuple(domain(base)["keep"])
    lines = (Path(__file__).parent.parent / "prompts" / "keep.txt").read_text("utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
