"""What is refused before anything heavy is loaded, and what is warned of."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from esd_lora.bases.presets import require_fitting
from esd_lora.errors import EsdLoraError, near_ones
from esd_lora.preflight import check, check_inputs, check_output, check_strengths
from esd_lora.recipe_files import recipe_folder

EARLY = {
    "train into what is there": ("train --concept cat -o {full}", "already exists and is not empty"),
    "train into a file": ("train --concept cat -o {file}", "is a file, expected a directory"),
    "train below a file": ("train --concept cat -o {file}/out", "is a file, expected a directory"),
    "train on no base": ("train --concept cat --base nowhere.safetensors -o {out}", "there is no such file"),
    "train on a name": ("train --concept cat --base emojj -o {out}", "did you mean 'emoji'?"),
    "train by no recipe": ("train emoji-cta -o {out}", "(did you mean 'emoji-cat'? or"),
    "train by a wrong recipe": (
        "train emoji-cat -s train.steps=many -o {out}",
        "--set: train.steps: expected a whole number, or",
    ),
    "generate into what is there": ("generate cat -o {full}", "already exists and is not empty"),
    "generate with no eraser": ("generate cat --eraser {out} -o {out}", "no eraser at"),
    "generate at an absurd strength": ("generate cat --eraser {full}:50 -o {out}", "strength 50 of {full} is beyond all use"),
    "generate at absurd strengths": ("generate cat --eraser {full} --strengths 0,99 -o {out}", "strength 99 of --strengths"),
    "generate on no base": ("generate cat --base nowhere -o {out}", "no base 'nowhere'"),
    "stack into what is there": ("stack {full} -o {full}/..", "already exists and is not empty"),
    "stack of nothing": ("stack {out} -o {out}", "no eraser at"),
    "stack into a manifest that is there": ("stack {full} -o {yaml}", "already exists"),
    "merge into what is there": ("merge {full} --base emoji -o {full}/..", "already exists and is not empty"),
    "merge into no base": ("merge {full} --base nowhere -o {out}", "no base 'nowhere'"),
    "evaluate on no base": ("evaluate {full} --base nowhere --suite emoji-object -o {out}", "no base 'nowhere'"),
    "evaluate into a file": ("evaluate {full} --base emoji --suite emoji-object -o {file}", "is a file"),
    "extract into what is there": ("extract --base emoji --tuned {full} --rank 1 -o {full}", "already exists and is not empty"),
    "demo into what is there": ("demo -o {full}", "already exists and is not empty"),
}
"""Commands that fail, with what they say."""
SCRIPT = """
import json, sys
from click.testing import CliRunner
from esd_lora.cli import main
for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, words)
    assert isinstance(result.exception, SystemExit), (words, result.exception)
    print(json.dumps([result.exit_code, result.stderr, sorted({"torch", "diffusers", "peft"} & set(sys.modules))]))
"""


def test_what_is_wrong_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    import json

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "two.yaml").write_text("stack: []")
    places = {name: tmp_path / name for name in ("full", "file", "out")} | {"yaml": tmp_path / "two.yaml"}
    commands = [[word.format(**places) for word in command.split()] for command, _ in EARLY.values()]
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True, check=True)
    before = sorted(tmp_path.rglob("*"))
    for (name, (_, expected)), line in zip(EARLY.items(), done.stdout.splitlines(), strict=True):
        code, text, loaded = json.loads(line)
        assert code == 1, name
        assert text.startswith("error: "), name
        assert text.count("\n") <= 2, name  # a fault of a recipe has a line of its own
        assert expected.format(**places) in text, name
        assert loaded == [], f"{name}: {loaded} were loaded for nothing"
    assert sorted(tmp_path.rglob("*")) == before, "and nothing was written"


def test_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "a" / "b", force=False)
    assert list(tmp_path.iterdir()) == [], "it is only tried"

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(EsdLoraError, match=r"output .* cannot be written: Permission denied"):
        check_output(tmp_path / "a", force=True)


def test_output_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "x").touch()
    with pytest.raises(EsdLoraError, match="which is read"):
        check(tmp_path / "cat", True, None, [(str(tmp_path / "cat"), 1.0, {})])


@pytest.mark.parametrize("strength", [3.5, -2.5, 9])
def test_unusual_strength_is_warned_of(strength: float) -> None:
    with pytest.warns(UserWarning, match="unusual"):
        check_strengths([strength], "no-cat")


def test_usual_strengths(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="error"):
        check_strengths([-2, -1, 0, 0.5, 1, 1.5, 3], "no-cat")
        check_inputs("emoji", [(str(tmp_path), 1.0, {"mid": 0.5}), ("me/no-cat", 1.0, {})])
        check_inputs("me/base@main")
    with pytest.raises(EsdLoraError, match="strength 20 of"):
        check_inputs(None, [(str(tmp_path), 2.0, {"mid": 10.0})])


def test_eraser_given_twice(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match=r"is given twice, so that its strengths add up to 1\.5: give it once, as .*link:1\.5"):
        check_inputs(None, [(str(tmp_path), 1.0, {}), (str(tmp_path / "link"), 0.5, {})])


def test_five_near_ones() -> None:
    assert near_ones("fsat", ["fast", "paper", "leco", "x", "y", "z"])[0] == "fast"
    assert len(near_ones("nothing like it", list("abcdefgh"))) == 5


@pytest.mark.parametrize(
    ("recipes", "folder"),
    [
        (["sdxl/fast"], "sdxl"),
        (["sdxl/van-gogh"], "sdxl"),
        (["sd/fast", "concepts/van-gogh"], "sd"),
        (["flux/schnell"], "flux"),
    ],
)
def test_folder_that_says_the_base(recipes: list[str], folder: str) -> None:
    assert recipe_folder(recipes) == folder


def test_recipe_of_ones_own_that_extends_a_preset(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: sdxl/fast\nconcepts: [cat]\n")
    assert recipe_folder([str(tmp_path / "mine.yaml")]) == "sdxl"
    (tmp_path / "mine.yaml").write_text("extends: sdxl/fast\nconcepts: [cat]\nbase: mine\n")
    assert recipe_folder([str(tmp_path / "mine.yaml")]) is None
    assert recipe_folder(["fast"]) is None
    assert recipe_folder(["concepts/van-gogh"]) is None


def test_recipe_for_another_family(tiny_dir: Path) -> None:
    for base, fitting in (("emoji", "fast"), (str(tiny_dir), "fast")):
        with pytest.raises(EsdLoraError, match=rf"bases of sdxl's kind, .* is of family 'sd': give {fitting} in its place"):
            require_fitting(["sdxl/fast"], base)
        require_fitting(["sd/fast"], base)
        require_fitting(["fast"], base)
    require_fitting(["sdxl/fast"], "nowhere")  # which loading it says
