"""What the command line chooses where nothing is given: outputs that never meet, bases of the environment, prompts of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from esd_lora import sampling
from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser

QUICK = {"steps": 2, "trajectories": 2, "trajectory_steps": 2, "preserve_trajectories": 1, "preview_every": 0, "lr": 1e-3}
PAPER = ["paper", "-s", "train.steps=1", "-s", "train.trajectory_steps=2", "-s", "train.preview_every=0"]
SETTINGS = [part for key, value in QUICK.items() for part in ("-s", f"train.{key}={value}")]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def good(*args: object) -> str:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


def bad(*args: object) -> str:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert (result.exit_code, result.stderr[:7]) == (1, "error: "), result.output
    return result.stderr


def test_training_without_an_output(tiny_dir: Path) -> None:
    train = ["train", *PAPER, "--concept", "a cat", "--base", tiny_dir]
    first, second = good(*train), good(*train)
    assert first.startswith("output: erasers/a-cat\n")
    assert first.endswith(": erasers/a-cat\n")
    assert second.startswith("output: erasers/a-cat-2\n")
    for name in ("a-cat", "a-cat-2"):
        assert Eraser.load(Path("erasers", name)).names == ["a cat"]
    before = Path("erasers/a-cat/pytorch_lora_weights.safetensors").stat().st_mtime_ns
    assert good(*train, "--force").startswith("output: erasers/a-cat-2\n"), "the last one is written over"
    assert Path("erasers/a-cat/pytorch_lora_weights.safetensors").stat().st_mtime_ns == before
    assert "erasers/a-cat-2" in bad(*train, "--resume"), "and gone on in, had it a checkpoint"


def test_short_options_reach_the_recipe(tiny_dir: Path) -> None:
    rest = [part for part in SETTINGS if not part.startswith(("train.steps", "train.lr"))]
    settings = [
        part for key, part in zip(rest[::2], rest[1::2], strict=False) for part in (key, part) if part.startswith("train")
    ]
    options = ["--steps", 3, "--lr", "2e-3", "--rank", 2, "--seed", 7]
    words = [part for setting in settings for part in ("-s", setting)]
    good("train", "--concept", "a cat", "--base", tiny_dir, *words, *options, "-o", "out")
    (recipe,) = Eraser.load("out").header.recipes
    assert (recipe.train.steps, recipe.train.lr, recipe.lora.rank, recipe.train.seed) == (3, 2e-3, 2, 7)


def test_pictures_stacks_and_models_without_an_output(tiny_dir: Path, cat_dir: Path, car_dir: Path) -> None:
    paint = ["generate", "a cat, asleep", "--base", tiny_dir, "--steps", 1]
    assert good(*paint) == "output: pictures/a-cat-asleep\n1 pictures in pictures/a-cat-asleep\n"
    assert "pictures/a-cat-asleep-2" in good(*paint)
    assert "already exists" in bad(*paint, "-o", "pictures/a-cat-asleep"), "what is said is not written over"
    good("stack", cat_dir, car_dir)
    good("stack", cat_dir, car_dir)
    assert sorted(path.name for path in Path("erasers").iterdir()) == ["cat-car", "cat-car-2"]
    good("merge", "erasers/cat-car", "--base", tiny_dir)
    assert Path("models/tiny-cat-car/model_index.json").is_file()
    for layout, name in {"kohya": "cat-kohya.safetensors", "peft": "cat-peft"}.items():
        good("export", cat_dir, "--layout", layout)
        assert Path("exports", name).exists()
    good("import", "exports/cat-kohya.safetensors")
    assert Eraser.load("erasers/cat-kohya").names == ["a cat"]


def test_evaluation_without_an_output_goes_on(tiny_dir: Path, cat_dir: Path) -> None:
    Path("suite.yaml").write_text(
        "description: d\nprompts: {all: {role: general, templates: [a cat], label: cat, count: 1}}\ndetectors: {}\nsteps: 1\n"
    )
    command = ["evaluate", cat_dir, "--base", tiny_dir, "--suite", "suite.yaml"]
    first = good(*command)
    place = Path(first.splitlines()[0].removeprefix("output: "))
    assert place.name.startswith("cat-suite-")
    painted = {file: file.stat().st_mtime_ns for file in place.rglob("*.png")}
    assert painted
    assert good(*command).splitlines()[0] == first.splitlines()[0]
    assert painted == {file: file.stat().st_mtime_ns for file in place.rglob("*.png")}, "nothing is painted twice"
    assert good(*command, "-s", "steps=2").splitlines()[0] != first.splitlines()[0], "other pictures lie elsewhere"


def test_output_folder_of_the_environment(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESD_LORA_OUTPUT", "work")
    good("generate", "a cat", "--base", tiny_dir, "--steps", 1)
    assert Path("work/pictures/a-cat/000_seed0.png").is_file()


def test_base_of_the_environment(tiny_dir: Path, cat_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place of a preset's base and of none, not of a recipe's own, and never makes a stack another."""
    monkeypatch.setenv("ESD_LORA_BASE", str(tiny_dir))
    for number, preset in enumerate([SETTINGS, PAPER]):
        good("train", *preset, "--concept", "a cat", "-o", f"{number}")
        assert Eraser.load(f"{number}").header.base == str(tiny_dir)
    Path("mine.yaml").write_text("extends: fast\nconcepts: [a cat]\nbase: emojy\n")
    assert "'emojy'" in bad("train", "mine.yaml", "-o", "out")
    good("generate", "a cat", "--steps", 1, "-o", "pictures")
    good("merge", cat_dir, "-o", "merged")
    assert Path("merged/model_index.json").is_file()
    good("stack", cat_dir, "-o", "stack")
    assert Eraser.load("stack").header.fusions == ()
    Path("made/base").mkdir(parents=True)
    assert "leave out erasers, --base" not in bad("evaluate", "--suite", "emoji-object", "--score-only", "made", "-o", "m")


