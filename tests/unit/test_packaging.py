"""What an installation brings along."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import esd_lora
from esd_lora.recipe_files import recipes_dir

PROJECT = Path(__file__).parents[2]


INSTALLED = ("", "dev", "classify", "faces", "int8", "kolors", "metrics", "nsfw", "nudity", "ray", "ui")
"""Extras that `dev` installs, and what everyone gets."""
NOT_FOLLOWED = {
    *("bitsandbytes", "resvg-py", "trackio", "wandb"),
    *("mkdocs", "mkdocs-jupyter", "mkdocs-material", "mkdocstrings"),
}
"""Packages of extras that `dev` does not install. Offline nobody knows what they need: they themselves are looked at."""


def declared() -> dict[str, list[Requirement]]:
    """What pyproject.toml asks for by extra; under an empty name what everyone gets."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in lists.items()}


def applies(need: Requirement, extra: str = "") -> bool:
    """Whether a package is needed on this platform."""
    return need.marker is None or need.marker.evaluate({"extra": extra})


def closure(needs: Iterable[Requirement]) -> tuple[set[str], set[str]]:
    """Names of everything that these need, themselves included; and those among them that are not installed here."""
    needed: set[tuple[str, str]] = set()
    missing: set[str] = set()
    waiting = [(canonicalize_name(need.name), extra) for need in needs if applies(need) for extra in ("", *need.extras)]
    while waiting:
        package, extra = waiting.pop()
        if (package, extra) in needed or package == "esd-lora":
            continue
        needed.add((package, extra))
        try:
            lines = requires(package) or []
        except PackageNotFoundError:
            missing.add(package)
            continue
        for need in map(Requirement, lines):
            if applies(need, extra):
                waiting += [(canonicalize_name(need.name), part) for part in ("", *need.extras)]
    return {package for package, _ in needed}, missing


@pytest.mark.parametrize("extra", declared())
def test_no_extra_pulls_in_torchvision(extra: str) -> None:
    everyone, own = declared()[""], declared()[extra]
    needed, missing = closure([*everyone, *own])
    assert {"torch", "diffusers", "peft", "transformers"} <= needed
    assert {canonicalize_name(need.name) for need in own if applies(need)} <= needed | {"esd-lora"}
    assert "torchvision" not in needed
    assert missing <= NOT_FOLLOWED


def test_everything_that_tests_install_is_followed() -> None:
    needs = [need for extra in INSTALLED for need in declared()[extra]]
    needed, missing = closure(needs)
    assert not missing
    assert {"nudenet", "onnxruntime", "opencv-python-headless", "torchmetrics"} <= needed


def test_a_closure_is_followed_to_its_end() -> None:
    needed, missing = closure([Requirement("torchmetrics[image]")])
    assert {"torch", "sympy", "mpmath"} <= needed
    assert "torchvision" in needed, "what the next release of an extra might bring is seen"
    assert "torchvision" in missing


