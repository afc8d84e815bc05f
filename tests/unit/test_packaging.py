"""What an installation brings along."""

from __future__ import annotations

import zipfile
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from esd_lora.recipe_files import recipes_dir

PROJECT = Path(__file__).parents[2]


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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the files of the wheel, by path."""
    (file,) = WheelBuilder(str(PROJECT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with zipfile.ZipFile(file) as opened:
        return set(opened.namelist())


def test_wheel_says_that_it_is_typed(wheel: set[str]) -> None:
    assert "esd_lora/py.typed" in wheel


def test_wheel_holds_every_recipe(wheel: set[str]) -> None:
    recipes = {f"esd_lora/recipes/{path.relative_to(recipes_dir()).as_posix()}" for path in recipes_dir().rglob("*.*")}
    assert {"esd_lora/recipes/fuse.yaml", "esd_lora/recipes/sd/fast.yaml", "esd_lora/recipes/schema.json"} <= recipes
    assert recipes == {name for name in wheel if name.startswith("esd_lora/recipes/")}


def test_wheel_holds_every_module_and_nothing_else_of_the_checkout(wheel: set[str]) -> None:
    modules = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "esd_lora").rglob("*.py")}
    assert modules == {name for name in wheel if name.endswith(".py")}
