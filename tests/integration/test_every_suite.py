"""Every suite for models of others, end to end: painted by the built-in base, real detectors, toy weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from skimage import data

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.evaluation.evaluating import evaluate
from esd_lora.evaluation.suites.suite_files import suite_names
from networks import ToyInception, save_alexnet, save_classifier, save_clip, save_script
from random_erasers import eraser_on

IMAGENETTE = (
    "tench, English springer, cassette player, chain saw, church, French horn, garbage truck, gas pump, golf ball, parachute"
)
ELSEWHERE = {"attack", "emoji-attack", "emoji-demo", "emoji-object", "emoji-style"}
"""Suites with tests of their own: test_attacks, test_evaluating, and `make demo`."""


class SuiteRun(NamedTuple):
    """A suite, what counts as erased, what `-s` gives, and what is measured, `role.metric`, of the erased model."""

    concept: str
    settings: dict[str, Any]
    measured: set[str]
    warned: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the files that the suites ask for."""
    here = tmp_path_factory.mktemp("toys")
    for name in ("clip", "imagenette", "artists", "styles", "things", "faces"):
        (here / name).mkdir()
    save_alexnet(here / "alexnet.pth")
    save_clip(here / "clip")
    save_classifier(here / "imagenette", IMAGENETTE.split(", "))
    save_classifier(here / "artists", ["Claude Monet", "Vincent van Gogh"])
    save_classifier(here / "styles", ["Monet", "Van Gogh", "Winter", "Pop Art"])
    save_classifier(here / "things", ["Architectures", "Bears", "Dogs", "Cats"])
    save_script(ToyInception(), here / "inception.pt")
    Image.fromarray(data.astronaut()).save(here / "faces" / "astronaut.png")
    (here / "i2p.csv").write_text("prompt,sd_seed,sd_guidance_scale\na nude cat,1,7\na photo of a cat,2,8.5\n")
    (here / "captions.csv").write_text(
        "case_number,source,prompt,evaluation_seed\n1,coco,a dog in a house,3\n2,coco,a photo of a dog,4\n"
    )
    (here / "artists.csv").write_text(
        "case_number,prompt,evaluation_seed,artist\n0,a cat by Vincent van Gogh,5,Vincent van Gogh\n"
        "1,a dog by Claude Monet,6,Claude Monet\n"
    )
    (here / "known.txt").write_text("a photo of a cat\na cat\n")
    (here / "mine.csv").write_text("prompt,class\na photo of a cat,Cats\na photo of a dog,Dogs\n")
    return here


@pytest.fixture(scope="module")
def emoji() -> Base:
    return load_base("emoji")


RUNS = {
    "nudity": SuiteRun(
        "nudity",
        {"prompts.i2p.file": "i2p.csv", "prompts.captions.file": "captions.csv", "detectors.clip.path": "clip"},
        {"target.mace.count", "target.nsfw", "general.esd.flagged", "general.clip"},
        ("i2p.csv is no release that is known, not I2P",),
    ),
    "objects": SuiteRun(
        "tench",
        {"detectors.resnet50.path": "imagenette"},
        {"target.accuracy", "general.top5", "general.resnet50.accuracy"},
    ),
    "style": SuiteRun(
        "Vincent van Gogh",
        {
            "prompts.artists.file": "artists.csv",
            "detectors.lpips.path": "alexnet.pth",
            "detectors.clip.path": "clip",
            "detectors.artist.path": "artists",
        },
        {
            "target.lpips",
            "general.lpips",
            "target.clip",
            "target.artist.accuracy",
            "general.artist.accuracy",
            "neighbour.lpips",
        },
    ),
    "identity": SuiteRun(
        "Jane Doe",
        {"detectors.faces.references": "faces", "detectors.clip.path": "clip"},
        {"target.face", "target.same", "neighbour.face", "neighbour.clip"},
    ),
    "memorised": SuiteRun(
        "a cat",
        {
            "prompts.prompts.file": "known.txt",
            "prompts.captions.file": "captions.csv",
            "detectors.ssim.originals": "faces",
            "detectors.lpips.originals": "faces",
            "detectors.lpips.path": "alexnet.pth",
            "detectors.clip.path": "clip",
        },
        {"target.ssim", "target.lpips", "general.clip"},
    ),
    "coco": SuiteRun(
        "a car",
        {
            "prompts.captions.file": "captions.csv",
            "detectors.lpips.path": "alexnet.pth",
            "detectors.clip.path": "clip",
            "distances.fid.path": "inception.pt",
        },
        {"general.clip", "general.ssim", "general.lpips"},
        ("captions.csv is no release that is known, not AdvUnlearn COCO 10k",),
    ),
    "unlearncanvas": SuiteRun(
        "Van Gogh",
        {
            "detectors.style.path": "styles",
            "detectors.object.path": "things",
            "prompts.canvas.fill.style": ["Monet", "Van Gogh"],
            "prompts.canvas.fill.object": ["Architectures", "Dogs"],
        },
        {"target.style.accuracy", "target.object.rest", "general.style.accuracy", "general.object.accuracy"},
    ),
    "custom": SuiteRun(
        "Cats",
        {"prompts.prompts.file": "mine.csv", "detectors.classifier.path": "things"},
        {"target.accuracy", "target.top5", "general.accuracy"},
    ),
}


def test_no_suite_is_forgotten() -> None:
    assert set(suite_names()) == set(RUNS) | ELSEWHERE


# torch deprecates TorchScript, and NVIDIA's Inception is published as nothing else.
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.* is no release that is known")
@pytest.mark.parametrize("name", RUNS)
def test_suite(name: str, emoji: Base, toys: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run = RUNS[name]
    eraser = eraser_on(emoji.model, ["mid_block.attentions.0.transformer_blocks.0.attn2.to_v"], "a cat", seed=1)
    settings = {
        key: str(toys / value) if key.endswith((".file", ".path", ".references", ".originals")) else value
        for key, value in run.settings.items()
    }
    report = evaluate(
        emoji,
        name,
        tmp_path / "out",
        erasers=[eraser],
        concepts=[run.concept],
        limit=4,
        settings=settings | {"steps": 2},
        progress=False,
    )
    found = {f"{role}.{metric}" for role, metrics in report.variants["erased"].items() for metric in metrics}
    assert not run.measured - found, sorted(found)
    assert report.not_run == {}
    assert all(number.of > 0 for role in report.variants["erased"].values() for number in role.values())
    lines = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert {line["variant"] for line in lines} == {"base", "erased"}
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!")
    assert sorted({w for w in run.warned if any(w in str(warning.message) for warning in recwarn)}) == sorted(run.warned)
    if name == "coco":
        assert set(report.distances) == {"efficientnet", "fid"}
    if name == "unlearncanvas":
        assert set(report.layout["erased"]) == {"UA", "IRA", "CRA"}
    if name == "objects":
        assert set(report.layout["erased"]) == {
            f"{part}, {when}" for part in ("erased class", "other classes") for when in ("base", "erased")
        }
