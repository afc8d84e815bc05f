"""Stack manifests: an eraser wherever one is accepted, and nothing outside their directory."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.erasers.manifests import load_eraser, write_manifest
from esd_lora.erasers.stacking import Strength, stack
from esd_lora.errors import EsdLoraError
from random_erasers import random_eraser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with two erasers."""
    random_eraser({"conv": 2, "mid.attn2.to_k": 1}, "a cat", dtype=torch.float32).save(tmp_path / "no-cat")
    random_eraser({"conv": 1}, "a hat", seed=1, dtype=torch.float32).save(tmp_path / "deep" / "no-hat")
    return tmp_path


def refusal(folder: Path, content: object) -> str:
    file = folder / "stack.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(EsdLoraError) as caught:
        load_eraser(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_manifest_is_the_exact_stack(folder: Path) -> None:
    strengths = [Strength(0.5, {"mid": 0.25}), Strength(-1.0)]
    members = [folder / "no-cat", folder / "deep" / "no-hat" / WEIGHTS_NAME]
    written = write_manifest(folder / "stack.yaml", members, strengths)
    expected = stack([Eraser.load(member) for member in members], strengths)
    for loaded in (written, load_eraser(folder / "stack.yaml"), load_eraser(folder)):
        assert loaded.header == expected.header
        assert loaded.pairs.keys() == expected.pairs.keys()
        assert all(torch.equal(loaded.pairs[m].delta(), pair.delta()) for m, pair in expected.pairs.items())


def test_what_a_manifest_says(folder: Path) -> None:
    write_manifest(folder / "s.yaml", [folder / "no-cat"], [Strength(0.5, {"mid": 2.0})])
    digest = hashlib.sha256((folder / "no-cat" / WEIGHTS_NAME).read_bytes()).hexdigest()
    assert yaml.safe_load((folder / "s.yaml").read_text()) == {
        "stack": [{"file": "no-cat", "weight": 0.5, "blocks": {"mid": 2.0}, "sha256": digest}]
    }


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "\u202eback", "back\\slash", "tab\t", "n" * 250])
def test_manifest_that_could_not_be_read_is_not_written(folder: Path, name: str) -> None:
    shutil.copytree(folder / "no-cat", folder / name)
    with pytest.raises(EsdLoraError, match="a manifest cannot name") as caught:
        write_manifest(folder / "stack.yaml", [folder / "no-cat", folder / name], [Strength(), Strength()])
    assert "\n" not in str(caught.value)
    assert not (folder / "stack.yaml").exists()


@pytest.mark.parametrize(
    "name", ["it's: a #name", "- 猫 🐈", "true", "1e3", "'quoted\"", "{a: b}", "&a *b !c", " space", "n" * 249]
)
def test_manifest_names_what_is_odd_and_is_read_again(folder: Path, name: str) -> None:
    shutil.copytree(folder / "no-cat", folder / name)
    write_manifest(folder / "stack.yaml", [folder / name], [Strength()])
    assert load_eraser(folder / "stack.yaml").names == ["a cat"]


def test_member_whose_name_is_no_utf_8_is_refused(folder: Path) -> None:
    shutil.copytree(folder / "no-cat", folder / "caf\udce9")
    with pytest.raises(EsdLoraError, match="not valid UTF-8"):  # safetensors opens no such file
        write_manifest(folder / "stack.yaml", [folder / "caf\udce9"], [Strength()])


def test_manifest_moves_with_its_erasers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write_manifest(folder / "stack.yaml", [folder / "no-cat"], [Strength()])
    elsewhere = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "copy")
    assert load_eraser(elsewhere / "stack.yaml").names == ["a cat"]


def test_directory_of_an_eraser_is_the_eraser(folder: Path) -> None:
    (folder / "no-cat" / "stack.yaml").write_text("stack: nonsense")
    assert load_eraser(folder / "no-cat").names == ["a cat"]