def test_prompts_of_a_file(tiny_dir: Path) -> None:
    Path("p.txt").write_text("# mine\na cat\n\na dog\n")
    Path("p.csv").write_text('case_number,prompt,evaluation_seed\n7,"a hat, red",12\n')
    for file, more, expected in (("p.txt", [], ["a cat", "a dog"]), ("p.csv", ["a car"], ["a car", "a hat, red"])):
        out = json.loads(good("generate", *more, "--prompts", file, "--base", tiny_dir, "--steps", 1, "--json"))
        assert [picture["prompt"] for picture in out["pictures"]] == expected
    assert "there is no prompt file none.txt" in bad("generate", "--prompts", "none.txt", "-o", "out")
    assert "nothing to paint: give a PROMPT, or --prompts" in bad("generate", "-o", "out")


def test_how_pictures_are_painted_reaches_the_base(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "negative_prompt": "blurry",
        "width": 32,
        "height": 16,
        "scheduler": "EulerDiscrete",
        "guidance": 4.0,
        "steps": 2,
    }
    painted: list[dict[str, object]] = []
    as_usual = sampling.film

    def recorded(*args: object, **kwargs: object) -> object:
        painted.append({name: kwargs.get(name) for name in options})
        return as_usual(*args, **kwargs)

    monkeypatch.setattr(sampling, "film", recorded)
    words = [
        word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value).replace("Discrete", ""))
    ]
    good("generate", "a cat", "--base", tiny_dir, *words, "-o", "out")
    assert painted == [options]
    with Image.open("out/000_seed0.png") as picture:
        assert picture.size == (32, 16)
    assert "did you mean 'DDIM'?" in bad("generate", "a cat", "--scheduler", "DDIN", "-o", "none")
    assert "draws multiples of 16 pixels" in bad("generate", "a cat", "--base", tiny_dir, "--width", "17", "-o", "none")
