"""What a fleet takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.header import ErasedConcept
from esd_lora.estimates.pictures import estimate_pictures
from esd_lora.estimates.training import estimate_training
from esd_lora.evaluation.planning import plan_cases
from esd_lora.evaluation.preparing import likeness_to_erased
from esd_lora.evaluation.suites.suite_files import load_suite
from esd_lora.fleet.jobs import Job, Plan
from esd_lora.fleet.request import Request
from esd_lora.fleet.running import Choice, survey


def estimate_fleet(
    requests: Sequence[Request], plan: Plan, out: Path, choice: Choice, *, workers: int, hourly: float | None = None
) -> list[str]:
    """Return what a fleet would do and take, as lines: the first job of each kind stands for the others of it.

    Args:
        requests: As for `run_fleet`, which does nothing twice.
        plan: What all jobs have in common.
        out: The fleet's folder; nothing is written there.
        choice: Which requests.
        workers: Among how many the work is shared.
        hourly: Price of an hour of a worker.

    Raises:
        EsdLoraError: As `run_fleet` does before it begins, or if the base cannot be loaded.
    """
    statuses, jobs = survey(requests, plan, out, choice)
    states = Counter(status.state for status in statuses.values())
    lines = [", ".join(f"{count} {state}" for state, count in states.items()) or "no request is open"]
    if not jobs:
        return [*lines, "nothing to do"]
    settings = plan.settings
    started = time.monotonic()
    base = load_base(settings.base, device=settings.device, dtype=settings.dtype, config=settings.base_config)
    loading = time.monotonic() - started
    least = most = 0.0
    for kind in dict.fromkeys(job.request.kind for job in jobs):
        own = [job for job in jobs if job.request.kind == kind]
        shortest, longest = job_seconds(own[0], plan, base)
        least, most = least + len(own) * shortest, most + len(own) * longest
        lines.append(f"{kind}: {len(own)} requests, {_span(shortest, longest)} s each, measured by {own[0].suite or 'nothing'}")
    least, most = (loading + each / workers for each in (least, most))
    lines.append(f"in all: {_span(least, most)} s by {workers} workers, beside what a second recipe would add")
    if hourly is not None:
        lines.append(f"price: {_span(workers * least / 3600 * hourly, workers * most / 3600 * hourly, '.2f')}")
    return lines


def job_seconds(job: Job, plan: Plan, base: Base) -> tuple[float, float]:
    """Return how long a job takes on this machine, at least and at most, by the first recipe."""
    recipe = plan.recipe(job.request)
    least, most = estimate_training(recipe, base).seconds()
    if job.suite:
        concepts = [
            ErasedConcept(name=concept.name, synonyms=concept.synonyms, pairs=tuple(concept.pairs()), eta=None)
            for concept in recipe.concepts
        ]
        suite = load_suite(job.suite, plan.settings.suite_settings)
        cases = plan_cases(suite, concepts, plan.settings.limit, partial(likeness_to_erased, base, concepts)).cases
        painting = estimate_pictures(base, 2 * len(cases), steps=suite.steps, guidance=suite.guidance).seconds()[1]
        least, most = least + painting, most + painting
    return least, most


def _span(least: float, most: float, form: str = ",.1f") -> str:
    low, high = format(least, form), format(most, form)
    return high if low == high else f"{low} to {high}"
