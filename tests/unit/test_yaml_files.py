"""YAML files of strangers: data of a bounded size, and one sentence for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from esd_lora.erasers.manifests import load_eraser
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.suites.suite_files import load_suite
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe
from esd_lora.yaml_files import MAX_BYTES, MAX_DEPTH, MAX_VALUES, parse_yaml, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(9 * ['*' + a])}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=False)
)
REFUSED = {
    "alias bomb": (BOMB, r":2: holds an alias \(\*a\)"),
    "alias": ("a: &b {}\nc: *b", r":2: holds an alias \(\*b\)"),
    "merged alias": ("a: &b {}\nc: {<<: *b}", ":2: holds an alias"),
    "truth that is none": ("a: !!bool x", r":1: holds a tag \(!\)"),
    "integer of no digits": ("a: !!int ''", r":1: holds a tag \(!\)"),
    "code": ("a: !!python/object/apply:os.system ['exit 1']", r":1: holds a tag \(!\)"),
    "integer of 5000 digits": ("\na: " + "9" * 5000, ":2: holds a number of more than 100 digits"),
    "hexadecimal of 5000 digits": ("a: 0x" + "f" * 5000, ":1: holds a number of more than 100 digits"),
    "binary of no digits": ("a: 0b_", "not valid YAML: invalid literal"),
    "date that is none": ("a: 2020-13-45", "not valid YAML: month must be in"),
    "character that is none": (r'a: "\UFFFFFFFF"', "not valid YAML"),
    "half a character": (r'a: "\uD800"', ":1: holds half a character"),
    "many values": ("a: [" + "x," * MAX_VALUES + "]", f"more than {MAX_VALUES:,} values"),
    "many levels": ("a: " + "[" * 5000, f":1: nested too deep, beyond {MAX_DEPTH} levels"),
    "many bytes": ("#" * (MAX_BYTES + 1), f"more than {MAX_BYTES:,} bytes"),
    "bytes cut within a character": ("é" * MAX_BYTES, f"more than {MAX_BYTES:,} bytes"),
    "key that is a list": ("? [a]\n: b", "unhashable key"),
}
READERS = {"recipe": load_recipe, "suite": load_suite, "manifest": load_eraser}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_more_than_data(tmp_path: Path, text: str, words: str, reader: object) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(EsdLoraError, match=words) as caught:
        reader(file)  # type: ignore[operator]
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_is_read(tmp_path: Path) -> None:
    levels = "{a: " * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    file = tmp_path / "x.yaml"
    file.write_text(f"one: {levels[4:-1]}\nplain: &anchor ! text\nlist: [{'x,' * (MAX_VALUES - 100)}]\n")
    values = read_yaml(file, "recipe", "a: b").values
    assert (values["plain"], len(values["list"])) == ("text", MAX_VALUES - 100)
    assert parse_yaml("{a: 1e3, b: 0x10}", "-s x")[1] == {"a": "1e3", "b": 16}


def test_many_long_faults_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("extends: fast\n" + "".join(f"key{i}{'y' * 1000}: {'x' * 1000}\n" for i in range(300)))
    with pytest.raises(EsdLoraError) as caught:
        load_recipe(file)
    lines = str(caught.value).splitlines()
    assert lines[-1] == "  and more than 50 others"
    assert (len(lines), max(map(len, lines)) < 600) == (52, True)


def test_files_that_extend_two_each(tmp_path: Path) -> None:
    """A chain of 30 files, of which each extends the next twice, would be read 2 ** 30 times."""
    (tmp_path / "0.yaml").write_text("extends: fast\n")
    for i in range(1, 31):
        (tmp_path / f"{i}.yaml").write_text(f"extends: [{i - 1}.yaml, {i - 1}.yaml]\n")
    with pytest.raises(EsdLoraError, match=r"30\.yaml: extends more than 100 files, one file counted every time"):
        load_recipe(tmp_path / "30.yaml")
    assert load_recipe(tmp_path / "3.yaml", concepts=["a cat"], base="emoji") == load_recipe("fast", concepts=["a cat"])


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\\0b"])
def test_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f'extends: "{name}"\n')
    with pytest.raises(EsdLoraError, match=r"x\.yaml:1: extends no recipe") as caught:
        load_recipe(file)
    assert len(str(caught.value)) < 1500


def concept(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "x.yaml"
    file.write_text(f"extends: fast\nbase: emoji\nconcepts: [{{name: cat, {text}}}]\n")
    return load_recipe(file)


def test_prompts_times_fill(tmp_path: Path) -> None:
    prompts = ", ".join(f"p{i} {{x}}".join("''") for i in range(1000))
    words = ", ".join(f"w{i}" for i in range(1000))
    with pytest.raises(EsdLoraError, match=r"come to 1,000,000 prompts of .* up to 100,000 prompts"):
        concept(tmp_path, f"prompts: [{prompts}], fill: [{words}]")
    with pytest.raises(EsdLoraError, match=r"come to 1 prompts of 5,000,0.* up to .* of 10,000,000 characters in all"):
        concept(tmp_path, f"prompts: ['{'{x}' * 10_000}'], fill: [{'w' * 500_000}]")
    assert len(concept(tmp_path, f"prompts: ['a {{x}}', '{{x}}'], fill: [{words}]").concepts[0].lessons()) == 2000


SCOPES = {
    "long": "a" * 1000,
    "of either case": "(?i)x",
    "of either case, within": "a(?s-i:x)|(?i:y)",
    "many times": "a{99999999999}",
}


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_scope_that_takes_long_to_compile(scope: str) -> None:
    with pytest.raises(EsdLoraError, match=r"scope: .*regular expression"):
        load_recipe("fast", concepts=["cat"], scope=f"re:{scope}")
