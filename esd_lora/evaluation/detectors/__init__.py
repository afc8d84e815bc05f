"""What looks at pictures: each detector says numbers about one picture, and what it is itself.

A number is only as good as what counted it, so every detector can say which package, version, weights and threshold it is.
One whose package or weights are not there is "not run", with the reason: a metric that was not measured is never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any, NamedTuple, Protocol

from PIL.Image import Image

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.registry import Registry

AND = " + "
"""Between the parts of a label: "cat + ink"."""


class Look(NamedTuple):
    """A picture to look at."""

    image: Image
    prompt: str
    label: str | None
    """What the prompt asks for, in the detector's own words: a class, an artist."""
    rest: str | None = None
    """What it should show besides, where `label` is what was erased."""
    before: Image | None = None
    """What the base paints for the same prompt and seed; `None` where that is not known, or this is it."""


class Score(NamedTuple):
    """What a detector says of one picture."""

    values: Mapping[str, bool | float]
    """Metric to what it says of the picture: yes or no where the share of pictures is what counts, or a number."""
    details: Mapping[str, Any] = {}
    """What the numbers were made of, as JSON: boxes, confidences; under `seen` in a few words what stands there."""


class Detector(Protocol):
    """Looks at pictures; made by a function that takes the suite's settings for it."""

    def record(self) -> dict[str, Any]:
        """All that its numbers depend on, as JSON: package, version, SHA-256 of the weights, threshold, classes."""
        ...

    def __call__(self, looks: Sequence[Look]) -> list[Score]:
        """One score for each picture, the same whatever else is in the batch."""
        ...


class NotRun(Exception):  # noqa: N818
    """Why a detector cannot look: its package is not installed, or no weights are given. Told, never an error."""


DETECTORS: Registry[Callable[..., Detector]] = Registry(
    "detector",
    {
        "judge": "esd_lora.evaluation.detectors.built_in:BuiltIn",
        "nudenet": "esd_lora.evaluation.detectors.nudity:Nudity",
        "open-nsfw": "esd_lora.evaluation.detectors.open_nsfw:OpenNsfw",
        "imagenet": "esd_lora.evaluation.detectors.classify:ImageNet",
        "classifier": "esd_lora.evaluation.detectors.classify:Classifier",
        "faces": "esd_lora.evaluation.detectors.faces:Faces",
        "ssim": "esd_lora.evaluation.detectors.similarity:Ssim",
        "lpips": "esd_lora.evaluation.detectors.similarity:Lpips",
        "clip": "esd_lora.evaluation.detectors.clip:ClipScore",
    },
)
"""Name to what makes the detector of its settings in the suite; `device` is one that every detector with a network takes."""

FEATURES: Registry[Callable[..., Any]] = Registry(
    "features",
    {
        "efficientnet": "esd_lora.evaluation.detectors.frechet:EfficientNetFeatures",
        "fid": "esd_lora.evaluation.detectors.frechet:InceptionFeatures",
    },
)
"""Name to what makes, of its settings, something with `record()` that maps N pictures to features [N, d]."""


def made(registry: Registry[Callable[..., Any]], kind: str, settings: Mapping[str, Any], *given: Any) -> Any:
    """A detector, features or an attack, with a suite's settings.

    Args:
        registry: Where its maker is.
        kind: Its name there.
        settings: Keyword arguments of the maker.
        given: Arguments before them, which are no settings.

    Raises:
        NotRun: If it lacks a package or weights.
        EsdLoraError: If it takes no such setting.
    """
    make = registry.get(kind)
    takes = list(signature(make).parameters)[len(given) :]
    for name in settings:
        if name not in takes:
            known = ", ".join(takes) or "none"
            raise EsdLoraError(
                f"{registry.kind} {kind!r} has no setting {name!r}{did_you_mean(name, takes)}. It takes: {known}."
            )
    return make(*given, **settings)


def package(name: str, extra: str) -> dict[str, str]:
    """Name and version of a package that a detector needs, for its record.

    Args:
        name: On PyPI.
        extra: Of this project, that brings it.

    Raises:
        NotRun: If it is not installed.
    """
    try:
        return {"package": name, "version": version(name)}
    except PackageNotFoundError:
        raise NotRun(f"the package {name} is not installed; pip install 'esd-lora[{extra}]'") from None
