"""Attaching: measured numbers go into an eraser's own header and card, so that they travel with it."""

from __future__ import annotations

import datetime
from pathlib import Path

from esd_lora.erasers.eraser import SAMPLES, WEIGHTS_NAME, Eraser
from esd_lora.erasers.measured import Measured
from esd_lora.erasers.stacking import Strength
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import read_cases
from esd_lora.evaluation.picture_files import open_painted, painted_file
from esd_lora.evaluation.report.report import Report
from esd_lora.formats.cards import save_with_card
from esd_lora.pictures import read_samples, sample_files


def attach(eraser: str | Path, report: Report | str | Path, pictures: Path | None = None) -> Path:
    """Write an evaluation into an eraser's directory, header and model card, and return it; the tensors stay as they are.

    Args:
        eraser: Directory of the eraser that was measured.
        report: From `evaluate`, or the directory of an evaluation.
        pictures: The evaluation's directory, from which pictures for the card are taken if training left none.

    Raises:
        EsdLoraError: If there is no such directory, or something else was measured.
    """
    directory = require_attachable(eraser)
    report = report if isinstance(report, Report) else Report.load(report)
    loaded = Eraser.load(directory)
    try:
        (member,) = report.record["variants"]["erased"]["erasers"]
        measured_hash, strength = member["sha256"], Strength(member["weight"], member["blocks"])
    except (LookupError, TypeError, ValueError):  # none, several, or a record that somebody changed
        measured_hash, strength = None, None
    if measured_hash != hash_tensors(loaded.state_dict()):
        raise EsdLoraError(f"these numbers are not of {eraser} as it is now. Evaluate it again.")
    require_attachable(eraser, strength)
    samples = {} if pictures is None or read_samples(directory / "samples") else _take_samples(pictures)
    numbers = {name: getattr(report, name) for name in ("suite", "concepts", "variants", "worst", "not_run", "record")}
    measured = Measured(date=datetime.datetime.now(datetime.UTC).date().isoformat(), **numbers)
    earlier = loaded.header.evaluation
    if (
        not samples
        and earlier is not None
        and measured.model_dump_json(exclude={"date"}) == earlier.model_dump_json(exclude={"date"})
    ):
        return directory  # nothing new was measured, so the file stays the same to the byte
    return save_with_card(Eraser(loaded.pairs, loaded.header.model_copy(update={"evaluation": measured})), directory, samples)


def require_attachable(eraser: str | Path, strength: Strength | None = None) -> Path:
    """Return the directory that numbers of an eraser at some strength can be written into.

    Raises:
        EsdLoraError: If it is none, or the eraser has another strength.
    """
    directory = Path(eraser)
    if not (directory / WEIGHTS_NAME).is_file():
        raise EsdLoraError(
            f"{eraser} is no directory of an eraser, so there is no card to write numbers into. Give one, or pull it first."
        )
    if strength not in (None, Strength()):
        raise EsdLoraError(
            f"numbers of {eraser} at another strength than it has do not go with it. Evaluate it at 1, or stack it first."
        )
    return directory


def _take_samples(evaluation: Path) -> dict[str, bytes]:
    """Return pictures of what was erased and of the rest, spread over all that there are, base and erased, by file name."""
    cases = read_cases(evaluation / "cases.jsonl")
    targets = [case for case in cases if case.role == "target"]
    rest = [case for case in cases if case.role in ("neighbour", "general")]
    half = SAMPLES // 2
    chosen = [part[i * len(part) // half] for part in (targets, rest) if part for i in range(min(half, len(part)))]
    before, erased = ([open_painted(painted_file(evaluation, name, case.id)) for case in chosen] for name in ("base", "erased"))
    return sample_files([case.prompt for case in chosen], before, erased)
