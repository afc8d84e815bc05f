"""Detectors on real photos whose content is known, and on toy networks against a plain computation.

The photos come inside scikit-image: an astronaut's portrait, a tabby cat's face (chelsea), an espresso, a rocket at dusk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage import data
from skimage.metrics import structural_similarity
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPModel,
    ResNetForImageClassification,
    ResNetModel,
)

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors.classify import Classifier, ImageNet
from esd_lora.evaluation.detectors.clip import ClipScore
from esd_lora.evaluation.detectors.detector import Picture, Score
from esd_lora.evaluation.detectors.faces import Faces
from esd_lora.evaluation.detectors.frechet import EfficientNetFeatures, InceptionFeatures, frechet_distance
from esd_lora.evaluation.detectors.nudity import Nudity, OpenNsfw
from esd_lora.evaluation.detectors.similarity import Lpips, Ssim
from esd_lora.evaluation.registries import DETECTORS
from esd_lora.files import hash_file
from networks import IMAGENET, ToyInception, resnet_config, save_alexnet, save_classifier, save_clip, save_script
from tiny import tiny_tokenizer

CATS = (281, 282, 285)  # ImageNet: tabby, tiger cat, Egyptian cat
ESPRESSO = 967
NAMES = ["tench, Tinca tinca", "crane", "church", "crane", "cat", "dog", "gas pump"]


def photo(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)())


ASTRONAUT, CAT, COFFEE, ROCKET = map(photo, ("astronaut", "chelsea", "coffee", "rocket"))
HEAD = ASTRONAUT.crop((90, 20, 380, 310))
MIRRORED = ASTRONAUT.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
BLURRED = ASTRONAUT.filter(ImageFilter.GaussianBlur(3))


def picture(image: Image.Image, label: str | None = None, before: Image.Image | None = None, prompt: str = "") -> Picture:
    return Picture(image, prompt, label, before=before)


def values(detector: Callable[[list[Picture]], list[Score]], *pictures: Picture) -> list[Mapping[str, bool | float]]:
    return [score.values for score in detector(list(pictures))]


@pytest.fixture(scope="module")
def portraits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One photo of the astronaut, the other way round."""
    folder = tmp_path_factory.mktemp("portraits")
    MIRRORED.save(folder / "astronaut.png")
    return folder


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_alexnet(tmp_path_factory.mktemp("alexnet") / "alexnet.pth")


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def resnet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("resnet"), NAMES)


def test_nudenet_sees_a_face_and_nothing_exposed() -> None:
    astronaut, cat, coffee, rocket = Nudity()([picture(image) for image in (ASTRONAUT, CAT, COFFEE, ROCKET)])
    (face,) = astronaut.details["detections"]
    assert face["class"] == "FACE_FEMALE"
    assert face["score"] > 0.6
    left, top, width, height = face["box"]
    assert left < 224 < left + width, "the nose is at (224, 125)"
    assert top < 125 < top + height
    for score in (astronaut, cat, coffee, rocket):
        assert len(score.values) == 8
        assert not any(score.values.values())


def test_nudenet_sees_what_it_sees_in_a_file(tmp_path: Path) -> None:
    """The channels go in as OpenCV reads them."""
    import nudenet

    ASTRONAUT.save(tmp_path / "astronaut.png")
    (found,) = nudenet.NudeDetector().detect(str(tmp_path / "astronaut.png"))
    (seen,) = Nudity()([picture(ASTRONAUT)])[0].details["detections"]
    assert seen == {"class": found["class"], "score": round(found["score"], 4), "box": found["box"]}


def test_nudenet_records_its_protocols() -> None:
    record = Nudity().record()
    assert record["package"] == "nudenet"
    assert record["protocols"]["mace"]["threshold"] == 0.6
    assert record["protocols"]["spm"]["counts"] == "classes"
    assert "names mapped" in record["protocols"]["esd"]["written_for"]


def test_open_nsfw_is_low_on_harmless_photos() -> None:
    found = values(OpenNsfw(), picture(COFFEE), picture(CAT), picture(ASTRONAUT), picture(ROCKET))
    assert all(0 <= score["nsfw"] < 0.1 for score in found)
    assert not any(score["nsfw.flagged"] for score in found)
    assert found[1]["nsfw"] < found[2]["nsfw"], "a cat is further from it than a person"


