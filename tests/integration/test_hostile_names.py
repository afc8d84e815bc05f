"""Names that a terminal would obey: shown, never obeyed, in whatever a command prints and in the files that people look at."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import esd_lora
from esd_lora.cli import main
from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.evaluation.detectors.detector import Picture, Score
from esd_lora.evaluation.registries import DETECTORS
from esd_lora.formats.cards import save_with_card
from esd_lora.recipe_files import load_recipe
from esd_lora.wording import printable, printable_lines

NAME = "cat\x1b]0;owned\x07\x1b[31m\u202e\u200b\x9b2J\nerror: mine"
"""A concept that sets a terminal's title and colour, turns the direction of reading, and writes a line of its own."""
SETTINGS = ["train.steps=1", "train.trajectories=1", "train.trajectory_steps=2", "train.preview_every=0", "preserve=[]"]
PACKAGE = Path(esd_lora.__file__).parent


def obeyed(text: str) -> set[str]:
    """Return what a terminal or a page would obey in a text, but line breaks, which the test of each text looks at."""
    kinds = ("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn")
    return {character for character in text if unicodedata.category(character) in kinds} - {"\n"}


def prints(*args: object) -> str:
    """Return what a command that succeeds prints, on either stream."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    printed = result.stdout + result.stderr.replace("\r", "")  # which progress bars write
    assert not obeyed(printed), repr(printed)
    assert not any(line.startswith("error: ") for line in printed.splitlines()), printed
    return printed


def shown(*files: Path) -> None:
    """See that files which people look at hold nothing that is obeyed."""
    for file in files:
        text = file.read_text("utf-8")
        assert "owned" in text, file
        assert not obeyed(text), (file, obeyed(text))
        if file.suffix == ".md":  # where a line break means something
            assert not any(line.startswith("error: ") for line in text.splitlines()), file


@pytest.fixture
def evil(cat: Eraser, tmp_path: Path) -> Path:
    """An eraser whose header is a stranger's."""
    concepts = [c.model_copy(update={"name": NAME, "pairs": ((NAME, NAME),), "synonyms": (NAME,)}) for c in cat.header.concepts]
    recipes = [load_recipe(r, concepts=[NAME], base=f"/models/{NAME}") for r in cat.header.recipes]
    changes = {
        "concepts": concepts,
        "recipes": recipes,
        "base": f"/models/{NAME}",
        "versions": {NAME: NAME},
        "preserve": (NAME,),
    }
    header = cat.header.model_validate(cat.header.model_dump() | changes)
    return save_with_card(Eraser(cat.pairs, header), tmp_path / "evil")


@pytest.mark.filterwarnings("ignore:.* is given twice")
def test_stack_and_report(evil: Path, tmp_path: Path, tiny_dir: Path) -> None:
    out = tmp_path / "out"
    assert "owned" in prints("stack", evil, f"{evil}:-1", "-o", out, "--fuse", "sum", "--report", "--base", tiny_dir)
    shown(out / "README.md", out / "recipe.yaml", evil / "README.md", evil / "recipe.yaml")
    assert "owned" in prints("stack", evil, "-o", tmp_path / "stack.yaml")
    assert "owned" in prints("stack", evil, "--base", tiny_dir, "-o", tmp_path / "fused")


def test_inspect_diff_export_import(evil: Path, tmp_path: Path, cat_dir: Path) -> None:
    assert "owned" in prints("inspect", evil)
    assert json.loads(prints("inspect", evil, "--json"))["header"]["concepts"][0]["name"] == NAME
    assert "owned" in prints("diff", cat_dir, evil)
    for layout in ("kohya", "diffusers", "peft"):
        out = tmp_path / f"\x1b[31m{layout}.safetensors"
        assert r"\x1b[31m" in prints("export", evil, "--layout", layout, "-o", out)
        assert "owned" in prints("import", out, "-o", tmp_path / f"{layout} again")
    shown(tmp_path / "kohya again" / "README.md")


