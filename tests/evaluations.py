"""Evaluations as they lie on the disk, made by hand: pictures of one colour, and what a judge saw there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from esd_lora.erasers.measured import Interval, Number
from esd_lora.evaluation.report.report import Report


class Seen(NamedTuple):
    """A picture of an evaluation: what it shows, and what a judge said of it."""

    prompt: str
    seed: int
    role: str
    shade: int
    """Grey of all its pixels, 0 to 255."""
    seen: str
    accurate: bool


def made_evaluation(
    folder: Path,
    variants: Mapping[str, Sequence[Seen]],
    *,
    concepts: Sequence[str] = ("a cat",),
    suite: str = "emoji-object",
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write an evaluation into a folder, as far as pages read it, and return the folder."""
    lines: list[str] = []
    for variant, pictures in variants.items():
        (folder / "images" / variant).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            case = f"rest-{number:05d}"
            Image.new("RGB", (8, 8), (picture.shade,) * 3).save(folder / "images" / variant / f"{case}.png")
            scores = {"judge": {"values": {"accuracy": picture.accurate}, "details": {"seen": picture.seen}}}
            line = {"variant": variant, "case": case, "role": picture.role, "prompt": picture.prompt, "seed": picture.seed}
            line |= {"label": None, "rest": None, "guidance": None, "image": f"images/{variant}/{case}.png", "scores": scores}
            lines.append(json.dumps(line) + "\n")
    (folder / "images.jsonl").write_text("".join(lines), "utf-8")
    (folder / "summary.json").write_text(made_report(concepts, suite, record or {}).to_json(), "utf-8")
    (folder / "report.html").write_text("<!doctype html><title>page</title><h1>Measured</h1>", "utf-8")
    return folder


def made_report(
    concepts: Sequence[str] = ("a cat",), suite: str = "emoji-object", record: Mapping[str, Any] | None = None
) -> Report:
    """Return a report with two numbers: what is left of 60 pictures, and what is kept."""
    base = {
        "target": Number(value=1, low=0.94, high=1, hits=60, of=60),
        "general": Number(value=1, low=0.94, high=1, hits=60, of=60),
    }
    gone = Interval(value=-0.95, low=-0.99, high=-0.86)
    same = Interval(value=-0.0167, low=-0.09, high=0.05)
    erased = {
        "target": Number(value=0.05, low=0.0171, high=0.137, hits=3, of=60, difference=gone),
        "general": Number(value=0.9833, low=0.91, high=0.997, hits=59, of=60, difference=same),
    }
    return Report(
        suite=suite,
        concepts=tuple(concepts),
        variants={
            name: {role: {"accuracy": number} for role, number in numbers.items()}
            for name, numbers in (("base", base), ("erased", erased))
        },
        labels={},
        layout={},
        stack=None,
        distances={},
        not_run={"clip": "no weights <b>here</b>"},
        record=dict(record or {}),
        gates=(),
    )
