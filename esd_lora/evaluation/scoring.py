"""Painting and scoring: pictures and their scores on disk, each made once, whatever interrupts.

DIR/images/VARIANT/CASE.png
DIR/scores/DETECTOR.jsonl    its record, then a line for each picture
DIR/features/HASH.npy        features of a set of pictures, for distances
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from esd_lora.bars import Bar
from esd_lora.bases.notices import quiet_libraries
from esd_lora.erasers.privacy import scrub
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.detectors.detector import Detector, Features, NotRun, Picture, Score
from esd_lora.evaluation.detectors.frechet import frechet_distance
from esd_lora.evaluation.picture_files import open_painted, painted_file
from esd_lora.evaluation.registries import DETECTORS, FEATURES, build
from esd_lora.evaluation.report.report import Distance
from esd_lora.evaluation.suites.suite_files import Suite
from esd_lora.evaluation.variants import Variant
from esd_lora.files import hash_file, reporting_write_errors, write_atomically
from esd_lora.pictures import even_batches, open_picture, picture_paths, png
from esd_lora.ranks import count, from_main, is_main, merge, share
from esd_lora.wording import printable

_BATCH = 32  # pictures between two writes to the disk

Pictures = Mapping[str, Mapping[str, Path]]
"""Variant to case to file."""
Scores = dict[tuple[str, str], dict[str, Score]]
"""(variant, case) to detector to score."""


def paint_missing(folder: Path, variants: Sequence[Variant], cases: Sequence[Case], *, progress: bool = True) -> None:
    """Paint what is not there yet; each picture appears whole or not at all. Ranks, if there are several, share the batches.

    A thread compresses and writes one batch while the next is painted. Whatever stops the painting, what is painted is written.
    """
    missing: list[list[Case]] = []
    for variant in variants:
        own = [case for case in cases if case.role in variant.roles]
        missing.append([case for case in own if not painted_file(folder, variant.name, case.id).exists()])
    missing = from_main(lambda: missing)
    total = sum(map(len, missing))
    with (
        Bar(total=total, desc="painting", unit="picture", disable=not progress or not total) as bar,
        ThreadPoolExecutor(1, thread_name_prefix="writing") as writer,
    ):
        writing: Future[None] | None = None
        for variant, todo in zip(variants, missing, strict=True):
            if not todo:
                continue
            bar.set_postfix_str(printable(variant.name))
            with variant.on() as paint, quiet_libraries():  # they warn of every prompt that is cut off
                batches = [[todo[i] for i in part] for part in even_batches(len(todo), _BATCH)]
                for first in range(0, len(batches), count()):
                    painted: dict[str, Image] = {}
                    for batch in share(batches[first : first + count()]):
                        painted |= {case.id: image for case, image in zip(batch, paint(batch), strict=True)}
                    painted = merge(painted)
                    if writing:
                        writing.result()  # so that no more than two batches are held, and a full disk stops the painting
                    if is_main():
                        writing = writer.submit(_write_painted, folder, variant.name, painted)
                    bar.update(len(painted))
        if writing:
            writing.result()


def _write_painted(folder: Path, variant: str, pictures: Mapping[str, Image]) -> None:
    """Write pictures of a variant, by case, into an evaluation's directory."""
    for case, picture in pictures.items():
        file = painted_file(folder, variant, case)
        with reporting_write_errors(folder):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, png(picture))


def score_missing(
    folder: Path,
    suite: Suite,
    cases: Sequence[Case],
    pictures: Pictures,
    *,
    allow_code: Collection[str] = (),
    progress: bool = True,
) -> tuple[Scores, dict[str, Any], dict[str, str]]:
    """Have every detector of a suite score what it has not scored yet.

    Args:
        folder: For the scores.
        suite: Its detectors.
        cases: What the pictures should show.
        pictures: Files to score.
        allow_code: Every `module:attribute` that may be imported for a detector.
        progress: Whether to show progress bars.

    Returns:
        Scores; detector to its record; and detector to why it did not run.

    Raises:
        EsdLoraError: If a picture is missing or damaged, or a detector cannot be what the suite says.
    """
    scores: Scores = {(variant, case.id): {} for variant in pictures for case in cases}
    records: dict[str, Any] = {}
    not_run: dict[str, str] = {}
    for name, spec in suite.detectors.items():
        chosen = [(v, case) for v, files in pictures.items() for case in cases if case.role in spec.roles and case.id in files]
        try:
            detector = build(DETECTORS, spec.kind or name, spec.model_extra or {}, expected=Detector, allow_code=allow_code)
        except NotRun as reason:
            not_run[name] = str(reason)
            continue
        records[name] = scrub(detector.record())
        file = folder / "scores" / f"{name}.jsonl"
        with reporting_write_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        known = _resume(file, records[name])
        todo = [(variant, case) for variant, case in chosen if (variant, case.id) not in known]
        with (
            reporting_write_errors(file),
            file.open("a", encoding="utf-8") as lines,
            Bar(total=len(todo), desc=printable(f"scoring ({name})"), unit="picture", disable=not progress or not todo) as bar,
        ):
            for batch in (todo[i : i + _BATCH] for i in range(0, len(todo), _BATCH)):
                opened = [_open_for_scoring(pictures, variant, case) for variant, case in batch]
                for (variant, case), score in zip(batch, detector(opened), strict=True):
                    known[variant, case.id] = score
                    lines.write(_score_line(variant, case.id, score))
                lines.flush()
                bar.update(len(batch))
        # In the order of the plan, so that an evaluation that was interrupted leaves the same file as one that was not.
        ordered = [_score_line(variant, case.id, known[variant, case.id]) for variant, case in chosen]
        write_atomically(file, "".join([_line({"record": records[name]}), *ordered]).encode())
        prefix = "" if spec.kind is None else f"{name}."
        for variant, case in chosen:
            values, details = known[variant, case.id]
            scores[variant, case.id][name] = Score({prefix + key: value for key, value in values.items()}, details)
    return scores, records, not_run