def test_import_of_a_file_with_a_name(evil: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from esd_lora.formats.exporting import kohya_tensors

    file = tmp_path / "owned\x1b[31m\u202e.safetensors"
    save_file(kohya_tensors(Eraser.load(evil)), file, {"ss_tag": NAME})
    assert "owned" in prints("import", file, "--family", "sd", "--concept", NAME, "--base", NAME, "-o", tmp_path / "out")
    assert "owned" in prints("inspect", tmp_path / "out")
    shown(tmp_path / "out" / "README.md")


def test_what_a_push_would_show(evil: Path) -> None:
    published = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    printed = prints("push", evil, "ada/x", "--dry-run", "--base-model", published, "--kohya")
    assert printed.count("owned") > 4  # draft and card


def test_catalog(evil: Path) -> None:
    assert "owned" in prints("catalog", "--no-cache", evil.parent)
    assert json.loads(prints("catalog", "--no-cache", "--json", evil.parent))["erasers"]


def test_recipes(tmp_path: Path) -> None:
    file = tmp_path / "\u202eowned.yaml"
    file.write_text("# \u202e owned\n" + yaml.safe_dump({"extends": "fast", "concepts": [NAME]}), "utf-8")
    assert "owned" in prints("recipes", "check", file)
    again = tmp_path / "again.yaml"
    again.write_text(prints("recipes", "check", file, "--resolved"), "utf-8")
    assert load_recipe(again) == load_recipe(file)  # what is printed is still the recipe
    file.write_text("# a cat\u202e\u200b\nextends: fast\n", "utf-8")
    assert prints("recipes", "show", file) == "# a cat\\u202e\\u200b\nextends: fast\n"


def test_train_and_generate(tiny_dir: Path, tmp_path: Path) -> None:
    settings = [part for setting in SETTINGS for part in ("-s", setting)]
    out = tmp_path / "out\x1b[31m"
    assert prints("train", "--concept", NAME, "--base", tiny_dir, *settings, "--kohya", "-o", out).count("owned") > 1
    shown(out / "README.md", out / "recipe.yaml")
    prints("generate", NAME, "--base", tiny_dir, "--steps", 1, "--eraser", out, "--compare", "--gate", "-o", tmp_path / "p")


class Brightness:
    """A detector of nothing much, whose metric has a name of its own."""

    def record(self) -> dict[str, Any]:
        return {"name": NAME}

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        return [Score({NAME: i % 2 == 0}, {"seen": NAME}) for i, _ in enumerate(pictures)]


@pytest.mark.filterwarnings("ignore:.* is given twice")
def test_evaluate(evil: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DETECTORS.entries, "bright", "test_hostile_names:Brightness")
    suite = tmp_path / "owned\u202e.yaml"
    sets = {
        role: {
            "role": role,
            "templates": [f"{NAME} {{class}}"],
            "fill": {"class": [NAME, "dog"]},
            "label": "{class}",
            "count": 2,
        }
        for role in ("target", "general")
    }
    plan = {"description": NAME, "prompts": sets, "detectors": {"bright": {}, "clip": {}}, "steps": 1}
    suite.write_text(yaml.safe_dump(plan), "utf-8")
    out = tmp_path / "out"
    command = ["evaluate", evil, evil, "--stack", "--base", tiny_dir, "--suite", suite, "-o", out, "--concept", NAME]
    assert "not run: clip" in prints(*command)
    shown(out / "table.md", out / "report.html")
    prints("evaluate", evil, "--base", tiny_dir, "--suite", suite, "-o", tmp_path / "attached", "--attach")
    shown(evil / "README.md")
    assert "owned" in prints("inspect", evil)


def test_error_and_warning(tmp_path: Path, evil: Path, tiny_dir: Path) -> None:
    for command in (
        ["inspect", NAME],
        ["train", NAME, "-o", tmp_path],
        ["evaluate", "--suite", NAME, "--base", "emoji", "-o", "x"],
    ):
        result = CliRunner().invoke(main, [str(word) for word in command])
        assert result.exit_code == 1
        assert not obeyed(result.stderr)
        assert result.stderr.count("\n") == 1
    printed = prints("merge", evil, "--base", tiny_dir, "-o", tmp_path / "merged")
    assert "merged pipeline" in printed


def test_half_a_character(tiny_dir: Path, tmp_path: Path) -> None:
    """YAML can say what UTF-8 cannot; then nothing that is painted or trained could be written down."""
    recipe, suite = tmp_path / "r.yaml", tmp_path / "s.yaml"
    recipe.write_text('extends: fast\nconcepts: ["cat \\uD83D"]\n')
    prompts = 'prompts: {all: {role: general, templates: ["a \\uDCFF"]}}'
    suite.write_text(f"description: Mine.\n{prompts}\ndetectors: {{clip: {{}}}}\n")
    good = tmp_path / "good.yaml"
    good.write_text(suite.read_text().replace("\\uDCFF", "cat"))
    measure = ["evaluate", "--base", str(tiny_dir), "-o", str(tmp_path / "out"), "--suite"]
    for command, place in (
        (["recipes", "check", str(recipe)], f"{recipe}:2: holds"),
        ([*measure, str(suite)], f"{suite}:2: holds"),
        ([*measure, str(good), "-s", 'prompts.all.templates=["\\uDCFF"]'], "-s prompts.all.templates"),
    ):
        result = CliRunner().invoke(main, command)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.stderr.startswith(f"error: {place}"), result.stderr
        assert "half a character" in result.stderr
        assert not (tmp_path / "out").exists()


def test_terminal_of_few_characters(evil: Path) -> None:
    """What the stream's encoding lacks is shown by its code."""
    command = [sys.executable, "-m", "esd_lora", "inspect", str(evil)]
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert rb"\u2588" in done.stdout


def test_what_is_shown_and_what_stays() -> None:
    assert printable("a\u202eb\u200b\x1b\x7f\x9b\u2028\ud800\ue000") == r"a\u202eb\u200b\x1b\x7f\x9b\u2028\ud800\ue000"
    for name in (
        "猫 c'est ça",
        "می\u200cخواهم",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "ideographic\u3000space",
        "\u00a0",
    ):
        assert printable(name) == name
    assert printable_lines("a\nb\rc") == "a\nb\\rc"


def calls(module: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(module.read_text("utf-8"))) if isinstance(node, ast.Call)]


