"""Pictures and their scores on disk: painted once, looked at once, whatever interrupts.

DIR/images/VARIANT/CASE.png
DIR/scores/DETECTOR.jsonl    its record, then a line for each picture
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from esd_lora.bases.loading import quiet_libraries
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors import DETECTORS, Look, NotRun, Score, made
from esd_lora.evaluation.picture_files import open_picture
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.suite_files import Suite
from esd_lora.evaluation.variants import Variant
from esd_lora.files import reporting_write_errors, write_atomically

_AT_ONCE = 32  # pictures between two looks at the disk

Scores = dict[tuple[str, str], dict[str, Score]]
"""(variant, case) to detector to score."""


def picture(folder: Path, variant: str, case: str) -> Path:
    """Where a picture lies."""
    return folder / "images" / variant / f"{case}.png"


def paint_missing(folder: Path, variants: Sequence[Variant], asked: Sequence[Asked], *, progress: bool = True) -> None:
    """Paints what is not there yet; each picture appears whole or not at all."""
    wanted = [(variant, [one for one in asked if one.role in variant.roles]) for variant in variants]
    missing = [(v, [one for one in some if not picture(folder, v.name, one.case).exists()]) for v, some in wanted]
    total = sum(len(some) for _, some in missing)
    with tqdm(total=total, desc="painting", unit="picture", disable=not progress or not total) as bar:
        for variant, some in missing:
            if not some:
                continue
            bar.set_postfix_str(variant.name)
            with reporting_write_errors(folder):
                picture(folder, variant.name, "").parent.mkdir(parents=True, exist_ok=True)
            with variant.on() as paint, quiet_libraries():  # they tell of every prompt that is cut off
                for few in (some[i : i + _AT_ONCE] for i in range(0, len(some), _AT_ONCE)):
                    for one, image in zip(few, paint(few), strict=True):
                        content = io.BytesIO()
                        image.save(content, "PNG")
                        write_atomically(picture(folder, variant.name, one.case), content.getvalue())
                    bar.update(len(few))


def score_missing(
    folder: Path, suite: Suite, asked: Sequence[Asked], pictures: Mapping[str, Mapping[str, Path]], *, progress: bool = True
) -> tuple[Scores, dict[str, Any], dict[str, str]]:
    """Has every detector look at what it has not seen yet.

    Args:
        folder: For the scores.
        suite: Says who looks.
        asked: What the pictures should show.
        pictures: Variant to case to file.
        progress: Whether to show progress bars.

    Returns:
        Scores; detector to its record; and detector to why it did not run.

    Raises:
        EsdLoraError: If a picture is missing or damaged, or a detector cannot be what the suite says.
    """
    scores: Scores = {(variant, one.case): {} for variant in pictures for one in asked}
    records: dict[str, Any] = {}
    not_run: dict[str, str] = {}
    for name, spec in suite.detectors.items():
        chosen = [(v, one) for v, files in pictures.items() for one in asked if one.role in spec.roles and one.case in files]
        try:
            detector = made(DETECTORS, spec.kind or name, spec.model_extra or {})
        except NotRun as reason:
            not_run[name] = str(reason)
            continue
        records[name] = detector.record()
        file = folder / "scores" / f"{name}.jsonl"
        with reporting_write_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        known = _resume(file, records[name])
        todo = [(variant, one) for variant, one in chosen if (variant, one.case) not in known]
        with (
            reporting_write_errors(file),
            file.open("a", encoding="utf-8") as lines,
            tqdm(total=len(todo), desc=f"scoring ({name})", unit="picture", disable=not progress or not todo) as bar,
        ):
            for few in (todo[i : i + _AT_ONCE] for i in range(0, len(todo), _AT_ONCE)):
                looks = [_look(pictures, variant, one) for variant, one in few]
                for (variant, one), score in zip(few, detector(looks), strict=True):
                    known[variant, one.case] = score
                    lines.write(_line({"variant": variant, "case": one.case, **_plain(score)}))
                lines.flush()
                bar.update(len(few))
        # In the order of the plan, so that an evaluation that was interrupted leaves the same file as one that was not.
        ordered = [{"variant": v, "case": one.case, **_plain(known[v, one.case])} for v, one in chosen]
        write_atomically(file, "".join(map(_line, [{"record": records[name]}, *ordered])).encode())
        prefix = "" if spec.kind is None else f"{name}."
        for variant, one in chosen:
            found = known[variant, one.case]
            scores[variant, one.case][name] = Score({prefix + key: value for key, value in found.values.items()}, found.details)
    return scores, records, not_run


def open_painted(file: Path) -> Image.Image:
    """A picture of the evaluation.

    Raises:
        EsdLoraError: If it is missing or damaged.
    """
    if not file.exists():
        raise EsdLoraError(f"there is no picture {file}. Paint it, and run again.")
    try:
        return open_picture(file)
    except EsdLoraError as error:
        raise EsdLoraError(f"picture {file} is damaged. Delete it and run again; only it will be made anew.") from error


def _look(pictures: Mapping[str, Mapping[str, Path]], variant: str, one: Asked) -> Look:
    before = open_painted(pictures["base"][one.case]) if variant != "base" and "base" in pictures else None
    return Look(open_painted(pictures[variant][one.case]), one.prompt, one.label, one.rest, before)


def _resume(file: Path, record: Mapping[str, Any]) -> dict[tuple[str, str], Score]:
    """Begins a detector's file, or goes on with that of an earlier run if the detector was the same then."""
    known: dict[tuple[str, str], Score] = {}
    if file.exists():
        # The last line may have been cut off.
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
        if lines and lines[0] == json.loads(_line({"record": record})):
            known = {(line["variant"], line["case"]): Score(line["values"], line["details"]) for line in lines[1:]}
    kept = [{"variant": variant, "case": case, **_plain(score)} for (variant, case), score in known.items()]
    write_atomically(file, "".join(map(_line, [{"record": record}, *kept])).encode())
    return known


def _plain(score: Score) -> dict[str, Any]:
    return {"values": dict(score.values), "details": dict(score.details)}


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