def _open_for_scoring(pictures: Pictures, variant: str, case: Case) -> Picture:
    before = open_painted(pictures["base"][case.id]) if variant != "base" and "base" in pictures else None
    return Picture(open_painted(pictures[variant][case.id]), case.prompt, case.label, case.rest, before)


def _resume(file: Path, record: Mapping[str, Any]) -> dict[tuple[str, str], Score]:
    """Begin a detector's file, or go on with that of an earlier run if the detector was the same then."""
    known: dict[tuple[str, str], Score] = {}
    head = _line({"record": record})
    if file.exists():
        lines: list[Any] = []
        with suppress(ValueError, RecursionError):  # the last line may have been cut off, inside a character too
            for line in file.read_bytes().split(b"\n"):
                lines.append(json.loads(line))
        if lines and lines[0] == json.loads(head):
            try:
                entries = [(line["variant"], line["case"], line["values"], line["details"]) for line in lines[1:]]
                known = {(variant, case): Score(dict(values), dict(details)) for variant, case, values, details in entries}
            except (KeyError, TypeError, ValueError) as error:
                raise EsdLoraError(f"{file} is damaged: it holds what is no score. Delete it and run again.") from error
    write_atomically(file, "".join([head, *(_score_line(*key, score) for key, score in known.items())]).encode())
    return known


def _score_line(variant: str, case: str, score: Score) -> str:
    return _line({"variant": variant, "case": case, **score_dict(score)})


def score_dict(score: Score) -> dict[str, Any]:
    """Return a score as JSON holds it."""
    return {"values": dict(score.values), "details": dict(score.details)}


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def measure_distances(
    folder: Path,
    suite: Suite,
    cases: Sequence[Case],
    pictures: Pictures,
    *,
    allow_code: Collection[str] = (),
    progress: bool = True,
) -> tuple[dict[str, dict[str, Distance]], dict[str, Any], dict[str, str]]:
    """Measure how far each variant's pictures as a whole are from the base's, or from photos, by Frechet distances.

    Args:
        folder: For features, which are not computed twice.
        suite: Its distances: which features, of which roles, and beside what.
        cases: All cases.
        pictures: Files to measure.
        allow_code: Every `module:attribute` that may be imported for features.
        progress: Whether to show progress bars.

    Returns:
        Distance to variant to its value; distance to its record; and distance to why it was not measured. A distance says how
        far two clouds of points are apart and has no error bar; compare it between variants alone.

    Raises:
        EsdLoraError: If there are fewer than two photos to measure from.
    """
    distances: dict[str, dict[str, Distance]] = {}
    records: dict[str, Any] = {}
    not_run: dict[str, str] = {}
    for name, spec in suite.distances.items():
        chosen = [case.id for case in cases if case.role in spec.roles]
        sets = {variant: [files[case] for case in chosen if case in files] for variant, files in pictures.items()}
        sets = {variant: files for variant, files in sets.items() if files}
        try:
            features = build(FEATURES, spec.kind or name, spec.model_extra or {}, expected=Features, allow_code=allow_code)
            if spec.reference is None and ("base" not in sets or len(sets) == 1):
                raise NotRun("there is nothing to measure from: neither erasers beside the base nor a folder of photos")
            if len(chosen) < 2:
                raise NotRun("fewer than two pictures")
        except NotRun as reason:
            not_run[name] = str(reason)
            continue
        reference = sets.pop("base") if spec.reference is None else _reference_photos(Path(spec.reference))
        beside = "base" if spec.reference is None else f"{len(reference)} photos"
        records[name] = {**features.record(), "beside": beside}
        origin = _features(folder / "features", features, reference)
        distances[name] = {}
        for variant, files in Bar(sets.items(), desc=printable(f"features ({name})"), unit="set", disable=not progress):
            value = frechet_distance(origin, _features(folder / "features", features, files))
            distances[name][variant] = Distance(value=round(value, 4), of=len(files))
    return distances, records, not_run


def _reference_photos(folder: Path) -> list[Path]:
    files = picture_paths(folder)
    if len(files) < 2:
        raise EsdLoraError(f"{folder} has {len(files)} pictures. Expected the photos to measure from, two or more.")
    return files


def _features(folder: Path, features: Any, files: Sequence[Path]) -> np.ndarray:
    """Return features [N, d] of pictures, from the disk if they were computed from the same files by the same network."""
    key = json.dumps([features.record(), [hash_file(file) for file in files]])
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if file.exists():
        return np.load(file, allow_pickle=False)
    batches = (files[i : i + _BATCH] for i in range(0, len(files), _BATCH))
    computed = np.concatenate([features([open_picture(path) for path in batch]) for batch in batches])
    with reporting_write_errors(file):
        folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, computed, allow_pickle=False)
    write_atomically(file, content.getvalue())
    return computed
