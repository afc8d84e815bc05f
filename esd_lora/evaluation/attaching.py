"""Measured numbers in an eraser's own header and card, so that they travel with it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esd_lora.erasers.eraser import SAMPLES, WEIGHTS_NAME, Eraser
from esd_lora.erasers.measured import Measured
from esd_lora.erasers.stacking import Strength
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.scoring import open_painted, picture
from esd_lora.formats.cards import save_with_card
from esd_lora.pictures import read_samples, save_samples


def attach(eraser: str | Path, summary: Mapping[str, Any], pictures: Path | None = None) -> Path:
    """Writes an evaluation into an eraser's directory: header and model card. Its tensors stay as they are.

    Args:
        eraser: Directory of the eraser that was measured.
        summary: What `evaluating.evaluate` gave back.
        pictures: The evaluation's directory, from which pictures for the card are taken if training left none.

    Raises:
        EsdLoraError: If there is no such directory, or something else was measured.
    """
    directory = attachable(eraser)
    loaded = Eraser.load(directory)
    measured = summary["record"].get("variants", {}).get("erased", {}).get("erasers", [])
    if [member["sha256"] for member in measured] != [hash_tensors(loaded.state_dict())]:
        raise EsdLoraError(f"these numbers are not of {eraser} as it is now. Evaluate it again.")
    attachable(eraser, Strength(measured[0]["weight"], measured[0]["blocks"]))
    told = {key: summary[key] for key in ("suite", "concepts", "variants", "not_run", "record")}
    if pictures is not None and not read_samples(directory / "samples"):
        _take_samples(pictures, directory / "samples")
    found, earlier = Measured(date=datetime.datetime.now(datetime.UTC).date().isoformat(), **told), loaded.header.evaluation
    if earlier is not None and found.model_dump_json(exclude={"date"}) == earlier.model_dump_json(exclude={"date"}):
        return directory  # nothing new was measured, so the file stays the same to the byte
    return save_with_card(Eraser(loaded.pairs, loaded.header.model_copy(update={"evaluation": found})), directory)


def _take_samples(evaluation: Path, folder: Path) -> None:
    """Pictures of what was erased and of the rest, spread over all that there are, base and erased."""
    asked = [json.loads(line) for line in (evaluation / "cases.jsonl").read_text("utf-8").splitlines()]
    targets = [one for one in asked if one["role"] == "target"]
    rest = [one for one in asked if one["role"] in ("neighbour", "general")]
    half = SAMPLES // 2
    chosen = [some[i * len(some) // half] for some in (targets, rest) if some for i in range(min(half, len(some)))]
    files = {name: [picture(evaluation, name, one["case"]) for one in chosen] for name in ("base", "erased")}
    before, erased = ([open_painted(file) for file in files[name]] for name in ("base", "erased"))
    save_samples(folder, [one["prompt"] for one in chosen], before, erased)


def attachable(eraser: str | Path, strength: Strength | None = None) -> Path:
    """The directory that numbers of an eraser at some strength can be written into.

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