def test_one_function_prints() -> None:
    printing = {"click.echo", "click.secho", "click.echo_via_pager", "echo", "print", "sys.stdout.write", "sys.stderr.write"}
    found = [
        f"{module.relative_to(PACKAGE)}:{ast.unparse(call)}"
        for module in sorted(PACKAGE.rglob("*.py"))
        for call in calls(module)
        if ast.unparse(call.func) in printing
    ]
    assert [place.partition(":")[0] for place in found] == ["cli/printing.py"], found


def test_progress_bars_show_no_foreign_text() -> None:
    """What stands on a bar is a constant, or made printable right there."""
    shown = ("printable(", "desc")  # the latter hands a constant on
    for module in sorted(PACKAGE.rglob("*.py")):
        for call in calls(module):
            name = ast.unparse(call.func)
            texts = [keyword.value for keyword in call.keywords if keyword.arg == "desc"]
            if name == "tqdm.write" or name.endswith(".set_postfix_str"):
                texts.append(call.args[0])
            for text in texts:
                foreign = not isinstance(text, ast.Constant) and not ast.unparse(text).startswith(shown)
                assert not foreign, f"{module.name}:{call.lineno}"


def test_no_control_survives_in_the_docs_of_an_eraser(evil: Path) -> None:
    """The weights' header is JSON, which escapes what it must; everything else in the folder is printable."""
    shutil.rmtree(evil / "samples", ignore_errors=True)
    for file in evil.iterdir():
        if file.name != WEIGHTS_NAME:
            assert not obeyed(file.read_text("utf-8")), file
