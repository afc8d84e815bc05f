"""What painting and evaluating take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Unpack

from esd_lora.bases.base import Base
from esd_lora.estimates.estimate import Estimate, Pace, Work, clock, peak_memory, time_text
from esd_lora.evaluation.preparing import PreparedEvaluation
from esd_lora.evaluation.scoring import score_missing
from esd_lora.pictures import Sampling, paint, pictures_at_once, png

_SCORED = 16  # pictures that detectors are timed on
_LENGTHS = (2, 4)  # steps of pictures that are timed


def estimate_pictures(base: Base, pictures: int, **sampling: Unpack[Sampling]) -> Estimate:
    """Return what painting takes.

    Args:
        base: The loaded base.
        pictures: Number of pictures.
        sampling: How they are painted: see `pictures.Sampling`.
    """
    guidance, steps = sampling.pop("guidance", None), sampling.pop("steps", None) or base.steps
    guided = 1 + ((base.guidance if guidance is None else guidance) > base.family.unguided)
    work = Work(texts=pictures * guided, evaluations=pictures * guided * steps, pictures=pictures)
    size, frames = base.picture_size(sampling.get("width"), sampling.get("height")), sampling.get("frames") or 1
    at_once = pictures_at_once(base, size=size, frames=frames)
    return Estimate(work, work, measure_painting(base, min(pictures, at_once), **sampling), 0.0, peak_memory(base))


def estimate_evaluation(prepared: PreparedEvaluation, allow_code: Collection[str] = ()) -> Estimate:
    """Return what an evaluation takes, but for what attacks search for beforehand and distances between sets of pictures.

    Args:
        prepared: From `prepare_evaluation`.
        allow_code: As `evaluate` takes it.
    """
    cases = prepared.plan.cases
    pictures = sum(case.role in variant.roles for variant in prepared.variants for case in cases)
    painting = estimate_pictures(prepared.base, pictures, steps=prepared.steps, guidance=prepared.guidance)
    few = cases[:_SCORED]
    images = paint(prepared.base, [case.prompt for case in few], [case.seed for case in few], steps=2)
    with tempfile.TemporaryDirectory() as folder:
        files = {case.id: Path(folder) / f"{number}.png" for number, case in enumerate(few)}
        for file, image in zip(files.values(), images, strict=True):
            file.write_bytes(png(image))

        def score() -> float:
            started = time.monotonic()
            with tempfile.TemporaryDirectory(dir=folder) as scores:
                score_missing(Path(scores), prepared.suite, few, {"base": files}, allow_code=allow_code, progress=False)
            return time.monotonic() - started

        first, second = score(), score()  # detectors are loaded the first time
    around = max(0.0, first - second) + second * pictures / max(1, len(few))
    return painting._replace(around=around, memory=peak_memory(prepared.base))


def measure_painting(base: Base, count: int, **sampling: Unpack[Sampling]) -> Pace:
    """Return how long pictures take that are painted `count` at a time; two lengths of denoising tell steps from the rest."""
    prompts, text = [f"a photograph of {number}" for number in range(count)], time_text(base)
    lengths = [Sampling(**{**sampling, "steps": steps}) for steps in _LENGTHS]
    short, long = (clock(base, lambda like=like: paint(base, prompts, range(count), **like), count) for like in lengths)
    evaluation = max(0.0, long - short) / (2 * (_LENGTHS[1] - _LENGTHS[0]))
    return Pace(text, evaluation, 0.0, max(0.0, short - 2 * _LENGTHS[0] * evaluation - 2 * text))
