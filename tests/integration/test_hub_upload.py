"""The published collection: its file, the loop that makes it, and the Space that shows it."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import loopback_hub
from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.report.summarising import read_condition
from esd_lora.evaluation.suites.suite_files import load_suite
from esd_lora.formats.licenses import license_of
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train
from esd_lora.ui.painting import Applied, Painter, Scene
from loopback_hub import LoopbackHub

hub = loopback_hub.hub  # the fixture

FOLDER = Path(__file__).parents[2] / "hub_upload"


def script(place: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hub_upload_{Path(place).stem}", FOLDER / place)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # pydantic looks there
    spec.loader.exec_module(module)
    return module


PUBLISH = script("publish.py")
COLLECTION = PUBLISH.read_collection(FOLDER / "collection.yaml")


@pytest.mark.parametrize("entry", COLLECTION.erasers, ids=lambda entry: entry.repo)
def test_entries_name_what_there_is(entry: Any) -> None:
    base = load_recipe(entry.recipe).base
    assert license_of(base, entry.license) == license_of(base, None)
    suite = load_suite(entry.suite, entry.settings)
    assert suite.sensitive <= entry.sensitive
    for gate in entry.fail_if:
        read_condition(gate, ["base", "erased"])


def test_every_repository_is_named_once() -> None:
    names = [entry.repo for entry in COLLECTION.erasers]
    assert len(set(names)) == len(names)


QUICK = """extends: fast
base: emoji
train: {steps: 0, preview_every: 0}
"""
TOY = """owner: ada
erasers:
  - recipe: RECIPE
    repo: good
    license: apache-2.0
    suite: emoji-object
    settings: {steps: 2}
    limit: 1
    fail_if: ["erased.accuracy>1"]
  - recipe: RECIPE
    repo: bad
    license: apache-2.0
    suite: emoji-object
    settings: {steps: 2}
    limit: 1
    fail_if: ["erased.accuracy>-1"]
"""


def test_publishing(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.user("ada", "hf_ada")
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    (tmp_path / "quick.yaml").write_text(QUICK + "concepts: [a cat]\n")
    (tmp_path / "toy.yaml").write_text(TOY.replace("RECIPE", str(tmp_path / "quick.yaml")))
    collection = PUBLISH.read_collection(tmp_path / "toy.yaml")
    (reason,) = PUBLISH.publish(collection, tmp_path / "out")
    assert reason.startswith("bad: the evaluation is written, and failed")
    assert "erased.accuracy>-1" in reason
    assert "not sent: --publish sends it" in capsys.readouterr().out
    assert hub.log == []
    PUBLISH.publish(collection, tmp_path / "out", send=True)
    assert f"pushed: {hub.endpoint}/ada/good" in capsys.readouterr().out
    assert set(hub.repos) == {"ada/good"}
    assert b"## Measured" in hub.files("ada/good")["README.md"]
    hub.log.clear()
    assert PUBLISH.publish(collection, tmp_path / "out", ["good"], send=True) == []
    assert "nothing changed" in capsys.readouterr().out
    assert [request for request in hub.log if request.method == "PUT"] == []
    (tmp_path / "quick.yaml").write_text(QUICK + "concepts: [a dog]\n")
    (reason,) = PUBLISH.publish(collection, tmp_path / "out", ["good"], send=True)
    assert "made by another recipe" in reason
    (tmp_path / "out" / "good" / WEIGHTS_NAME).unlink()
    assert PUBLISH.publish(collection, tmp_path / "out", ["good"]) != []
    with pytest.raises(EsdLoraError, match=r"no 'god' \(did you mean 'good'\?\)"):
        PUBLISH.publish(collection, tmp_path / "out", ["god"])


def test_the_space_shows_its_erasers_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("emoji-cat", {"train.steps": 0, "train.preview_every": 0})
    train(recipe, out=tmp_path / "cat", progress=False)
    monkeypatch.setenv("ERASERS", str(tmp_path / "cat"))

    async def load() -> ModuleType:  # gradio makes an event loop that it never closes where none is running
        return script("space/app.py")

    space = asyncio.run(load())
    components = [component["props"] for component in space.page.get_config_file()["components"]]
    assert [c["label"] for c in components if str(c.get("label", "")).startswith("Strength of")] == [
        f"Strength of {tmp_path / 'cat'}"
    ]
    painter = Painter(space.workplace)
    painted = painter.paint(Scene("emoji", "a cat", 3), Applied((str(tmp_path / "cat"),), (1.0,)))
    assert painted.before[0].tobytes() != painted.after[0].tobytes()
    with pytest.raises(EsdLoraError, match="not among what this page shows"):
        painter.paint(Scene("emoji", "a cat"), Applied((str(tmp_path),), (1.0,)))
