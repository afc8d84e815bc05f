"""What an installation brings along."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(name: str, extras: tuple[str, ...]) -> set[str]:
    """Names of everything that `name[extras]` needs here, itself included."""
    found: set[tuple[str, str]] = set()
    waiting = [(name, extra) for extra in ("", *extras)]
    while waiting:
        package, extra = waiting.pop()
        if (package, extra) in found:
            continue
        found.add((package, extra))
        try:
            lines = requires(package) or []
        except PackageNotFoundError:  # an extra that is not installed: named, not followed
            continue
        for need in map(Requirement, lines):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(need.name), part) for part in ("", *need.extras)]
    return {package for package, _ in found}


def test_no_extra_pulls_in_torchvision() -> None:
    extras = tuple(metadata("esd-lora").get_all("Provides-Extra") or ())
    needed = closure("esd-lora", extras)
    assert {"torch", "diffusers", "peft", "transformers"} <= needed
    assert "torchvision" not in needed
