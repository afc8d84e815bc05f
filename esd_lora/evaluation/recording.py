"""An evaluation's directory: its record, what was asked for, and a line for each picture."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.picture_files import picture_paths
from esd_lora.evaluation.planning import Asked, Plan
from esd_lora.evaluation.scoring import Scores
from esd_lora.evaluation.suite_files import Suite
from esd_lora.files import hash_file, prepare_directory, write_atomically

_FILES = ("evaluation.json", "cases.jsonl", "images.jsonl", "summary.json", "table.md", "stack.png", "report.html")


def suite_record(name: str, suite: Suite, planned: Plan, concepts: Sequence[str], limit: int | None) -> dict[str, Any]:
    """What the numbers depend on, as far as the suite goes; without paths, which differ from machine to machine."""
    said = suite.model_dump(mode="json", exclude={"prompts": {"__all__": {"file"}}, "detectors": True, "distances": True})
    return {
        "suite": name,
        "settings": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16],
        "concepts": list(concepts),
        "limit": limit,
        "files": planned.files,
        "cases": hashlib.sha256(case_lines(planned.asked)).hexdigest()[:16],
        "versions": {package: version(package) for package in ("esd-lora", "torch", "diffusers", "transformers", "pillow")},
    }


def case_lines(asked: Sequence[Asked]) -> bytes:
    return "".join(json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in asked).encode()


def begin(out: Path, record: Mapping[str, Any], asked: Sequence[Asked], force: bool) -> None:
    """Makes the directory, or sees that the evaluation in it is this one."""
    file = out / "evaluation.json"
    plain = json.loads(json.dumps(record))
    if file.exists() and not force:
        try:
            earlier = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise EsdLoraError(f"{file} is damaged ({error}). Choose another output, or add --force.") from error
        differ = [key for key in plain if earlier.get(key) != plain[key]]
        if differ:
            raise EsdLoraError(
                f"output {out} holds another evaluation: {', '.join(differ)} differ. Choose another, or add --force."
            )
    else:
        ours = file.exists()
        prepare_directory(out, force, _FILES)
        for folder in ("images", "scores", "features") if ours else ():  # anybody may have a folder `images`
            shutil.rmtree(out / folder, ignore_errors=True)
        write_atomically(file, as_json(plain))
    write_atomically(out / "cases.jsonl", case_lines(asked))


def pictures_of(folder: Path, asked: Sequence[Asked]) -> dict[str, Path]:
    """The picture of each prompt in a folder that others filled."""
    there = {path.stem: path for path in picture_paths(folder)}
    files: dict[str, Path] = {}
    missing: list[str] = []
    for one in asked:
        own = one.case.partition("-")[2]
        file = next((there[name] for name in (one.case, own, f"{own}_0") if name in there), None)
        if file is None:
            missing.append(one.case)
        else:
            files[one.case] = file
    if missing:
        shown = ", ".join(f"{case}.png" for case in missing[:3])
        raise EsdLoraError(
            f"{folder} lacks {len(missing)} of {len(asked)} pictures ({shown}). Add them, or leave prompts out with --limit."
        )
    return files


def picture_lines(out: Path, asked: Sequence[Asked], scores: Scores, pictures: Mapping[str, Mapping[str, Path]]) -> bytes:
    """A line for each picture: what was asked for, where it lies, what each detector said."""
    lines: list[str] = []
    for variant, files in pictures.items():
        for one in asked:
            file = files.get(one.case)
            if file is None:
                continue
            shown = file.relative_to(out).as_posix() if file.is_relative_to(out) else str(file)
            said = {
                name: {"values": dict(score.values), "details": dict(score.details)}
                for name, score in scores[variant, one.case].items()
            }
            line = {"variant": variant, **one._asdict(), "image": shown, "scores": said}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def hash_all(files: Iterable[Path]) -> str:
    return hashlib.sha256("".join(hash_file(file) for file in files).encode()).hexdigest()[:16]