def test_member_that_changed(folder: Path) -> None:
    write_manifest(folder / "stack.yaml", [folder / "no-cat"], [Strength()])
    random_eraser({"conv": 2}, "a dog").save(folder / "no-cat")
    with pytest.raises(EsdLoraError, match="no-cat has changed since"):
        load_eraser(folder / "stack.yaml")


@pytest.mark.parametrize(
    "place", ["../{name}/no-cat", "{folder}/no-cat", "deep/../../{name}/no-cat", "deep\\..\\no-cat", "~/x", "link"]
)
def test_nothing_outside_is_read(folder: Path, tmp_path_factory: pytest.TempPathFactory, place: str) -> None:
    outside = random_eraser({"conv": 2}).save(tmp_path_factory.mktemp("outside") / "eraser")
    (folder / "link").symlink_to(outside)
    named = place.format(name=folder.name, folder=folder)
    assert ("outside its directory" if place != "~/x" else "no eraser at") in refusal(folder, {"stack": [{"file": named}]})


BROKEN = {
    "empty": ("", "stack manifest"),
    "no YAML": ("stack: [", "no stack manifest"),
    "tags": ("stack: !!python/object/apply:os.system ['exit 1']", "no stack manifest"),
    "a list": ("- a", "stack manifest"),
    "no members": ({"stack": []}, "stack"),
    "unknown field": ({"stack": [{"file": "no-cat", "wieght": 1}]}, "wieght"),
    "weight that is no number": ({"stack": [{"file": "no-cat", "weight": "much"}]}, "weight"),
    "infinite weight": ("stack: [{file: no-cat, weight: .inf}]", "weight"),
    "hash that is none": ({"stack": [{"file": "no-cat", "sha256": "12"}]}, "sha256"),
    "missing member": ({"stack": [{"file": "nothing"}]}, "no eraser at"),
    "manifest in itself": ({"stack": [{"file": "stack.yaml"}]}, "is a member of itself"),
    "unknown block": ({"stack": [{"file": "no-cat", "blocks": {"up.7": 0}}]}, "no layer in 'up.7'"),
    "nested too deep": ("[" * 5000, "no stack manifest"),
    "too long": ("#" * (2**20 + 1), "more than"),
}


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_manifests(folder: Path, content: object, words: str) -> None:
    assert words in refusal(folder, content)


def test_manifest_of_manifests(folder: Path) -> None:
    write_manifest(folder / "deep" / "stack.yaml", [folder / "deep" / "no-hat"], [Strength(0.5)])
    members = [folder / "no-cat", folder / "deep" / "stack.yaml", folder / "deep"]
    write_manifest(folder / "stack.yaml", members, [Strength(), Strength(2.0), Strength(-1.0)])
    loaded = load_eraser(folder / "stack.yaml")
    assert [(c.name, c.weight) for c in loaded.header.concepts] == [("a cat", 1.0), ("a hat", 1.0), ("a hat", -0.5)]
    hat = Eraser.load(folder / "deep" / "no-hat")
    expected = stack([Eraser.load(folder / "no-cat"), hat], [1.0, 0.5])
    torch.testing.assert_close(loaded.pairs["conv"].delta(), expected.pairs["conv"].delta())
    (folder / "deep" / "stack.yaml").write_text("stack: [{file: no-hat}]")
    with pytest.raises(EsdLoraError, match=r"deep/stack\.yaml has changed since"):
        load_eraser(folder / "stack.yaml")


def test_manifests_in_a_circle(folder: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (folder / f"{name}.yaml").write_text(f"stack: [{{file: no-cat}}, {{file: {other}.yaml}}]")
    with pytest.raises(EsdLoraError, match=r"a\.yaml is a member of itself"):
        load_eraser(folder / "a.yaml")


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match="no stack manifest"):
        load_eraser(tmp_path / "nothing.yaml")


def test_member_outside_is_not_written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = random_eraser({"conv": 2}).save(tmp_path_factory.mktemp("outside") / "eraser")
    with pytest.raises(EsdLoraError, match="Write the manifest above it"):
        write_manifest(folder / "stack.yaml", [outside], [Strength()])
    assert not (folder / "stack.yaml").exists()
