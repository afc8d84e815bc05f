"""The interface of detectors: they score pictures, metric by metric, and record all that their numbers depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL.Image import Image

from esd_lora.errors import how_to_install


class Picture(NamedTuple):
    """A picture to score."""

    image: Image
    prompt: str
    label: str | None
    """What the prompt asks for, in the detector's own words: a class, an artist."""
    rest: str | None = None
    """What it should show besides, where `label` is what was erased."""
    before: Image | None = None
    """What the base paints for the same prompt and seed; `None` where that is not known, or this is it."""


class Score(NamedTuple):
    """Values of a detector's metrics on one picture."""

    values: Mapping[str, bool | float]
    """Metric to value: yes or no where the share of pictures is what counts, or a number."""
    details: Mapping[str, Any] = {}
    """What the values were made of, as JSON: boxes, confidences; under `seen` in a few words what stands there."""


@runtime_checkable
class Detector(Protocol):
    """Scores pictures; the keywords of its constructor are its settings in a suite."""

    def record(self) -> dict[str, Any]:
        """Return all that its numbers depend on, as JSON: package, version, SHA-256 of the weights, threshold, classes."""
        ...

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """Return one score for each picture, the same whatever else is in the batch."""
        ...


@runtime_checkable
class Features(Protocol):
    """Maps pictures to points, whose clouds are compared."""

    def record(self) -> dict[str, Any]:
        """Return all that its points depend on, as JSON."""
        ...

    def __call__(self, images: Sequence[Image]) -> np.ndarray:
        """Return the features [N, d] of N pictures."""
        ...


class NotRun(Exception):  # noqa: N818
    """Why something cannot be measured: a package is not installed, or no weights are given. Reported, never an error."""


def package_record(name: str, extra: str) -> dict[str, str]:
    """Return name and version of a package that a detector needs, for its record.

    Args:
        name: Its name on PyPI.
        extra: The extra of this project that brings it.

    Raises:
        NotRun: If it is not installed.
    """
    try:
        return {"package": name, "version": version(name)}
    except PackageNotFoundError:
        raise NotRun(f"the package {name} is not installed; {how_to_install(extra)}") from None
