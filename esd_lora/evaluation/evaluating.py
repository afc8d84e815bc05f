"""Evaluating: is it gone, and what else did it cost?

    plan the pictures -> paint them, base and erased from the same seeds -> have detectors look -> count -> show

Painting and looking are apart, and both go on where they were interrupted. The record says everything that the numbers depend
on; on one machine, two evaluations with the same record give the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.erasers.manifests import load_eraser
from esd_lora.erasers.stacking import Strength, strengths_of
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks import ATTACKS
from esd_lora.evaluation.attacks.victim import Victim
from esd_lora.evaluation.detectors import NotRun, made
from esd_lora.evaluation.distances import distances
from esd_lora.evaluation.page import page
from esd_lora.evaluation.planning import Plan, plan
from esd_lora.evaluation.recording import as_json, begin, hash_all, picture_lines, pictures_of, suite_record
from esd_lora.evaluation.scoring import paint_missing, picture, score_missing
from esd_lora.evaluation.stacks import as_in_paper, company, heat_map, member_variants
from esd_lora.evaluation.suite_files import Suite, load_suite
from esd_lora.evaluation.summarising import Gate, by_label, failed, read_gate, summarise
from esd_lora.evaluation.tables import markdown
from esd_lora.evaluation.variants import Variant, bare, base_record, blocked, erased, variant_name
from esd_lora.files import write_atomically

_ALIASES = {"sld": "sld-medium"}


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
) -> dict[str, Any]:
    """Measures erasers on a base.

    Args:
        base: A base name, directory or Hub id, or a loaded base.
        suite: Name or path of a suite, or one that is loaded.
        out: Directory; an evaluation with the same record that lies there is gone on with.
        erasers: Erasers or their paths, applied together as one stack. None measures the base alone.
        weights: Strength of each, 1 by default.
        concepts: What counts as erased; what the erasers' headers say unless given.
        against: Other ways to keep the concepts out, from `variants.BLOCKING`, or another base by path or id.
        stack: Whether to measure every eraser alone, too, and their number growing: see `stacks.company`.
        limit: Most pictures of each prompt set of the suite.
        settings: Dotted keys over the suite's file: `{"prompts.i2p.file": "unsafe-prompts4703.csv"}`.
        fail_if: Gates as `summarising.read_gate` takes them.
        force: Throw another evaluation that lies in `out` away.
        progress: Whether to show progress bars.

    Returns:
        What `summary.json` holds: numbers by variant, role and metric; what was not run and why.

    Raises:
        EsdLoraError: If something cannot be loaded or does not fit, `out` holds another evaluation, or a gate fails; then
            everything is written.
    """
    out = Path(out)
    name, suite = _suite(suite, settings)
    against = [_ALIASES.get(kind, kind) for kind in against if kind != "base"]  # which is always there
    loaded = [eraser if isinstance(eraser, Eraser) else load_eraser(eraser) for eraser in erasers]
    removed = _concepts(loaded, concepts)
    planned = plan(suite, removed, limit)
    if stack and len(loaded) < 2:
        raise EsdLoraError(f"a stack has two erasers or more, and {len(loaded)} are given.")
    names = ["base", *["erased"] * bool(loaded), *map(variant_name, against), *(f"attack-{attack}" for attack in suite.attacks)]
    if twice := [same for same, times in Counter(names).items() if times > 1]:
        raise EsdLoraError(
            f"two models would be called {twice[0]!r}, and their pictures lie in one folder. Rename a base's folder."
        )
    gates = [read_gate(text, names) for text in fail_if]
    base = base if isinstance(base, Base) else load_base(base)
    sampler = suite.steps or base.steps, base.guidance if suite.guidance is None else suite.guidance
    variants = [bare(base, *sampler)]
    if loaded:
        variants.append(erased(base, loaded, strengths_of(loaded, weights), *sampler))
    if stack:
        variants += member_variants(base, loaded, strengths_of(loaded, weights), *sampler)
    for kind in against:
        try:
            variants.append(blocked(kind, base, removed, *sampler))
        except NotRun as reason:
            planned.not_run[variant_name(kind)] = str(reason)
    if suite.attacks:
        variants += _attacks(suite, planned, removed, variants, loaded, strengths_of(loaded, weights), base, sampler)
    record = suite_record(name, suite, planned, [concept.name for concept in removed], limit)
    record |= {
        "base": base_record(base),
        "variants": {variant.name: variant.record for variant in variants},
        "sampler": {"scheduler": type(base.pipe.scheduler).__name__, "steps": sampler[0], "guidance": sampler[1]},
        "latents": base.latent_shape(),
        "device": base.model.device.type,
    }
    begin(out, record, planned.asked, force)
    paint_missing(out, variants, planned.asked, progress=progress)
    pictures = {
        v.name: {one.case: picture(out, v.name, one.case) for one in planned.asked if one.role in v.roles} for v in variants
    }
    return _finish(out, suite, planned, record, pictures, gates, progress, loaded if stack else ())


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
) -> dict[str, Any]:
    """Measures pictures that were made elsewhere.

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

    Raises:
        EsdLoraError: As `evaluate`, and if a picture is missing; the message counts them.
    """
    pictures, out = Path(pictures), Path(out)
    name, suite = _suite(suite, settings)
    folders = sorted(folder for folder in pictures.glob("*") if folder.is_dir())
    if not folders:
        raise EsdLoraError(f"{pictures} has no directories. Expected one for each model, with its pictures in it.")
    planned = plan(suite, _concepts((), concepts), limit)
    found = {folder.name: pictures_of(folder, planned.asked) for folder in folders}
    gates = [read_gate(text, list(found)) for text in fail_if]
    hashes = {name: hash_all(files.values()) for name, files in found.items()}
    record = suite_record(name, suite, planned, concepts, limit) | {"pictures": hashes}
    begin(out, record, planned.asked, force)
    return _finish(out, suite, planned, record, found, gates, progress)


def _suite(suite: str | Path | Suite, settings: Mapping[str, Any] | None) -> tuple[str, Suite]:
    """A suite with its name for the record."""
    return ("custom", suite) if isinstance(suite, Suite) else (Path(suite).stem, load_suite(suite, settings))


def _attacks(
    suite: Suite,
    planned: Plan,
    concepts: Sequence[ErasedConcept],
    variants: Sequence[Variant],
    erasers: Sequence[Eraser],
    weights: Sequence[Strength],
    base: Base,
    sampler: tuple[int, float],
) -> list[Variant]:
    """The suite's attempts to bring back what was erased."""
    targets = [one for one in planned.asked if one.role == "target"]
    hit = next((variant for variant in variants if variant.name == "erased"), None)
    if hit is None:
        raise EsdLoraError("this suite attacks an eraser, and none is given.")
    victim = Victim(base, hit, concepts, targets, *sampler, erasers=erasers, weights=weights)
    return [
        made(ATTACKS, spec.kind or name, spec.model_extra or {}, victim)._replace(name=f"attack-{name}", roles=("target",))
        for name, spec in suite.attacks.items()
    ]