def test_open_nsfw_flags_from_its_threshold_on() -> None:
    (probability,) = (score["nsfw"] for score in values(OpenNsfw(), picture(COFFEE)))
    for threshold, flagged in ((probability, 1), (probability + 1e-6, 0), (0, 1), (1, 0)):
        detector = OpenNsfw(threshold=threshold)
        assert values(detector, picture(COFFEE)) == [{"nsfw": probability, "nsfw.flagged": flagged}]
        assert detector.record()["threshold"] == threshold


def test_imagenet_names_what_is_there() -> None:
    cat, coffee = ImageNet()([picture(CAT, "285"), picture(COFFEE, str(ESPRESSO))])
    seen = [entry["index"] for entry in cat.details["top5"]]
    assert seen[0] in CATS
    assert set(CATS) <= set(seen)
    # The companion package efficientnet_lite_pytorch 0.1.0, which has the network, gives the same for the same pixels.
    sure = {entry["index"]: entry["probability"] for entry in cat.details["top5"]}
    assert [sure[index] for index in (282, 285, 281)] == pytest.approx([0.4082, 0.3404, 0.1670], abs=0.002)
    assert cat.values == {"accuracy": seen[0] == 285, "top5": True}
    assert coffee.values == {"accuracy": 1, "top5": 1}
    assert coffee.details["top5"][0]["probability"] > 0.8
    assert coffee.details["seen"] == f"class {ESPRESSO}"


def test_imagenet_knows_what_is_not_there() -> None:
    detector = ImageNet()
    assert values(detector, picture(CAT, "golf ball"), picture(COFFEE, "tench")) == [{"accuracy": 0, "top5": 0}] * 2
    assert values(detector, picture(CAT)) == [{}], "no label, nothing to be right about"
    with pytest.raises(EsdLoraError, match="did you mean 'golf ball'"):
        detector([picture(CAT, "0"), picture(CAT, "golf bal")])


def test_classifier_as_computed_plainly(resnet_dir: Path) -> None:
    """Shorter side to 32 / 0.875 pixels, the middle 32 of them, ImageNet's mean and deviation, softmax."""
    image = CAT.crop((0, 0, 250, 200))
    pixels = torch.from_numpy(np.array(image.resize((45, 36), Image.Resampling.BICUBIC)))[2:34, 6:38].permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(x)[:, None, None] for x in IMAGENET)
    model = ResNetForImageClassification.from_pretrained(resnet_dir).eval()
    with torch.no_grad():
        expected = model(((pixels - mean) / deviation)[None]).logits.softmax(1)[0]
    order = expected.argsort(descending=True).tolist()
    scores = Classifier(path=resnet_dir)([picture(image, str(index)) for index in order])
    assert [score.values for score in scores] == [{"accuracy": i == 0, "top5": i < 5} for i in range(len(NAMES))]
    for entry, index in zip(scores[0].details["top5"], order, strict=False):
        assert (entry["index"], entry["name"]) == (index, NAMES[index])
        assert entry["probability"] == pytest.approx(expected[index].item(), abs=2e-3)


def test_classifier_reads_labels_of_its_own(resnet_dir: Path) -> None:
    detector = Classifier(path=resnet_dir)
    assert detector([picture(CAT, "Tinca tinca")]) == detector([picture(CAT, "0")])
    for label, message in (("crane", "the classes 1 and 3"), ("gas pumps", "did you mean 'gas pump'"), ("7", "from 0 to 6")):
        with pytest.raises(EsdLoraError, match=message):
            detector([picture(CAT, label)])


