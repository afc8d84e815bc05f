"""Recipes, suites and headers travel: the code that they name is data, until whoever runs them allows that very name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from esd_lora.bases.base import Base
from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks.victim import Victim
from esd_lora.evaluation.evaluating import evaluate, score_pictures
from esd_lora.evaluation.registries import ATTACKS, DETECTORS, FEATURES, build
from esd_lora.evaluation.suites.suite_files import Suite, load_suite
from esd_lora.evaluation.variants import Variant
from esd_lora.formats.inspecting import inspect_file
from esd_lora.objectives import Predictions, find_objective
from esd_lora.optimizers import make_optimizer
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train
from random_erasers import random_eraser
from tiny import tiny_recipe

OWN = """import torch
from pathlib import Path

Path(__file__).with_name("ran").touch()


def towards_anchor(teacher, eta):
    return teacher.anchor + 0 * eta


def number(teacher, eta):
    return 1.0


def short(teacher, eta):
    return teacher.anchor[:1, :1]


class Sgd(torch.optim.SGD):
    pass


class Needy:
    def __init__(self, *, path):
        pass


CONSTANT = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `own_code` that can be imported; the file given appears when it is."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_code.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder)
    yield folder / "ran"
    sys.modules.pop("own_code", None)


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def refusal(result: Result) -> str:
    """The error of a command that fails as a user's mistake should."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    return result.stderr


def suite_text(**parts: str) -> str:
    parts = {"detectors": "{}", **parts}
    prompts = "description: x\nprompts: {all: {role: general, templates: [a cat]}}\nsteps: 2\n"
    return prompts + "".join(f"{key}: {value}\n" for key, value in parts.items())


SPEC = '{mine: {kind: "own_code:Needy", args: [sh, -c, "touch here"]}}'


@pytest.mark.parametrize("part", ["detectors", "distances", "attacks"])
def test_suite_alone_runs_no_code(own: Path, tmp_path: Path, part: str) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(suite_text(**{part: SPEC}))
    for read in (lambda: load_suite(file), lambda: evaluate("no base", file, tmp_path / "out")):
        with pytest.raises(EsdLoraError, match=r"theirs\.yaml:\d: .*'own_code:Needy' is code.*add --allow-code own_code:Needy"):
            read()
    assert "--allow-code own_code:Needy" in refusal(
        invoke("evaluate", "--base", "emoji", "--suite", file, "-o", tmp_path / "o")
    )
    given = invoke("evaluate", "--base", "emoji", "--suite", "emoji-demo", "-s", f"{part}={SPEC}", "-o", tmp_path / "o")
    assert "--allow-code own_code:Needy" in refusal(given)
    assert not own.exists()
    assert load_suite(file, allow_code=["own_code:Needy"]).name == "theirs"


@pytest.mark.parametrize("kind", ["subprocess:Popen", "os:system"])
def test_suite_that_was_made_in_python_runs_no_code_either(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "ran"
    specs = {"mine": {"kind": kind, "args": ["touch", str(marker)], "command": f"touch {marker}"}}
    for part in ("detectors", "distances", "attacks"):
        fields: dict[str, Any] = {"detectors": {}, part: specs}
        suite = Suite(description="x", prompts={}, **fields)
        with pytest.raises(EsdLoraError, match=f"add --allow-code {kind}"):
            evaluate("no base", suite, tmp_path / "out")
        with pytest.raises(EsdLoraError, match=f"add --allow-code {kind}"):
            score_pictures("no pictures", suite, tmp_path / "out", concepts=[])
    assert not marker.exists()


@pytest.mark.parametrize(
    ("key", "name"),
    [("objective", "own_code:towards_anchor"), ("train.optimizer", "own_code:Sgd")],
)
def test_recipe_alone_runs_no_code(own: Path, tiny_dir: Path, tmp_path: Path, key: str, name: str) -> None:
    file = tmp_path / "theirs.yaml"
    nested = f'{{optimizer: "{name}"}}' if "." in key else f'"{name}"'
    file.write_text(f"extends: fast\nconcepts: [a cat]\n{key.partition('.')[0]}: {nested}\n")
    with pytest.raises(EsdLoraError, match=rf"theirs\.yaml:3: {key}: .*add --allow-code {name}"):
        load_recipe(file)
    with pytest.raises(EsdLoraError, match=rf"--set: {key}: .*add --allow-code {name}"):
        load_recipe("fast", {key: name}, concepts=["a cat"])
    setting = f"{key}={name}"
    for command in (["train", file], ["train", "--concept", "a cat", "-s", setting], ["train", "fast", "-s", setting]):
        assert f"--allow-code {name}" in refusal(
            invoke(*command, "--concept", "a dog", "--base", tiny_dir, "-o", tmp_path / "o")
        )
    assert f"--allow-code {name}" in refusal(invoke("recipes", "check", file))
    assert not own.exists()

    checked = invoke("recipes", "check", file, "--allow-code", name)
    assert (checked.exit_code, checked.stdout) == (0, f"{file}: good, erases a cat\n")
    assert checked.stderr == f"allowed to run code of its own: {name}\n"
    assert not own.exists(), "checking allows, and does not import"
    small = [
        "-s",
        "train.steps=1",
        "-s",
        "train.trajectories=2",
        "-s",
        "train.trajectory_steps=2",
        "-s",
        "train.preview_every=0",
    ]
    trained = invoke("train", file, *small, "--base", tiny_dir, "--allow-code", name, "-o", tmp_path / "out")
    assert trained.exit_code == 0, trained.output
    assert f"allowed to run code of its own: {name}\n" in trained.stderr
    assert own.exists()
    (recipe,) = Eraser.load(tmp_path / "out").header.recipes
    assert name in (recipe.objective, recipe.train.optimizer)
    assert f"--allow-code {name}" in refusal(invoke("train", tmp_path / "out" / "recipe.yaml", "-o", tmp_path / "again"))


def test_header_of_a_stranger_is_read_and_its_code_is_not_run(own: Path, tmp_path: Path) -> None:
    eraser = random_eraser({"mid.attn2.to_k": 1})
    fields = eraser.header.recipes[0].model_dump()
    fields |= {"objective": "own_code:towards_anchor", "train": {**fields["train"], "optimizer": "own_code:Sgd"}}
    header = eraser.header.model_copy(update={"objective": "own_code:towards_anchor", "recipes": (Recipe(**fields),)})
    folder = Eraser(eraser.pairs, header).save(tmp_path / "theirs")
    read = Eraser.load(folder).header.recipes[0]
    assert read.objective == "own_code:towards_anchor"
    assert "own_code:towards_anchor" in "\n".join(inspect_file(folder).lines())
    with pytest.raises(EsdLoraError, match="add --allow-code own_code:towards_anchor"):
        train(read)
    with pytest.raises(EsdLoraError, match="add --allow-code own_code:Sgd"):
        train(read, allow_code=["own_code:towards_anchor"])
    assert "recipe.yaml:" in refusal(invoke("train", folder / "recipe.yaml", "-o", tmp_path / "out"))
    assert not own.exists()


@pytest.mark.parametrize("name", [":x", "x:", "a:b:c", "a b:c", "a:b.c", "a..b:c", "1a:b", "a:b()"])
def test_what_is_no_module_and_attribute(tmp_path: Path, name: str) -> None:
    for run in (
        lambda: load_recipe("fast", {"objective": name}, concepts=["a cat"], allow_code=[name]),
        lambda: Recipe(**{**tiny_recipe("x").model_dump(), "objective": name}),
        lambda: find_objective(name, [name]),
    ):
        with pytest.raises(ValueError if run.__code__.co_names[0] == "Recipe" else EsdLoraError, match="module:attribute"):
            run()
    assert "is named module:attribute" in refusal(invoke("recipes", "check", "fast", "--allow-code", name))
    file = tmp_path / "theirs.yaml"
    file.write_text(suite_text(detectors=f'{{mine: {{kind: "{name}"}}}}'))
    with pytest.raises(EsdLoraError, match="neither a known name nor module:attribute"):
        load_suite(file)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_module:x", "cannot be imported: No module named 'no_such_module'"),
        ("own_code:missing", "cannot be imported: module 'own_code' has no attribute 'missing'"),
        ("own_code:CONSTANT", "is a int, expected a function or a class"),
        ("os:path", "is a module, expected a function or a class"),
        ("os:system", "no function of predictions and eta: too many positional arguments"),
        ("own_code:Sgd", "is a class, and no function of predictions and eta"),
        ("builtins:dict", "no function of predictions and eta"),
    ],
)
@pytest.mark.usefixtures("own")
def test_objective_that_is_none(name: str, sentence: str) -> None:
    with pytest.raises(EsdLoraError, match=sentence) as caught:
        find_objective(name, [name])
    assert str(caught.value).startswith(f"objective {name!r} ")


@pytest.mark.parametrize(("name", "made"), [("own_code:number", "type float"), ("own_code:short", r"shape \[1, 1, 8, 8\]")])
@pytest.mark.usefixtures("own")
def test_objective_that_returns_no_target(base: Base, tiny_dir: Path, name: str, made: str) -> None:
    recipe = tiny_recipe(tiny_dir).model_copy(update={"objective": name})
    with pytest.raises(EsdLoraError, match=f"objective '{name}' returned a target of {made}, expected a tensor"):
        train(recipe, base=base, progress=False, allow_code=[name])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("torch.optim:LBFGS", r"computes the loss again within a step \(missing a required argument: 'closure'\)"),
        ("own_code:Needy", "does not take"),
        ("collections:OrderedDict", "does not take|makes a OrderedDict, expected a torch.optim.Optimizer"),
        ("builtins:dict", "makes a dict, expected a torch.optim.Optimizer"),
        ("own_code:CONSTANT", "expected a function or a class"),
    ],
)
@pytest.mark.usefixtures("own")
def test_optimizer_that_is_none(name: str, sentence: str) -> None:
    parameters: list[Any] = [] if name == "builtins:dict" else [nn.Parameter(torch.zeros(2))]
    with pytest.raises(EsdLoraError, match=sentence):
        make_optimizer(name, parameters, 0.1, {}, [name])


def test_optimizer_of_ones_own(own: Path) -> None:
    (made,) = (make_optimizer("own_code:Sgd", [nn.Parameter(torch.zeros(2))], 0.1, {}, ["own_code:Sgd"]),)
    assert own.exists()
    assert type(made).__name__ == "Sgd"


BUILT: dict[str, tuple[Callable[[str], object], str]] = {
    "settings that are missing": (
        lambda name: build(DETECTORS, name, {}, expected=Eraser, allow_code=[name]),
        "cannot be built with settings {}: missing a required argument: 'path'",
    ),
    "another class": (
        lambda name: build(FEATURES, name, {"path": "x"}, expected=Eraser, allow_code=[name]),
        "builds a Needy, expected a Eraser",
    ),
}


@pytest.mark.parametrize(("make", "sentence"), BUILT.values(), ids=BUILT)
@pytest.mark.usefixtures("own")
def test_detector_that_is_none(make: Callable[[str], object], sentence: str) -> None:
    with pytest.raises(EsdLoraError, match=sentence):
        make("own_code:Needy")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("builtins:dict", "does not say which settings it takes"), ("operator:truth", "builds a bool, expected a Variant")],
)
def test_attack_that_is_none(name: str, sentence: str) -> None:
    victim: Victim | int = 3
    with pytest.raises(EsdLoraError, match=sentence):
        build(ATTACKS, name, {}, victim, expected=Variant, allow_code=[name])


def test_predictions_are_what_an_objective_of_ones_own_gets(own: Path) -> None:
    objective = find_objective("own_code:towards_anchor", ["own_code:towards_anchor"])
    predictions = Predictions(*torch.randn(3, 2, 4, 8, 8))
    assert torch.equal(objective(predictions, torch.ones(2, 1, 1, 1)), predictions.anchor)
    assert own.exists()
