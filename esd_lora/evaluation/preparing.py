"""Preparing an evaluation: loads what it needs, lays out its pictures, and records what its numbers will depend on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.erasers.stacking import Strength, strengths_of
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks.victim import Victim
from esd_lora.evaluation.baselines.blocking import baseline, baseline_name, resolve_names
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.detectors.detector import NotRun
from esd_lora.evaluation.planning import Plan, erased_concepts, plan_cases
from esd_lora.evaluation.registries import ATTACKS, build
from esd_lora.evaluation.report.summarising import FailCondition, read_condition
from esd_lora.evaluation.suites.suite_files import Suite, load_suite
from esd_lora.evaluation.variants import Variant, bare, base_record, erased, members_erased
from esd_lora.files import refuse_inputs
from esd_lora.formats.opening import open_eraser
from esd_lora.lessons import likeness_to


class PreparedEvaluation(NamedTuple):
    """An evaluation before its first picture."""

    base: Base
    suite: Suite
    plan: Plan
    variants: list[Variant]
    """What paints: the base, the erased base, members of a stack, what it is compared with, attacks."""
    members: list[Eraser]
    conditions: list[FailCondition]
    steps: int
    """Denoising steps of a picture."""
    guidance: float
    record: dict[str, Any]
    """What the numbers depend on."""


def prepare_evaluation(
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
    allow_code: Collection[str] = (),
) -> PreparedEvaluation:
    """Load what an evaluation needs and lay out its pictures; arguments and errors are those of `evaluate`."""
    read = [base.source or "" if isinstance(base, Base) else base, *(e for e in erasers if not isinstance(e, Eraser))]
    refuse_inputs(Path(out), filter(None, read))
    suite = suite if isinstance(suite, Suite) else load_suite(suite, settings, allow_code=allow_code)
    suite.require_allowed(allow_code)
    members = [open_eraser(eraser, base.family.name if isinstance(base, Base) else None) for eraser in erasers]
    removed, against = erased_concepts(members, concepts), resolve_names(against)
    # Else something needs the text encoders once all prompts are encoded.
    painted_alone = not (against or suite.attacks or any(member.changes_text for member in members))
    if suite.needs_text_encoder and removed and not isinstance(base, Base):
        base = load_base(base, text_first=painted_alone)
    if isinstance(base, Base):
        base.know_words_of(members)
    near = partial(likeness_to_erased, base, removed) if isinstance(base, Base) else None
    plan = plan_cases(suite, removed, limit, near)
    if stack and len(members) < 2:
        raise EsdLoraError(f"a stack has two erasers or more, and {len(members)} are given.")
    if suite.attacks and not members:
        raise EsdLoraError("this suite attacks an eraser, and none is given.")
    names = ["base"] + ["erased"] * bool(members) + [baseline_name(kind) for kind in against]
    names += [f"attack-{attack}" for attack in suite.attacks]
    if twice := [same for same, times in Counter(names).items() if times > 1]:
        raise EsdLoraError(
            f"two models would be called {twice[0]!r}, and their pictures lie in one folder. Rename a base's folder."
        )
    conditions = [read_condition(text, names) for text in fail_if]
    strengths = strengths_of(members, weights)
    base = base if isinstance(base, Base) else load_base(base, text_first=painted_alone)
    base = base.skipping(suite.clip_skip)
    if any(member.changes_text for member in members):
        base.place_denoiser()  # prompts are encoded with the erasers on
    sampler = suite.steps or base.steps, base.guidance if suite.guidance is None else suite.guidance
    base.know_words_of(members)
    origin = base_record(base)  # text encoders and all
    encode = base.encode_last(case.prompt for case in plan.cases) if painted_alone else None
    variants = [bare(base, *sampler, encode)]
    if members:
        variants.append(erased(base, members, strengths, *sampler, encode=encode))
    if stack:
        variants += members_erased(base, members, strengths, *sampler, encode)
    for kind in against:
        try:
            variants.append(baseline(kind, base, removed, *sampler))
        except NotRun as reason:
            plan.not_run[baseline_name(kind)] = str(reason)
    if suite.attacks:
        base.require_whole("attacking")
        targets = [case for case in plan.cases if case.role == "target"]
        victim = Victim(base, variants[1], removed, targets, *sampler, erasers=members, weights=strengths)
        variants += _attacked(suite, victim, allow_code)
    record = suite_record(suite, plan, [concept.name for concept in removed], limit) | {
        "base": origin,
        "variants": {variant.name: variant.record for variant in variants},
        "sampler": {"scheduler": type(base.pipe.scheduler).__name__, "steps": sampler[0], "guidance": sampler[1]},
        "latents": base.latent_shape(),
        "device": base.model.device.type,
    }
    return PreparedEvaluation(base, suite, plan, variants, members, conditions, *sampler, record)


def likeness_to_erased(base: Base, concepts: Sequence[ErasedConcept], texts: Sequence[str]) -> list[float]:
    """Return how near each text lies to the nearest concept as the base's text encoder sees it: their cosine."""
    return likeness_to([concept.called[0] for concept in concepts], texts, base).amax(0).tolist()


def _attacked(suite: Suite, victim: Victim, allow_code: Collection[str]) -> list[Variant]:
    """Return the suite's attempts to bring back what was erased."""
    attacks = {
        name: build(ATTACKS, spec.kind or name, spec.model_extra or {}, victim, expected=Variant, allow_code=allow_code)
        for name, spec in suite.attacks.items()
    }
    return [attack._replace(name=f"attack-{name}", roles=("target",)) for name, attack in attacks.items()]


def suite_record(suite: Suite, plan: Plan, concepts: Sequence[str], limit: int | None) -> dict[str, Any]:
    """Return what the numbers depend on, as far as the suite goes; without paths, which differ from machine to machine."""
    fields = suite.model_dump(mode="json", exclude={"prompts": {"__all__": {"file"}}, "detectors": True, "distances": True})
    if suite.clip_skip is None:
        del fields["clip_skip"]  # records of old have no such line
    own = {"code": suite.code()} if suite.code() else {}  # what was allowed to run; records of old have no such line
    return {
        "suite": suite.name,
        **own,
        "settings": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16],
        "concepts": list(concepts),
        "limit": limit,
        "files": plan.files,
        "cases": hashlib.sha256(case_lines(plan.cases)).hexdigest()[:16],
        "versions": {package: version(package) for package in ("esd-lora", "torch", "diffusers", "transformers", "pillow")},
    }


def case_lines(cases: Sequence[Case]) -> bytes:
    """Return the cases as a file, one a line."""
    return "".join(json.dumps(case.to_dict(), ensure_ascii=False) + "\n" for case in cases).encode()
