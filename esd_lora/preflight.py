"""What a command can refuse before anything heavy is loaded: outputs, inputs that are not there, strengths that make no sense.

Whoever does the work checks it again; a person hears of it here within a second, and not after a minute of loading.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from esd_lora.built_in import require_base
from esd_lora.errors import EsdLoraError
from esd_lora.files import check_directory, check_file, refuse_inputs, reporting_write_errors
from esd_lora.wording import HubId

_USUAL, _MOST = (-2.0, 3.0), 10.0
"""Strengths that are usual, beyond which a warning is given, and the largest of either sign."""


class GivenEraser(NamedTuple):
    """An eraser as it is named on a command line."""

    path: str
    weight: float = 1.0
    blocks: Mapping[str, float] = {}
    """Factors by part of the model."""


def check(
    output: Path,
    force: bool,
    base: str | None = None,
    erasers: Sequence[tuple[str, float, Mapping[str, float]]] = (),
    *,
    file: bool = False,
    read: Iterable[str | None] = (),
) -> None:
    """Refuse what `check_inputs` and `check_output` refuse.

    Args:
        output: Directory or file to make.
        force: Whether it may exist.
        base: As for `load_base`.
        erasers: Path or Hub id of each, weight, and factors by part of the model.
        file: Whether the output is a file.
        read: What else is read, as far as it is given and a path.

    Raises:
        EsdLoraError: With the first of them.
    """
    check_inputs(base, erasers)
    check_output(output, force, [*(path for path, *_ in erasers), *filter(None, read)], file=file)


def check_output(output: Path, force: bool, inputs: Iterable[str | Path] = (), *, file: bool = False) -> None:
    """Refuse an output that exists, holds what is read, or cannot be written.

    Args:
        output: Directory or file to make.
        force: Whether it may exist.
        inputs: What is read, as far as it is a path.
        file: Whether it is a file.

    Raises:
        EsdLoraError: With what is in the way.
    """
    (check_file if file else check_directory)(output, force)
    refuse_inputs(output, inputs)
    with reporting_write_errors(output):
        place = next(folder for folder in output.absolute().parents if folder.is_dir())
        with tempfile.TemporaryFile(dir=place):
            pass


def check_inputs(base: str | None = None, erasers: Iterable[tuple[str, float, Mapping[str, float]]] = ()) -> None:
    """Refuse a base or erasers that are not there, and strengths that make no sense; warn of an eraser that is given twice.

    Args:
        base: As for `load_base`.
        erasers: Path or Hub id of each, weight, and factors by part of the model.

    Raises:
        EsdLoraError: With the first of them.
    """
    given = [GivenEraser(*eraser) for eraser in erasers]
    for eraser in given:
        _check_eraser(eraser)
    _warn_of_repeated(given)
    if base is not None:
        require_base(base)


def _check_eraser(eraser: GivenEraser) -> None:
    if not os.path.lexists(eraser.path) and HubId.read(eraser.path) is None:
        raise EsdLoraError(
            f"no eraser at {eraser.path}: expected the directory of one, a .safetensors file, a stack's .yaml, or a Hub id"
            " 'owner/name'."
        )
    check_strengths([eraser.weight, *(eraser.weight * factor for factor in eraser.blocks.values())], eraser.path)


def check_strengths(strengths: Iterable[float], name: str) -> None:
    """Refuse strengths at which nothing but noise is painted, and warn of unusual ones.

    Args:
        strengths: To look at.
        name: What has them, for messages.

    Raises:
        EsdLoraError: With the first that is beyond all use.
    """
    least, most = _USUAL
    for strength in strengths:
        if abs(strength) > _MOST:
            raise EsdLoraError(
                f"strength {strength:g} of {name} is beyond all use: pictures fall apart long before. Give one from {least:g}"
                f" to {most:g}; 1 is as trained."
            )
        if not least <= strength <= most:
            warnings.warn(
                f"strength {strength:g} of {name} is unusual: 1 is as trained, and pictures fall apart beyond {most:g}.",
                stacklevel=3,
            )


def _warn_of_repeated(erasers: list[GivenEraser]) -> None:
    first: dict[str, GivenEraser] = {}
    for eraser in erasers:
        place = os.path.realpath(eraser.path)
        if (other := first.setdefault(place, eraser)) is not eraser:
            total = other.weight + eraser.weight
            warnings.warn(
                f"{eraser.path} is given twice, so that its strengths add up to {total:g}: give it once, as"
                f" {eraser.path}:{total:g}.",
                stacklevel=3,
            )