def test_classifier_without_its_head_is_refused(resnet_dir: Path, tmp_path: Path) -> None:
    """transformers would fill the head by chance and classify with that."""
    ResNetModel(resnet_config(NAMES)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((resnet_dir / "preprocessor_config.json").read_bytes())
    with pytest.raises(EsdLoraError, match=r"lacks 2 weights, classifier.*Expected a model trained to classify"):
        Classifier(path=tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(EsdLoraError, match="no image classifier can be loaded from"):
        Classifier(path=tmp_path)


def test_clip_score_as_computed_plainly(clip_dir: Path, tmp_path: Path) -> None:
    """Cosine of the two projections; with the picture's side turned round, the other sign, which counts as 0."""
    model = CLIPModel.from_pretrained(clip_dir).eval()
    image = CAT.crop((0, 0, 200, 200))
    pixels = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    mean, deviation = (
        torch.tensor(x)[:, None, None] for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    tokens = torch.tensor([tiny_tokenizer()("a cat").input_ids])
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(((pixels - mean) / deviation)[None]).pooler_output)
        read = model.text_projection(model.text_model(tokens).pooler_output)
        cosine = functional.cosine_similarity(seen, read).item()
        model.visual_projection.weight.neg_()
    for file in clip_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path)
    (straight,), (turned,) = (values(ClipScore(path=path), picture(image, prompt="a cat")) for path in (clip_dir, tmp_path))
    assert straight["clip"] == pytest.approx(max(100 * cosine, 0), abs=0.1)
    assert turned["clip"] == pytest.approx(max(-100 * cosine, 0), abs=0.1)
    assert sorted(score["clip"] > 1 for score in (straight, turned)) == [False, True]


def test_clip_cuts_long_prompts(clip_dir: Path) -> None:
    detector = ClipScore(path=clip_dir)
    room = 16 - 2  # for the tokens of beginning and end
    exact, longer, other = (picture(CAT, prompt=" ".join(letters)) for letters in ("b" * room, "b" * 40, "c" * 40))
    scores = values(detector, exact, longer, other)
    assert scores[0] == scores[1] != scores[2]


def test_clip_without_its_vision_part_is_refused(resnet_dir: Path, clip_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match="no CLIP can be loaded from"):
        ClipScore(path=resnet_dir)
    for file in clip_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = CLIPModel.from_pretrained(clip_dir)
    words = {name: x for name, x in model.state_dict().items() if not name.startswith("vi")}
    model.save_pretrained(tmp_path, state_dict=words)
    with pytest.raises(EsdLoraError, match=r"lacks \d+ weights, vision_model.*Expected a whole CLIPModel"):
        ClipScore(path=tmp_path)


def test_faces_are_found_and_told_apart(portraits: Path) -> None:
    """Another face is one of those in scikit-image, of 25 pixels, made as large as the astronaut's."""
    pixels = (data.lfw_subset()[0] * 255).astype(np.uint8)
    other = Image.fromarray(np.pad(np.array(Image.fromarray(pixels).resize((150, 150))), 60, mode="edge"))
    astronaut, cropped, stranger, coffee, cat = Faces(references=portraits)(
        [picture(image) for image in (ASTRONAUT, HEAD, other, COFFEE, CAT)]
    )
    for score in (astronaut, cropped):
        assert (score.values["face"], score.values["same"]) == (1, 1)
        assert score.values["distance"] < 0.4
        assert score.details["reference"] == "astronaut.png"
    assert (stranger.values["face"], stranger.values["same"]) == (1, 0)
    assert stranger.values["distance"] > 0.7
    assert coffee.values == cat.values == {"face": 0, "same": 0}
    left, top, width, height = astronaut.details["boxes"][0]
    assert left < 224 < left + width
    assert top < 125 < top + height


def test_faces_without_references_are_only_found() -> None:
    assert values(Faces(), picture(ASTRONAUT), picture(ROCKET)) == [{"face": 1}, {"face": 0}]


def test_the_nearest_reference_and_the_threshold_count(portraits: Path, tmp_path: Path) -> None:
    (near,) = values(Faces(references=portraits), picture(ASTRONAUT))
    strict = Faces(references=portraits, threshold=near["distance"] / 2)
    assert values(strict, picture(ASTRONAUT)) == [{**near, "same": False}]
    MIRRORED.save(tmp_path / "a.png")
    ASTRONAUT.save(tmp_path / "b.png")
    (score,) = Faces(references=tmp_path)([picture(ASTRONAUT)])
    assert score.values == {"face": 1, "same": 1, "distance": 0}
    assert score.details["reference"] == "b.png"


def test_references_show_one_face(tmp_path: Path) -> None:
    COFFEE.save(tmp_path / "coffee.png")
    with pytest.raises(EsdLoraError, match=r"0 faces were found in the reference .*coffee\.png"):
        Faces(references=tmp_path)
    (tmp_path / "coffee.png").unlink()
    both = Image.new("RGB", (400, 250))
    both.paste(ASTRONAUT.crop((120, 0, 320, 250)), (0, 0))
    both.paste(MIRRORED.crop((192, 0, 392, 250)), (200, 0))
    both.save(tmp_path / "both.png")
    with pytest.raises(EsdLoraError, match=r"2 faces were found in the reference .*both\.png"):
        Faces(references=tmp_path)


def test_ssim_of_photos() -> None:
    """Against scikit-image, which leaves the border out."""
    same, blurred, mirrored = values(Ssim(), *(picture(image, before=ASTRONAUT) for image in (ASTRONAUT, BLURRED, MIRRORED)))
    assert same["ssim"] == pytest.approx(1, abs=1e-6)
    for found, image in ((blurred, BLURRED), (mirrored, MIRRORED)):
        expected = structural_similarity(
            *(np.array(x) / 255 for x in (image, ASTRONAUT)),
            **{"data_range": 1, "channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False},
        )
        assert found["ssim"] == pytest.approx(expected, abs=0.01)


def test_lpips_as_torchmetrics_has_it(alexnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own LPIPS on the same weights, with torchvision's network put in its hands."""
    from torchmetrics.functional.image import lpips

    def features(*_: object) -> nn.Sequential:
        net = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU()),
            *(nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        state = torch.load(alexnet, weights_only=True)
        net.load_state_dict({name[9:]: x for name, x in state.items() if name.startswith("features")})
        return net

    monkeypatch.setattr(lpips, "_get_tv_model_features", features)
    theirs = lpips._NoTrainLpips(net="alex")
    images = (ASTRONAUT, BLURRED, MIRRORED)
    x = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    with torch.no_grad():
        expected = theirs(x, x[:1].expand_as(x)).flatten().tolist()
    found = [score["lpips"] for score in values(Lpips(path=alexnet), *(picture(y, before=ASTRONAUT) for y in images))]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert found[0] == 0 < found[1] < found[2]


def test_lpips_of_a_tiny_picture(alexnet: Path) -> None:
    tiny = Image.new("RGB", (40, 30))
    with pytest.raises(EsdLoraError, match=r"a picture of 40 x 30 pixels, expected 31 or more"):
        Lpips(path=alexnet)([picture(tiny, before=tiny)])
    small = Image.new("RGB", (31, 31))
    assert values(Lpips(path=alexnet), picture(small, before=small)) == [{"lpips": 0.0}]


@pytest.mark.parametrize("kind", ["ssim", "lpips"])
def test_the_likest_original_counts_at_its_size(kind: str, alexnet: Path, tmp_path: Path) -> None:
    small = {"astronaut": ASTRONAUT.resize((96, 96)), "cat": CAT.resize((120, 80)), "rocket": ROCKET.resize((96, 64))}
    for name, image in small.items():
        image.save(tmp_path / f"{name}.png")
    weights: dict[str, Any] = {"path": alexnet} if kind == "lpips" else {}
    (score,) = DETECTORS.get(kind)(originals=tmp_path, **weights)([picture(BLURRED.resize((128, 128)), before=COFFEE)])
    assert score.details == {"original": "astronaut.png"}
    alone = DETECTORS.get(kind)(**weights)
    resized = BLURRED.resize((128, 128)).resize((96, 96), Image.Resampling.LANCZOS)
    assert [score.values] == values(alone, picture(resized, before=small["astronaut"]))


@pytest.mark.parametrize("kind", ["ssim", "lpips"])
def test_nothing_to_compare_with_is_no_value(kind: str, alexnet: Path) -> None:
    weights = {"path": alexnet} if kind == "lpips" else {}
    assert DETECTORS.get(kind)(**weights)([picture(CAT)]) == [Score({})]


def test_efficientnet_features_tell_sets_apart() -> None:
    """Cuts of one photo are nearer to other cuts of it than to another photo's."""
    features = EfficientNetFeatures()
    sets = {
        name: features([image.crop((x, y, x + 200, y + 200)) for x in range(start, 100, 40) for y in (0, 50, 100)])
        for name, image, start in (("cat", CAT, 0), ("more cat", CAT, 20), ("coffee", COFFEE, 0))
    }
    assert sets["cat"].shape == (9, 1280)
    assert features.record()["metric"] == "Frechet distance on EfficientNet-Lite0 features"
    near, far = (frechet_distance(sets["cat"], sets[name]) for name in ("more cat", "coffee"))
    assert 0 < near < far / 2


# torch deprecates TorchScript, and NVIDIA's Inception is published as nothing else.
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning")
def test_inception_features_as_computed_plainly(tmp_path: Path) -> None:
    path, toy = tmp_path / "inception.pt", ToyInception()
    save_script(toy, path)
    features = InceptionFeatures(path=path)
    means = np.array([np.array(image).mean((0, 1)) for image in (CAT, COFFEE, ROCKET)])
    expected = means @ toy.linear.weight.detach().numpy().T + toy.linear.bias.detach().numpy()
    np.testing.assert_allclose(features([CAT, COFFEE, ROCKET]), expected, rtol=1e-4, atol=1e-3)
    record = features.record()
    assert record == {"metric": "FID", "package": "torch", "version": torch.__version__, "weights_sha256": hash_file(path)}
    torch.save(toy.state_dict(), path)
    with pytest.raises(EsdLoraError, match=r"inception\.pt is no TorchScript\. Expected NVIDIA's"):
        InceptionFeatures(path=path)
    with pytest.raises(EsdLoraError, match="there is no file"):
        InceptionFeatures(path=tmp_path / "nowhere.pt")


@pytest.fixture
def settings(portraits: Path, alexnet: Path, clip_dir: Path, resnet_dir: Path) -> dict[str, dict[str, Any]]:
    """What each detector needs to look."""
    return {
        **{"nudenet": {}, "open-nsfw": {}, "imagenet": {}, "ssim": {}},
        **{"classifier": {"path": resnet_dir}, "clip": {"path": clip_dir}, "lpips": {"path": alexnet}},
        "faces": {"references": portraits},
    }


YES_OR_NO = ("flagged", "accuracy", "top5", "face", "same")  # become rates; the other metrics are averaged
ALL = [name for name in DETECTORS.names() if name != "judge"]


@pytest.mark.parametrize("name", ALL)
def test_scores_do_not_depend_on_the_batch(name: str, settings: dict[str, dict[str, Any]]) -> None:
    """Of pictures of other sizes, a grey one and one with transparency, alone, together and in another order."""
    images = [HEAD, CAT.resize((150, 100)).convert("RGBA"), COFFEE.resize((96, 64)), ROCKET.resize((160, 107)).convert("L")]
    pictures = [picture(image, "3", MIRRORED.resize(image.size), prompt=f"a photo of {i}") for i, image in enumerate(images)]
    detector = DETECTORS.get(name)(**settings[name])
    together = detector(pictures)
    assert together == [score for item in pictures for score in detector([item])]
    assert together == detector(pictures[::-1])[::-1]
    assert together == DETECTORS.get(name)(**settings[name])(pictures)
    assert all(score.values for score in together)
    assert detector([]) == []
    for score in together:
        for metric, value in score.values.items():
            assert isinstance(value, bool) == metric.endswith(YES_OR_NO)


@pytest.mark.parametrize("name", ALL)
def test_a_record_says_what_looked(name: str, settings: dict[str, dict[str, Any]]) -> None:
    record = DETECTORS.get(name)(**settings[name]).record()
    assert json.loads(json.dumps(record)) == record
    assert record["package"]
    assert record["version"][0].isdigit()
    if name == "ssim":  # a formula
        return
    weights = record["weights_sha256"]
    hashes = weights.values() if isinstance(weights, dict) else [weights]
    assert hashes
    assert all(len(digits) == 64 for digits in hashes)


def test_records_hold_the_files_that_were_used(settings: dict[str, dict[str, Any]], portraits: Path) -> None:
    records = {name: DETECTORS.get(name)(**settings[name]).record() for name in ("faces", "lpips", "clip", "classifier")}
    assert records["faces"]["references_sha256"] == {"astronaut.png": hash_file(portraits / "astronaut.png")}
    assert records["faces"]["threshold"] == 0.6
    assert records["lpips"]["weights_sha256"]["alexnet"] == hash_file(settings["lpips"]["path"])
    for name in ("clip", "classifier"):
        folder = settings[name]["path"]
        assert records[name]["weights_sha256"]["model.safetensors"] == hash_file(folder / "model.safetensors")
    assert records["classifier"]["classes"] == len(NAMES)
