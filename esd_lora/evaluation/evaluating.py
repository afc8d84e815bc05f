"""Evaluating: is it gone, and what else did it cost?

    plan the cases -> paint them, base and erased from the same seeds -> have detectors score -> summarise -> report

Painting and scoring are apart, and both go on where they were interrupted. The record holds everything that the numbers depend
on; on one machine, two evaluations with the same record give the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.privacy import scrub
from esd_lora.erasers.stacking import Strength
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.picture_files import match_pictures, painted_file
from esd_lora.evaluation.planning import Plan, erased_concepts, plan_cases
from esd_lora.evaluation.preparing import case_lines, prepare_evaluation, suite_record
from esd_lora.evaluation.report.page import heat_map, render_page
from esd_lora.evaluation.report.report import GateOutcome, Report
from esd_lora.evaluation.report.summarising import (
    FailCondition,
    compare_members,
    paper_layout,
    read_condition,
    summarise,
    summarise_labels,
    worst_kept,
)
from esd_lora.evaluation.scoring import Pictures, Scores, measure_distances, paint_missing, score_dict, score_missing
from esd_lora.evaluation.suites.suite_files import Suite, load_suite
from esd_lora.files import (
    check_directory,
    hash_file,
    lock_output,
    read_bounded,
    refuse_inputs,
    replace_directory,
    reporting_write_errors,
    work_folder,
    write_atomically,
)
from esd_lora.progress import stage
from esd_lora.ranks import from_main, is_main
from esd_lora.wording import printable

_FILES = ("evaluation.json", "cases.jsonl", "images.jsonl", "summary.json", "table.md", "stack.png", "report.html")
_FOLDERS = ("images", "scores", "features")
_LARGEST = 2**26  # bytes of an evaluation's record


def evaluate(
    base: str | Path | Base,
    suite: str | Path | Suite,
    out: str | Path,
    *,
    erasers: Sequence[Eraser | str | Path] = (),
    weights: Sequence[float | Strength] | None = None,
    concepts: Sequence[str] = (),
    against: Sequence[str] = (),
    stack: bool = False,
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
    fail_if: Sequence[str] = (),
    force: bool = False,
    progress: bool = True,
    allow_code: Collection[str] = (),
) -> Report:
    """Measure erasers on a base; several ranks (`ranks`) paint together, the main one scores, and all return the report.

    Args:
        base: A base name, directory or Hub id, or a loaded base.
        suite: Name or path of a suite, or one that is loaded.
        out: Directory; an evaluation with the same record that lies there is gone on with.
        erasers: Erasers or their paths, applied together as one stack. None measures the base alone.
        weights: Strength of each, 1 by default.
        concepts: What counts as erased; by default what the erasers' headers hold.
        against: Other ways to keep the concepts out, from `blocking.BLOCKING`, or another base by path or id.
        stack: Whether to measure every eraser alone, too, and their number growing: see `summarising.compare_members`.
        limit: Most pictures of each prompt set of the suite.
        settings: Dotted keys over the suite's file, where it is not loaded: `{"prompts.i2p.file": "unsafe-prompts4703.csv"}`.
        fail_if: Conditions under which it fails, as `summarising.read_condition` takes them.
        force: Throw another evaluation that lies in `out` away.
        progress: Whether to show progress bars.
        allow_code: Every `module:attribute` that may be imported, where the suite names one as a detector, features or an
            attack; the suite alone, which may be a stranger's, runs no code.

    Returns:
        Numbers by variant, role and metric; what was not run and why.

    Raises:
        EsdLoraError: If something cannot be loaded or does not fit, `out` holds another evaluation, or a condition of `fail_if`
            holds; then everything is written.
    """
    job = prepare_evaluation(
        base,
        suite,
        out,
        erasers=erasers,
        weights=weights,
        concepts=concepts,
        against=against,
        stack=stack,
        limit=limit,
        settings=settings,
        fail_if=fail_if,
        allow_code=allow_code,
    )
    plan, variants, out = job.plan, job.variants, Path(out)
    progress = progress and is_main()
    with _begun(out, job.record, plan.cases, force) if is_main() else nullcontext(out) as folder:
        paint_missing(folder, variants, plan.cases, progress=progress)
        pictures = {
            v.name: {case.id: painted_file(folder, v.name, case.id) for case in plan.cases if case.role in v.roles}
            for v in variants
        }
        alone = job.members if stack else ()
        report = from_main(
            lambda: _score_and_write(folder, job.suite, plan, job.record, pictures, job.conditions, progress, alone, allow_code)
        )
    return _passed(report, job.conditions)


def score_pictures(
    pictures: str | Path,
    suite: str | Path | Suite,
    out: str | Path,
    *,
    concepts: Sequence[str],
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
    fail_if: Sequence[str] = (),
    force: bool = False,
    progress: bool = True,
    allow_code: Collection[str] = (),
) -> Report:
    """Measure pictures that were made elsewhere.

    Args:
        pictures: Directory with one directory for each model, `base` among them if differences are wanted, and in it a picture
            for each prompt: `CASE.png` as in `cases.jsonl`, or, for a prompt file, its own case number (`12.png`, `12_0.png`).
        suite: As in `evaluate`.
        out: Directory for the numbers; the pictures stay where they are.
        concepts: What counts as erased.
        limit: As in `evaluate`.
        settings: As in `evaluate`.
        fail_if: As in `evaluate`.
        force: As in `evaluate`.
        progress: As in `evaluate`.
        allow_code: As in `evaluate`.

    Raises:
        EsdLoraError: As `evaluate`, and if a picture is missing; the message counts them.
    """
    refuse_inputs(Path(out), [pictures])
    out, suite = Path(out), suite if isinstance(suite, Suite) else load_suite(suite, settings, allow_code=allow_code)
    suite.require_allowed(allow_code)
    folders = sorted(folder for folder in Path(pictures).glob("*") if folder.is_dir())
    if not folders:
        raise EsdLoraError(f"{pictures} has no directories. Expected one for each model, with its pictures in it.")
    plan = plan_cases(suite, erased_concepts((), concepts), limit)
    matched = {printable(folder.name): match_pictures(folder, plan.cases) for folder in folders}
    conditions = [read_condition(text, list(matched)) for text in fail_if]
    hashes = {name: _hash_all(files.values()) for name, files in matched.items()}
    record = suite_record(suite, plan, concepts, limit) | {"pictures": hashes}
    with _begun(out, record, plan.cases, force) if is_main() else nullcontext(out) as folder:
        report = from_main(lambda: _score_and_write(folder, suite, plan, record, matched, conditions, progress, (), allow_code))
    return _passed(report, conditions)


@contextmanager
def _begun(out: Path, record: Mapping[str, Any], cases: Sequence[Case], force: bool) -> Generator[Path]:
    """Yield the folder to work in: `out`, or one beside it that takes its place at the end if that holds another evaluation.

    Either is gone on with where it holds this evaluation.
    """
    with lock_output(out):
        plain = scrub(json.loads(json.dumps(record)))
        replacing = force and (out / _FILES[0]).exists()
        folder = work_folder(out) if replacing else out
        if (folder / _FILES[0]).exists():
            differ = _differences(folder / _FILES[0], plain, tolerant=replacing)
            if differ and not replacing:
                raise EsdLoraError(
                    f"output {out} holds another evaluation: {', '.join(differ)} differ. Choose another, or add --force."
                )
            if differ:
                shutil.rmtree(folder)
        else:
            check_directory(out, force)
        with reporting_write_errors(out):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _FILES[0], _json(plain))
        write_atomically(folder / "cases.jsonl", case_lines(cases))
        yield folder
        if replacing:
            replace_directory(out, folder, [*_FILES, *_FOLDERS])
            shutil.rmtree(folder, ignore_errors=True)


def _differences(file: Path, record: Mapping[str, Any], *, tolerant: bool) -> list[str]:
    """Return the keys in which the record of an earlier evaluation differs: all, if it is damaged and that is tolerable."""
    try:
        earlier = json.loads(read_bounded(file, _LARGEST).decode("utf-8"))
        if not isinstance(earlier, dict):
            raise ValueError(f"it holds {type(earlier).__name__}, expected a mapping")
    except (EsdLoraError, ValueError, OSError, RecursionError) as error:
        if tolerant:
            return list(record)
        raise EsdLoraError(f"{file} is damaged ({error}). Choose another output, or add --force.") from error
    return [key for key in record if earlier.get(key) != record[key]]


def _score_and_write(
    out: Path,
    suite: Suite,
    plan: Plan,
    record: dict[str, Any],
    pictures: Pictures,
    conditions: Sequence[FailCondition],
    progress: bool,
    members: Sequence[Eraser],
    allow_code: Collection[str],
) -> Report:
    """Score, summarise and write everything; then fail where a condition does."""
    cases, variants = plan.cases, list(pictures)
    scores, detectors, not_scored = score_missing(out, suite, cases, pictures, allow_code=allow_code, progress=progress)
    distances, features, not_measured = measure_distances(out, suite, cases, pictures, allow_code=allow_code, progress=progress)
    record = scrub(json.loads(json.dumps(record | {"detectors": {**detectors, **features}})))
    with stage("counting, with intervals"):
        numbers = summarise(cases, scores, variants)
    failures = [condition.failure(numbers) for condition in conditions]
    report = Report(
        suite=suite.name,
        concepts=record["concepts"],
        variants=numbers,
        labels=summarise_labels(cases, scores, variants),
        layout=paper_layout(suite, numbers, cases, scores, members),
        worst=worst_kept(cases, scores),
        stack=compare_members(cases, scores, members) if members else None,
        distances=distances,
        not_run={**plan.not_run, **not_scored, **not_measured},
        record=record,
        gates=tuple(GateOutcome(gate=c.text, failed=bool(failure)) for c, failure in zip(conditions, failures, strict=True)),
    )
    write_atomically(out / "evaluation.json", _json(record))
    write_atomically(out / "summary.json", report.to_json().encode())
    write_atomically(out / "images.jsonl", _picture_lines(out, cases, scores, pictures))
    if report.stack:
        write_atomically(out / "stack.png", heat_map(report.stack))
    write_atomically(out / "table.md", report.to_markdown().encode())
    with stage("writing the page"):
        write_atomically(out / "report.html", render_page(report, suite, cases, scores, pictures).encode())
    return report


def _passed(report: Report, conditions: Sequence[FailCondition]) -> Report:
    """Return a report, once it is seen that no condition fails it.

    Raises:
        EsdLoraError: With every condition that does.
    """
    if reasons := [failure for condition in conditions if (failure := condition.failure(report.variants))]:
        raise EsdLoraError("the evaluation is written, and failed:\n  " + "\n  ".join(reasons))
    return report


def _picture_lines(out: Path, cases: Sequence[Case], scores: Scores, pictures: Pictures) -> bytes:
    """Return a line for each picture: its case, where it lies, and its scores."""
    lines: list[str] = []
    for variant, files in pictures.items():
        for case in cases:
            file = files.get(case.id)
            if file is None:
                continue
            place = file.relative_to(out).as_posix() if file.is_relative_to(out) else f"{variant}/{printable(file.name)}"
            own = {name: score_dict(score) for name, score in scores[variant, case.id].items()}
            line = {"variant": variant, **case.to_dict(), "image": place, "scores": own}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _hash_all(files: Iterable[Path]) -> str:
    return hashlib.sha256("".join(hash_file(file) for file in files).encode()).hexdigest()[:16]