def test_lowest_constraints_are_the_bounds_that_are_declared() -> None:
    """All but torch, whose older builds are not to be had beside the CPU one."""
    text = (PROJECT / "constraints-lowest.txt").read_text("utf-8")
    pins = {
        canonicalize_name(pin.name): pin
        for line in text.splitlines()
        if line[:1] not in ("", "#")
        if (pin := Requirement(line))
    }
    needs = {canonicalize_name(need.name): need for extra in INSTALLED for need in declared()[extra]}
    assert pins.keys() == needs.keys() - {"esd-lora"}
    for name, pin in pins.items():
        (version,) = (part.version for part in pin.specifier)
        (bound,) = (part.version for part in needs[name].specifier if part.operator in (">=", "~="))
        assert needs[name].specifier.contains(version), name
        same = Version(version).release[: len(Version(bound).release)] == Version(bound).release
        assert same or name == "torch", f"{name} {version} is not the lowest that {needs[name]} allows"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return sdist and wheel, the wheel built from what is in the sdist, as pip builds one."""
    folder = tmp_path_factory.mktemp("dist")
    (sdist,) = SdistBuilder(str(PROJECT)).build(directory=str(folder), versions=["standard"])
    with tarfile.open(sdist) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    (file,) = WheelBuilder(str(source)).build(directory=str(folder), versions=["standard"])
    return Path(sdist), Path(file)


@pytest.fixture(scope="module")
def wheel(archives: tuple[Path, Path]) -> dict[str, int]:
    """Return the files of the wheel with their sizes, by path."""
    with zipfile.ZipFile(archives[1]) as opened:
        return {entry.filename: entry.file_size for entry in opened.infolist()}


@pytest.fixture(scope="module")
def sdist(archives: tuple[Path, Path]) -> dict[str, int]:
    """Return the files of the sdist with their sizes, by path inside its folder."""
    with tarfile.open(archives[0]) as opened:
        return {entry.name.partition("/")[2]: entry.size for entry in opened.getmembers() if entry.isfile()}


def test_wheel_says_that_it_is_typed(wheel: dict[str, int]) -> None:
    assert "esd_lora/py.typed" in wheel


def test_wheel_holds_every_recipe(wheel: dict[str, int]) -> None:
    recipes = {f"esd_lora/recipes/{path.relative_to(recipes_dir()).as_posix()}" for path in recipes_dir().rglob("*.*")}
    assert {"esd_lora/recipes/fuse.yaml", "esd_lora/recipes/sd/fast.yaml", "esd_lora/recipes/schema.json"} <= recipes
    assert recipes == {name for name in wheel if name.startswith("esd_lora/recipes/")}


def test_wheel_holds_every_module_and_nothing_else_of_the_checkout(wheel: dict[str, int]) -> None:
    modules = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "esd_lora").rglob("*.py")}
    assert modules == {name for name in wheel if name.endswith(".py")}
    tops = {name.partition("/")[0] for name in wheel}
    assert tops == {"esd_lora", f"esd_lora-{esd_lora.__version__}.dist-info"}


@pytest.mark.parametrize("pattern", ["prompts/*.txt", "evaluation/suites/*.yaml", "bases/emoji/**/*", "bases/configs/*"])
def test_wheel_holds_the_files_that_modules_read(wheel: dict[str, int], pattern: str) -> None:
    files = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "esd_lora").glob(pattern) if path.is_file()}
    assert files
    assert files <= wheel.keys()


def test_wheel_holds_the_templates(wheel: dict[str, int]) -> None:
    assert {"esd_lora/evaluation/report/page.html", "esd_lora/formats/card.md"} <= wheel.keys()


def test_archives_hold_nothing_larger_than_the_built_in_base(wheel: dict[str, int], sdist: dict[str, int]) -> None:
    denoiser = "esd_lora/bases/emoji/pipeline/unet/diffusion_pytorch_model.safetensors"
    for files in (wheel, sdist):
        assert max(files, key=lambda name: files[name]) == denoiser
        assert sum(files.values()) < 2.5 * files[denoiser]


def test_sdist_holds_what_is_needed_to_work_on_it(sdist: dict[str, int]) -> None:
    needed = {
        "pyproject.toml",
        "Makefile",
        "constraints.txt",
        "constraints-lowest.txt",
        "mkdocs.yml",
        "CHANGELOG.md",
        "LICENSE",
        "NOTICE",
    }
    assert needed <= sdist.keys()
    for folder in ("tests", "recipes", "docs", "benchmarks", "playground", "hub_upload", "integrations"):
        files = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / folder).rglob("*") if path.is_file()}
        files = {name for name in files if "__pycache__" not in name and not name.startswith("playground/emoji-")}
        assert files <= sdist.keys(), folder
    assert not [name for name in sdist if name.startswith((".venv", "out/", "dist/")) or name.endswith(".pyc")]


@pytest.fixture(scope="module")
def alone(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of a fresh environment with the wheel in it, and dependencies from this one, but not its esd_lora.

    A folder that a .pth file names is searched last and its own .pth files are not read, so that an editable install there
    leads nowhere.
    """
    folder = tmp_path_factory.mktemp("alone") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(archives[1])], check=True, timeout=120)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n", "utf-8")
    return python.parent


def run_alone(alone: Path, tmp_path: Path, *command: str) -> str:
    """What a program of that environment prints, started outside of the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    program = [str(alone / command[0]), *command[1:]]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_alone_is_what_runs(alone: Path, tmp_path: Path) -> None:
    place = Path(run_alone(alone, tmp_path, "python", "-c", "import esd_lora; print(esd_lora.__file__)").strip())
    assert place.is_relative_to(alone.parent)
    assert not place.is_relative_to(PROJECT)


def test_wheel_alone_has_the_command(alone: Path, tmp_path: Path) -> None:
    assert run_alone(alone, tmp_path, "esd-lora", "--version") == f"esd-lora, version {esd_lora.__version__}\n"
    assert "sd/CONCEPT" in run_alone(alone, tmp_path, "python", "-m", "esd_lora", "recipes", "list")
    check = ("recipes", "check", "sd/van-gogh", "emoji-cat", "fuse")
    assert run_alone(alone, tmp_path, "esd-lora", *check).count(": good, ") == 3


def test_wheel_alone_has_every_public_name_and_its_base(alone: Path, tmp_path: Path) -> None:
    code = "\n".join(
        [
            "import esd_lora",
            "for name in esd_lora.__all__: getattr(esd_lora, name)",
            "from esd_lora.evaluation.suites.suite_files import load_suite, suite_names",
            "for name in suite_names(): load_suite(name)",
            "from esd_lora.built_in import domain",
            "print(len(esd_lora.__all__), len(domain('emoji')['objects']), esd_lora.load_base('emoji', device='cpu').steps)",
        ]
    )
    names, objects, steps = map(int, run_alone(alone, tmp_path, "python", "-c", code).split())
    assert (names, objects) == (len(esd_lora.__all__), 40)
    assert steps > 0
