"""Files that travel name nobody's directories: of a path on this machine the last part is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.privacy import scrub, without_folders
from esd_lora.erasers.tensor_files import read_header
from esd_lora.evaluation.detectors.detector import Picture, Score
from esd_lora.evaluation.evaluating import evaluate, score_pictures
from esd_lora.evaluation.picture_files import hash_by_name
from esd_lora.evaluation.registries import DETECTORS
from esd_lora.evaluation.report.report import Report
from esd_lora.evaluation.suites.suite_files import Suite
from esd_lora.formats.exporting import export
from esd_lora.weights.merging import merge
from original_checkpoints import save_checkpoint
from tiny import tiny_pipeline

PROMPTS = {"all": {"role": "general", "templates": ["a {class}"], "fill": {"class": ["cat", "dog"]}, "label": "{class}"}}


class Size:
    """A detector of nothing much, that names a file of its own."""

    def record(self) -> dict[str, Any]:
        return {"weights": f"{Path.home()}/weights/net.pt"}

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        return [Score({"large": picture.image.width > 10}) for picture in pictures]


def toy_suite() -> Suite:
    return Suite(description="Sizes.", prompts=PROMPTS, detectors={"size": {}}, steps=1)


@pytest.fixture
def secret(tiny_dir: Path, tmp_path: Path) -> Path:
    """A base in a directory that says who made it."""
    return shutil.copytree(tiny_dir, tmp_path / "secret" / "my-sd")


def local_eraser(cat: Eraser, base: Path) -> Eraser:
    """Return an eraser that was trained on a base of this machine."""
    recipes = tuple(r.model_copy(update={"base": str(base), "base_config": str(base)}) for r in cat.header.recipes)
    return Eraser(cat.pairs, cat.header.model_copy(update={"base": str(base), "recipes": recipes}))


def clean(folder: Path) -> None:
    """See that no file below a folder, or the file itself, holds a directory of this machine."""
    for file in [folder] if folder.is_file() else folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert b"secret" not in content, file
            assert str(Path.home()).encode() + b"/" not in content, file


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/home/me/models/sd15", "sd15"),
        ("/home/me/models/sd15/", "sd15"),
        ("~/models/sd15.safetensors", "sd15.safetensors"),
        ("../models/sd15", "sd15"),
        (r"C:\models\sd15", "sd15"),
        ("owner/name", "owner/name"),
        ("owner/name@refs/pr/1", "owner/name@refs/pr/1"),
        ("emoji", "emoji"),
        ("a/b/c", "c"),
        ("x" * 300 + "/y", "x" * 300 + "/y"),
    ],
)
def test_names_of_bases(name: str, expected: str) -> None:
    assert without_folders(name) == expected


def test_a_directory_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_folders("models/sd15") == "models/sd15"
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    assert without_folders("models/sd15") == "sd15"


def test_documents() -> None:
    document = {"base": {"id": "/a/b"}, "list": ["/a/c.pt", 1, None], "concepts": ["/not/a/path"], "scope": "xattn"}
    assert scrub(document) == {"base": {"id": "b"}, "list": ["c.pt", 1, None], "concepts": ["/not/a/path"], "scope": "xattn"}


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_exported_files(cat: Eraser, secret: Path, tmp_path: Path, layout: str) -> None:
    eraser = local_eraser(cat, secret)
    out = export(eraser, tmp_path / f"{layout}.safetensors", layout=layout)
    clean(out)
    if layout == "kohya":
        assert read_header(out).metadata["ss_sd_model_name"] == "my-sd"
    if layout == "peft":
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "my-sd"
    else:
        assert Eraser.load(out).header.base == "my-sd" if layout == "diffusers" else True
    assert eraser.header.base == str(secret)  # its own header keeps what was given
    away = cat.header.model_copy(update={"base": "owner/name"})
    out = export(Eraser(cat.pairs, away), tmp_path / f"{layout}2.safetensors", layout=layout)
    assert b"owner/name" in (out / "adapter_config.json" if layout == "peft" else out).read_bytes()


def test_merged_files(cat: Eraser, secret: Path, tmp_path: Path) -> None:
    clean(merge([local_eraser(cat, secret)], secret, tmp_path / "merged", progress=False))
    file = save_checkpoint(tiny_pipeline(), secret / "model.safetensors")
    out = merge([local_eraser(cat, secret)], file, tmp_path / "merged.safetensors", progress=False)
    clean(out)
    assert b'\\"base\\": \\"model.safetensors\\"' in out.read_bytes()


def test_evaluations(cat: Eraser, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DETECTORS.entries, "size", "test_travelling_files:Size")
    out = tmp_path / "out"
    report = evaluate(load_base(secret, device="cpu"), toy_suite(), out, erasers=[local_eraser(cat, secret)], progress=False)
    assert report.record["base"]["id"] == "my-sd"
    assert report.record["detectors"]["size"]["weights"] == "net.pt"
    clean(out)
    again = evaluate(load_base(secret, device="cpu"), toy_suite(), out, erasers=[local_eraser(cat, secret)], progress=False)
    assert again == report  # the same evaluation is gone on with


def test_pictures_made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DETECTORS.entries, "size", "test_travelling_files:Size")
    pictures = tmp_path / "secret" / "pictures"
    for model in ("base", "erased"):
        (pictures / model).mkdir(parents=True)
        for case in ("all-00000", "all-00001"):
            Image.new("RGB", (12, 8)).save(pictures / model / f"{case}.png")
    score_pictures(pictures, toy_suite(), tmp_path / "out", concepts=["a cat"], progress=False)
    clean(tmp_path / "out")
    images = [json.loads(line)["image"] for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert len(images) == 4
    assert all((pictures / image).is_file() for image in images)


def test_pictures_whose_names_are_no_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written down of them is text."""
    monkeypatch.setitem(DETECTORS.entries, "size", "test_travelling_files:Size")
    odd = tmp_path / "caf\udce9"
    for model in ("base", "\udcff"):
        (odd / model).mkdir(parents=True)
        for case in ("all-00000", "all-00001"):
            Image.new("RGB", (12, 8)).save(odd / model / f"{case}.png")
    report = score_pictures(odd, toy_suite(), tmp_path / "out", concepts=["a cat"], progress=False)
    assert list(report.variants) == ["base", r"\udcff"]
    assert Report.load(tmp_path / "out") == report
    photo = (odd / "base" / "all-00000.png").rename(odd / "\udcfe.png")
    assert list(hash_by_name([photo])) == [r"\udcfe.png"]
