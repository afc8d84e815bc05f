"""What a classifier calls a picture: one of ImageNet's 1000 classes, or those of any model of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.evaluation.detectors import AND, Look, NotRun, Score, package
from esd_lora.evaluation.detectors.efficientnet import EfficientNetLite0
from esd_lora.files import hash_folder

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
    """The index of the class that a label means, by name or by number.

    Args:
        label: A name or one of its synonyms, whatever its case and with spaces or underscores; or an index.
        names: Index to name, or to several with commas between.
        classes: How many there are.

    Raises:
        EsdLoraError: If there is no such class, or more than one of that name.
    """
    known: dict[str, set[int]] = {}
    for index, name in names.items():
        for synonym in (name, *name.split(",")):
            known.setdefault(_plain(synonym), set()).add(index)
    found = known.get(_plain(label), set())
    if len(found) > 1:
        indices = " and ".join(map(str, sorted(found)))
        raise EsdLoraError(f"label {label!r} is the name of the classes {indices}. Give the index of the one that is meant.")
    if found:
        return found.pop()
    if label.strip().isdecimal() and int(label) < classes:
        return int(label)
    raise EsdLoraError(
        f"no class is called {label!r}{did_you_mean(_plain(label), known)}."
        f" Expected a name that the classifier knows, or an index from 0 to {classes - 1}."
    )


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


class ImageNet:
    """Says whether EfficientNet-Lite0 sees the label's class, first of 1000 or among the first five.

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

    def __call__(self, looks: Sequence[Look]) -> list[Score]:
        """Raises EsdLoraError if a label is not the name or index of a class."""
        wanted = _wanted(looks, IMAGENETTE, 1000)
        # One by one: a batch of another size may round otherwise, and a score must not depend on its neighbours.
        seen = (self._net.logits(self._net.prepare(look.image))[0] for look in looks)
        return [_score(logits, index, IMAGENETTE) for logits, index in zip(seen, wanted, strict=True)]


class Classifier:
    """Says whether an image classifier of transformers sees the label's class, first of all or among the first five.

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
        self._package = package("transformers", "classify")
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        if not self._path.is_dir():
            raise EsdLoraError(f"there is no folder {self._path}. Expected one with an image classifier of transformers.")
        try:
            # Pillow's resizing everywhere: transformers takes torchvision's where there is one, and the numbers would differ.
            self._processor = AutoImageProcessor.from_pretrained(self._path, local_files_only=True, backend="pil")
            model, loaded = AutoModelForImageClassification.from_pretrained(
                self._path, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise EsdLoraError(
                f"no image classifier can be loaded from {self._path} ({str(error).partition(chr(10))[0]})."
                " Expected a folder with config.json, preprocessor_config.json and model.safetensors."
            ) from error
        if missing := sorted(loaded["missing_keys"]):
            raise EsdLoraError(
                f"the classifier in {self._path} lacks {len(missing)} weights, {missing[0]} first, and would guess."
                " Expected a model trained to classify images."
            )
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._names: dict[int, str] = self._model.config.id2label

    def record(self) -> dict[str, Any]:
        model = self._model.config.model_type
        return {**self._package, "model": model, "weights_sha256": hash_folder(self._path), "classes": len(self._names)}

    def __call__(self, looks: Sequence[Look]) -> list[Score]:
        """Raises EsdLoraError if a label is not the name or index of a class."""
        wanted = _wanted(looks, self._names, len(self._names))
        seen = (self._logits(look.image) for look in looks)
        return [_score(logits, index, self._names) for logits, index in zip(seen, wanted, strict=True)]

    def _logits(self, image: Image.Image) -> Tensor:
        inputs = self._processor(image.convert("RGB"), return_tensors="pt").to(self._device)
        return self._model(**inputs).logits[0]


class Wanted(NamedTuple):
    """The class that a picture should show."""

    index: int
    metric: str
    """`accuracy`, or `rest` where it is what a target should show besides what was erased."""


def _wanted(looks: Sequence[Look], names: Mapping[int, str], classes: int) -> list[Wanted | None]:
    """What each label means, all read before a picture is looked at.

    Of a label in parts ("Dogs + Van Gogh") and the rest of a target, the part counts that the classifier has a name for.
    """
    known = {_plain(synonym) for name in names.values() for synonym in (name, *name.split(","))}
    wanted: list[Wanted | None] = []
    for look in looks:
        said = {"accuracy": look.label, "rest": look.rest}
        parts = [(part, metric) for metric, label in said.items() if label for part in label.split(AND)]
        own = next(((part, metric) for part, metric in parts if _plain(part) in known), parts[0] if parts else None)
        wanted.append(None if own is None else Wanted(class_index(own[0], names, classes), own[1]))
    return wanted


def _score(logits: Tensor, wanted: Wanted | None, names: Mapping[int, str]) -> Score:
    probabilities, indices = (part.tolist() for part in logits.softmax(0).topk(min(5, len(logits))))
    seen = [
        {"index": index, "name": names.get(index), "probability": round(probability, 4)}
        for index, probability in zip(indices, probabilities, strict=True)
    ]
    details = {"seen": names.get(indices[0], f"class {indices[0]}"), "top5": seen}
    if wanted is None:
        return Score({}, details)
    values = {wanted.metric: indices[0] == wanted.index}
    return Score(values | ({"top5": wanted.index in indices} if wanted.metric == "accuracy" else {}), details)
