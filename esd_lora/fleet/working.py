"""A worker's part of a fleet: train what a request asks for, measure it, and say what came of it.

What a request's own recipe or the base make impossible is `refused`, in the sentence that `train` would end with; any other
exception is `failed`, with its traceback in the log. A worker never writes a status: that is the driver's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from esd_lora.errors import EsdLoraError
from esd_lora.fleet.jobs import Job, Plan
from esd_lora.fleet.status import LOGS, folder_of
from esd_lora.recipe import Recipe

if TYPE_CHECKING:
    from esd_lora.evaluation.report.report import Report

MEASURED = "evaluation"
"""Folder of a request's measurement, beside its eraser."""
FIGURES = {"left": ("target",), "paraphrased": ("paraphrase",), "kept": ("neighbour", "general")}
"""Figure to the roles of prompts that it is counted on."""


class Outcome(NamedTuple):
    """What came of a job."""

    job: Job
    state: Literal["done", "refused", "failed"]
    reason: str = ""
    figures: Mapping[str, float] | None = None
    worst: str = ""
    recipe: str = ""
    seconds: float = 0.0


class Worker:
    """Works on one job after the other, with the base loaded once.

    Args:
        plan: What all jobs have in common.
        out: The fleet's folder.
    """

    def __init__(self, plan: Plan, out: Path):
        import torch

        from esd_lora.bases.loading import load_base
        from esd_lora.fleet.remembering import RememberingBase

        settings = plan.settings
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.plan, self.out = plan, out
        base = load_base(settings.base, device=settings.device, dtype=settings.dtype, config=settings.base_config)
        self.base = RememberingBase.of(base, plan.preserved)

    def work(self, job: Job) -> Outcome:
        """Return what came of a job; everything that it prints stands in its log."""
        started = time.monotonic()
        log = self.out / LOGS / f"{job.request.id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with output_into(log):
            try:
                outcome = self._perform(job)
            except EsdLoraError as error:
                outcome = Outcome(job, "refused", str(error))
            except Exception as error:  # whatever breaks one request must not stop the others
                traceback.print_exc()
                outcome = Outcome(job, "failed", f"{type(error).__name__}: {error}")
        return outcome._replace(seconds=time.monotonic() - started)

    def _perform(self, job: Job) -> Outcome:
        """Train by the first recipe, and by the second where what was measured says that it is not enough."""
        from esd_lora.erasers.measured import worst_line

        recipes = [self.plan.recipe(job.request)]
        if self.plan.second and job.suite:
            recipes.append(self.plan.recipe(job.request, second=True))
        reasons: list[str] = []
        outcome = Outcome(job, "done")
        for number, recipe in enumerate(recipes):
            report = self._train(job, recipe)
            names = self.plan.settings.second if number else self.plan.settings.recipe
            outcome = outcome._replace(recipe=" ".join(names))
            if report is None:
                break
            worst = worst_line(report.worst) if report.worst else ""
            outcome = outcome._replace(figures=figures_of(report), worst=worst)
            reasons = shortfalls(report, self.plan.settings.not_enough_if)
            if not reasons:
                break
        return outcome._replace(reason="; ".join(reasons))

    def _train(self, job: Job, recipe: Recipe) -> Report | None:
        """Make the eraser in its folder, measure it where a suite says how, and return the report."""
        from esd_lora.evaluation.evaluating import evaluate
        from esd_lora.evaluation.report.attaching import attach
        from esd_lora.evaluation.suites.suite_files import load_suite
        from esd_lora.training import train

        folder, settings = folder_of(self.out, job.request.id), self.plan.settings
        train(recipe, base=self.base, out=folder, force=True, progress=False)
        if not job.suite:
            return None
        suite = load_suite(job.suite, settings.suite_settings)
        measured = folder / MEASURED
        options = {"concepts": (job.request.concept,), "limit": settings.limit, "force": True, "progress": False}
        report = evaluate(self.base, suite, measured, erasers=[folder], **options)
        if report.has_numbers:
            attach(folder, report, None if suite.sensitive else measured)
        return report


def figures_of(report: Report) -> dict[str, float]:
    """Return how much is left of what was erased, and how much of the rest is kept, as far as it was measured.

    `left` and `paraphrased` are shares of pictures where the suite's first rate still sees it, `left_before` the base's share;
    `kept` is the share of neighbours and the rest, relative to the base's.
    """

    def count(variant: str, roles: tuple[str, ...]) -> tuple[int, int]:
        rates = [
            next(
                (number for number in report.variants.get(variant, {}).get(role, {}).values() if number.hits is not None), None
            )
            for role in roles
        ]
        return sum(rate.hits or 0 for rate in rates if rate), sum(rate.of for rate in rates if rate)

    figures: dict[str, float] = {}
    for name, roles in FIGURES.items():
        (before, of_before), (after, of) = count("base", roles), count("erased", roles)
        if not of:
            continue
        if name == "kept":
            figures[name] = after / before if before else 0.0
        else:
            figures |= {name: after / of, **({f"{name}_before": before / of_before} if of_before else {})}
    return figures


def shortfalls(report: Report, conditions: tuple[str, ...]) -> list[str]:
    """Return the conditions that hold, each as a sentence.

    Raises:
        EsdLoraError: If one cannot be read.
    """
    from esd_lora.evaluation.report.summarising import read_condition

    read = [read_condition(text, tuple(report.variants)) for text in conditions]
    return [reason for condition in read if (reason := condition.failure(report.variants))]


@contextlib.contextmanager
def output_into(log: Path) -> Generator[None]:
    """Have everything that this process prints, whoever prints it, stand in a file, for the length of a `with` block."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with log.open("w", encoding="utf-8") as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            file.flush()
            for own, number in zip(before, (1, 2), strict=True):
                os.dup2(own, number)
                os.close(own)
