"""What the page stands on, without a browser: the workplace, plans of trainings, settings, and refusals in one sentence."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio
import pytest
from click.testing import CliRunner

import esd_lora.training
from esd_lora.bases.base import Base
from esd_lora.cli import main
from esd_lora.errors import EsdLoraError
from esd_lora.recipe import Recipe
from esd_lora.ui.app import TABS, build, look, serving
from esd_lora.ui.figures import figure, lines_of_terminal
from esd_lora.ui.painting import Applied, Painter, Scene, command_of, settings_of
from esd_lora.ui.training_plan import TrainingPlan, presets_for
from esd_lora.ui.trying import _numbers, _read
from esd_lora.ui.workplace import Workplace, in_one_sentence


def in_a_loop(work: Callable[[], Any]) -> Any:
    """Return the result of work that builds a page: gradio makes an event loop that it never closes where none is running."""

    async def run() -> Any:
        return work()

    return asyncio.run(run())


def test_erasers_of_a_folder(cat_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(cat_dir, tmp_path / "no-cat")
    shutil.copytree(cat_dir, tmp_path / "objects" / "no-cat" / "inside")
    (tmp_path / "copy.safetensors").write_bytes((cat_dir / "pytorch_lora_weights.safetensors").read_bytes())
    (tmp_path / "broken.safetensors").write_bytes(b"no eraser")
    (tmp_path / "both.yaml").write_text("stack:\n- file: no-cat\n")
    (tmp_path / "other.yaml").write_text("extends: fast\n")
    shutil.copytree(cat_dir, tmp_path / ".hidden" / "no-cat")
    place = Workplace(tmp_path)
    assert place.erasers() == ["both.yaml", "copy.safetensors", "no-cat", "objects/no-cat/inside"]
    assert place.place("no-cat") == str(tmp_path / "no-cat")
    assert place.place("owner/name") == "owner/name"
    assert place.new_output(" no-dog/ ") == "no-dog"
    for name in ("", ".", "../elsewhere", "/etc", "no-cat", "-x", ".hidden2"):
        with pytest.raises(EsdLoraError, match="name"):
            place.new_output(name)
    with pytest.raises(EsdLoraError, match="no directory"):
        Workplace(tmp_path / "gone")


def test_a_page_for_showing_offers_nothing_else(tmp_path: Path) -> None:
    place = Workplace(tmp_path, erasers=["owner/no-cat"])
    assert place.erasers() == ["owner/no-cat"]
    assert place.place("owner/no-cat") == "owner/no-cat"
    with pytest.raises(EsdLoraError, match="not among what this page shows"):
        place.place("/etc/passwd")


def test_two_bases_are_held_and_no_more(tiny_dir: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).symlink_to(tiny_dir)
    place = Workplace(tmp_path)
    loaded: dict[str, Base] = {}
    for name in "abac":
        with place.base_in_use(name) as base:
            assert loaded.setdefault(name, base) is base
    with place.base_in_use("a") as base:
        assert base is loaded["a"]
    with place.base_in_use("b") as base:
        assert base is not loaded["b"]


def test_warnings_are_shown_on_the_page(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(gradio, "Warning", shown.append)
    with Workplace(tmp_path).base_in_use(str(tiny_dir)):
        warnings.warn("measure it here.", stacklevel=1)
        warnings.warn("measure it here.", stacklevel=1)
    assert shown == ["measure it here."]


def test_faults_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(text: str) -> str:
        raise EsdLoraError(text)

    def stream(text: str) -> Any:
        yield text
        raise ValueError(text)

    with pytest.raises(gradio.Error) as refused:
        in_one_sentence(refuse)("there is no <prompt>.")
    assert refused.value.message == "There is no &lt;prompt&gt;."
    assert capsys.readouterr().err == ""
    steps = in_one_sentence(stream)("secret")
    assert next(steps) == "secret"
    with pytest.raises(gradio.Error) as broken:
        next(steps)
    assert "secret" not in broken.value.message
    assert "ValueError: secret" in capsys.readouterr().err


def test_pictures_say_what_they_show() -> None:
    text = figure(b"\x89PNG", 'a "cat" <b>')
    assert 'alt="a &quot;cat&quot; &lt;b&gt;"' in text
    assert "base64,iVBORw==" in text
    assert lines_of_terminal("", "Log") == ""
    assert "a &lt;b&gt;\nc</pre>" in lines_of_terminal("a <b>\nc", "Log")


SCENE = Scene("emoji", "a cat's hat", 3, 2, None, 5.0)
APPLIED = Applied(("no-cat", "owner/no-dog"), (0.8, -0.5), 0.9)


def test_settings_repeat_a_picture() -> None:
    settings = json.loads(json.dumps(settings_of(SCENE, APPLIED)))
    assert settings["generate"] == {
        "base": "emoji",
        "prompts": ["a cat's hat"],
        "erasers": ["no-cat", "owner/no-dog"],
        "weights": [0.8, -0.5],
        "seeds": [3, 4],
        "steps": None,
        "guidance": 5.0,
    }
    assert settings["gate_threshold"] == 0.9
    assert (
        settings["command"]
        == command_of(SCENE, APPLIED)
        == (
            "esd-lora generate --base emoji --eraser no-cat:0.8 --eraser owner/no-dog:-0.5 --gate-threshold 0.9 --seed 3 -n 2"
            """ --guidance 5 --compare -o pictures -- 'a cat'"'"'s hat'"""
        )
    )
    assert " --strengths=-1,0,0.5 " in command_of(SCENE, APPLIED, [-1, 0, 0.5])


def test_inputs_out_of_range_are_told() -> None:
    good: list[Any] = ["emoji", ["a"], "a cat", 0, 1, False, 0.95, None, None, 1.0]
    assert _read(*good) == (Scene("emoji", "a cat"), Applied(("a",), (1.0,)))
    for place, value, match in (
        (1, ["a"] * 7, "7 erasers"),
        (3, None, "first seed"),
        (3, -1, "first seed"),
        (4, 9, "1 to 8 pictures"),
        (7, 0, "1 to 1000 steps"),
    ):
        with pytest.raises(EsdLoraError, match=match):
            _read(*good[:place], value, *good[place + 1 :])
    assert _numbers("-1, 0,0") == [-1, 0]
    for text in ("", "1;2", "nan", "99"):
        with pytest.raises(EsdLoraError, match="strengths"):
            _numbers(text)


def test_the_base_is_painted_once(tiny_dir: Path, cat_dir: Path, tmp_path: Path) -> None:
    painter, name = Painter(Workplace(tmp_path)), str(cat_dir)
    scene = Scene(str(tiny_dir), "a cat", 0, 2, steps=2)
    first = painter.paint(scene, Applied((name,), (1.0,)))
    again = painter.paint(scene, Applied((name,), (0.5,), gate=0.9))
    assert (first.kept, again.kept) == (False, True)
    assert again.before is first.before
    assert again.gate == f"Gate: {name} on (similarity 1.00)."
    pictures = [image.tobytes() for images in (first.before, first.after, again.after) for image in images]
    assert len({*pictures}) == 6
    off = painter.paint(scene, Applied((name,), (0.0,)))
    assert [image.tobytes() for image in off.after] == pictures[:2]
    rows = painter.paint_strengths(scene, Applied((name,), (1.0,)), [0, 1])
    assert [image.tobytes() for image in (*rows[0], *rows[1])] == pictures[:4]
    for strengths, erasers, match in (([1.0], (), "no eraser"), ([], (name,), "0 strengths"), ([1.0] * 9, (name,), "9 str")):
        with pytest.raises(EsdLoraError, match=match):
            painter.paint_strengths(scene, Applied(erasers, (1.0,)), strengths)
    with pytest.raises(EsdLoraError, match="no prompt"):
        painter.paint(scene._replace(prompt=" "), Applied((), ()))


def test_a_plan_is_what_the_command_line_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[Recipe, Any]] = []

    def train(recipe: Recipe, **options: Any) -> Any:
        trained.append((recipe, options["out"]))
        raise EsdLoraError("enough.")

    monkeypatch.setattr(esd_lora.training, "train", train)
    place = Workplace(tmp_path)
    for texts in (
        ("a cat\n\n a hat ", "a dog\nthe dog's bone: 1", "a tiger", "", "instant", "emoji", ""),
        ("-x", "", "2", "none", "thorough", "emoji", "mine"),
        ("a cat", "", "", "a dog", "fast", "emoji", "deep/er"),
    ):
        plan = TrainingPlan.read(place, *texts)
        CliRunner().invoke(main, plan.arguments())
        recipe, out = trained.pop()
        assert recipe == plan.recipe()
        assert str(out) == plan.out
    (tmp_path / "no-cat").mkdir()
    (tmp_path / "no-cat" / "file").touch()
    assert TrainingPlan.read(place, "a cat", "", "", "", "fast", "emoji", "").out == "no-cat-2"
    with pytest.raises(EsdLoraError, match="nothing to erase"):
        TrainingPlan.read(place, " \n", "", "", "", "fast", "emoji", "")
    with pytest.raises(EsdLoraError, match="no-cat is there already"):
        TrainingPlan.read(place, "a cat", "", "", "", "fast", "emoji", "no-cat")


def test_presets_that_a_base_has(tiny_dir: Path) -> None:
    assert presets_for("emoji") == presets_for(str(tiny_dir)) == ["fast", "instant", "thorough"]


def test_the_page_has_its_tabs_and_fetches_nothing(tmp_path: Path) -> None:
    page = in_a_loop(lambda: build(Workplace(tmp_path)))
    text = json.dumps(page.get_config_file(), default=str)
    assert all(title in text for title in TABS)
    assert page.analytics_enabled is False
    assert "googleapis" not in look()["theme"]._get_theme_css()
    assert look()["theme"]._stylesheets == []


def refusal(*words: str) -> str:
    """Return the one sentence that `esd-lora ui` ends with."""
    result = CliRunner().invoke(main, ["ui", "--no-open", *words])
    assert result.exit_code == 1, result.output
    assert result.output.startswith("error: ")
    assert len(result.output.splitlines()) == 1
    return result.output


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "give a --password" in refusal("--host", "0.0.0.0")
    assert "no directory" in refusal("--dir", str(tmp_path / "gone"))
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install '.[ui]'" in refusal()


def test_others_are_let_in_with_a_password_and_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gradio.Blocks, "launch", lambda _, **options: launched.update(options))
    login = ("ada", "secret")

    def show() -> None:
        with serving(Workplace(tmp_path), host="0.0.0.0", login=login):
            launched["shown"] = True

    with pytest.warns(UserWarning, match=r"whoever reaches 0.0.0.0 and knows the password"):
        in_a_loop(show)
    assert launched["shown"]
    assert (launched["auth"], launched["server_name"], launched["share"]) == ([login], "0.0.0.0", False)