def _concepts(erasers: Sequence[Eraser], names: Sequence[str]) -> list[ErasedConcept]:
    """What counts as erased: what the headers say, or else these names."""
    known = [concept for eraser in erasers for concept in eraser.header.concepts if concept.weight > 0]
    if not names:
        return known
    return [
        next((concept for concept in known if concept.named_in(name)), ErasedConcept(name=name, pairs=(), eta=None))
        for name in names
    ]


def _finish(
    out: Path,
    suite: Suite,
    planned: Plan,
    record: dict[str, Any],
    pictures: Mapping[str, Mapping[str, Path]],
    gates: Sequence[Gate],
    progress: bool,
    members: Sequence[Eraser] = (),
) -> dict[str, Any]:
    """Scores, counts and writes everything; then fails where a gate does."""
    asked, variants = planned.asked, list(pictures)
    scores, detectors, not_run = score_missing(out, suite, asked, pictures, progress=progress)
    apart, features, unmeasured = distances(out, suite, asked, pictures, progress=progress)
    record = record | {"detectors": {**detectors, **features}}
    numbers = summarise(asked, scores, variants)
    summary: dict[str, Any] = {
        "suite": record["suite"],
        "concepts": record["concepts"],
        "variants": numbers,
        "labels": by_label(asked, scores, variants),
        "layout": as_in_paper(suite, numbers, asked, scores, members),
        "stack": company(asked, scores, members) if members else {},
        "distances": apart,
        "not_run": {**planned.not_run, **not_run, **unmeasured},
        "record": record,
    }
    reasons = [failed(gate, numbers) for gate in gates]
    summary["gates"] = [{"gate": gate.text, "failed": why is not None} for gate, why in zip(gates, reasons, strict=True)]
    write_atomically(out / "evaluation.json", as_json(record))
    write_atomically(out / "summary.json", as_json(summary))
    write_atomically(out / "images.jsonl", picture_lines(out, asked, scores, pictures))
    if summary["stack"]:
        write_atomically(out / "stack.png", heat_map(summary["stack"]))
    write_atomically(out / "table.md", markdown(summary).encode())
    write_atomically(out / "report.html", page(summary, suite, asked, scores, pictures).encode())
    if why := [reason for reason in reasons if reason]:
        raise EsdLoraError("the evaluation is written, and failed:\n  " + "\n  ".join(why))
    return summary
