"""Comparing two evaluations picture by picture: the same prompt and seed with one eraser and with another.

What is read may be a stranger's: names of files are made from the names of cases, never taken from a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from esd_lora.errors import EsdLoraError, shortened
from esd_lora.evaluation.cases import ROLES, Role
from esd_lora.evaluation.picture_files import open_painted, painted_file
from esd_lora.evaluation.report.report import Report
from esd_lora.files import read_bounded
from esd_lora.json_files import parse_json

REPORT_NAME, PAGE_NAME, PICTURES_NAME = "summary.json", "report.html", "images.jsonl"
"""Files of an evaluation that has ended: its numbers, its page, and a line for each picture."""
_MOST_EVALUATIONS = 500  # in one folder, that anyone chooses among
_LARGEST = 2**28  # bytes of the list of pictures; 100,000 of three variants come to half
_SKIPPED = {"images", "scores", "features", "samples", "venv", "node_modules", "__pycache__"}

_Moment: TypeAlias = tuple[str, int, float | None]
"""Prompt, seed and guidance: what decides a picture, beside the model and its sampler."""


class Painted(NamedTuple):
    """A picture of an evaluation, and how it was scored."""

    file: Path
    role: Role
    values: dict[str, bool | float]
    """Metric to value, of all detectors."""
    seen: str
    """What detectors say stands there, in a few words; empty where none says it."""

    def verdict(self) -> tuple[str, dict[str, bool]]:
        """Return what was seen, and the values that are yes or no."""
        return self.seen, {name: value for name, value in self.values.items() if isinstance(value, bool)}


class Pair(NamedTuple):
    """The same prompt and seed in two evaluations."""

    prompt: str
    seed: int
    base: Painted | None
    """Without erasers; `None` where neither evaluation has it."""
    first: Painted
    second: Painted

    @property
    def judged_differently(self) -> bool:
        """Whether detectors see something else; where what is expected differs, yes and no are not comparable."""
        (seen, values), (other, others) = self.first.verdict(), self.second.verdict()
        return seen != other or (self.first.role == self.second.role and values != others)

    def distance(self) -> float:
        """Return how far the two pictures are apart: mean over pixels, 0 the same, 1 black and white.

        Raises:
            EsdLoraError: If one cannot be read.
        """
        if self.first.file.read_bytes() == self.second.file.read_bytes():
            return 0.0
        one, other = open_painted(self.first.file), open_painted(self.second.file)
        if one.size != other.size:
            other = other.resize(one.size)
        return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean()) / 255


def find_evaluations(folder: str | Path) -> list[Path]:
    """Return the evaluations at or below a folder that have ended, the latest first, at most 500.

    Raises:
        EsdLoraError: If there is no such folder.
    """
    if not Path(folder).is_dir():
        raise EsdLoraError(f"there is no folder {folder} to look for evaluations in.")
    folders = sorted(_evaluations(Path(folder)), key=lambda place: (place / REPORT_NAME).stat().st_mtime, reverse=True)
    return folders[:_MOST_EVALUATIONS]


def _evaluations(folder: Path) -> Iterator[Path]:
    for directory, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if name not in _SKIPPED and not name.startswith("."))
        if {REPORT_NAME, PAGE_NAME, PICTURES_NAME} <= {*names}:
            below.clear()
            yield Path(directory)


def read_pictures(folder: str | Path, variant: str) -> dict[_Moment, Painted]:
    """Return the pictures of one variant of an evaluation by prompt, seed and guidance, as far as they lie in its folder.

    Args:
        folder: Directory of an evaluation.
        variant: `base`, `erased` and so on.

    Raises:
        EsdLoraError: If the list of its pictures cannot be read or is damaged.
    """
    file, folder = Path(folder) / PICTURES_NAME, Path(folder)
    pictures: dict[_Moment, Painted] = {}
    number = 0
    try:
        for line in read_bounded(file, _LARGEST).decode("utf-8").split("\n")[:-1]:
            number += 1
            values = parse_json(line)
            if values["variant"] != variant:
                continue
            place = painted_file(folder, _plain(values["variant"]), _plain(values["case"]))
            moment, picture = _picture(values, place)
            if place.is_file():
                pictures.setdefault(moment, picture)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        where = f"{file}, line {number}" if number else str(file)
        reason = shortened(f"{type(error).__name__}: {error}")
        raise EsdLoraError(f"{where}: cannot be read ({reason}). Expected what an evaluation wrote.") from error
    return pictures


def _picture(values: Mapping[str, Any], file: Path) -> tuple[_Moment, Painted]:
    """Return what a line of `images.jsonl` says.

    Raises:
        ValueError: If something in it is of another kind.
    """
    scores: dict[str, bool | float] = {}
    seen: list[str] = []
    for score in values["scores"].values():
        scores |= {str(name): value for name, value in score["values"].items() if isinstance(value, int | float)}
        seen += [str(score["details"]["seen"])] if "seen" in score["details"] else []
    prompt, seed, guidance, role = (values[name] for name in ("prompt", "seed", "guidance", "role"))
    if not (isinstance(prompt, str) and isinstance(seed, int) and isinstance(guidance, int | float | None)):
        raise ValueError("prompt, seed or guidance is none")
    if role not in ROLES:
        raise ValueError(f"there is no role {shortened(repr(role))}")
    return (prompt, seed, guidance), Painted(file, cast("Role", role), scores, ", ".join(seen))


def _plain(name: Any) -> str:
    """Return the name of a file or folder, once it is seen to lead nowhere else."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or len(name) > 200:
        raise ValueError(f"{shortened(repr(name))} is no name of a picture")
    return name


def pair_pictures(first: str | Path, second: str | Path, variant: str = "erased") -> list[Pair]:
    """Return the pictures that two evaluations have of the same prompts and seeds, in the order of the first.

    Args:
        first: Directory of an evaluation.
        second: Directory of another, of whatever suite.
        variant: What painted both: `erased`.

    Raises:
        EsdLoraError: If one cannot be read, or no prompt and seed is in both.
    """
    ours, theirs = read_pictures(first, variant), read_pictures(second, variant)
    before = read_pictures(second, "base") | read_pictures(first, "base")
    both = [moment for moment in ours if moment in theirs]
    if not both:
        raise EsdLoraError(
            f"{first} and {second} have no picture of the same prompt and seed: {len(ours)} and {len(theirs)} pictures of"
            f" {variant!r}. Measure both erasers by the same suite."
        )
    return [Pair(*moment[:2], before.get(moment), ours[moment], theirs[moment]) for moment in both]


def painted_otherwise(first: Report, second: Report) -> list[str]:
    """Return what differs between two evaluations beside the erasers, in words; nothing where they agree."""
    words = {"base": "the base", "sampler": "the sampler", "latents": "the size of pictures"}
    return [word for name, word in words.items() if first.record.get(name) != second.record.get(name)]
