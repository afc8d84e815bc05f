"""A release: from a list of requests to a model without what they name, with its card and a manifest of hashes.

    fleet: an eraser for each request -> fuse them -> merge -> measure -> gates -> card, manifest, signature

Every step is left out whose input is what it was, so after one new request the rest stands. What may be published lies in
`published/`: what is private has its id there, and its name nowhere.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_lora import __version__
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import STATE_NAME, Eraser
from esd_lora.erasers.header import ErasedConcept, EraserHeader
from esd_lora.erasers.privacy import without_folders
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.evaluating import evaluate
from esd_lora.evaluation.report.report import Report
from esd_lora.evaluation.suites.suite_files import load_suite
from esd_lora.files import lock_output, read_bounded, replace_directory, replaced_file, write_atomically
from esd_lora.fleet.jobs import ACTIVE, Plan, suite_for
from esd_lora.fleet.records import (
    CARD_NAME,
    LARGEST_RECORD,
    MANIFEST_NAME,
    RECORDS,
    SIGNATURE_NAME,
    Changes,
    Entry,
    Record,
    last_record,
    published_content,
    render_card,
    same_content,
    write_manifest,
)
from esd_lora.fleet.registry import Registry
from esd_lora.fleet.request import Request
from esd_lora.fleet.running import MakeEngine, run_fleet
from esd_lora.fleet.status import Status, folder_of
from esd_lora.fleet.working import figures_of, shortfalls
from esd_lora.formats.cards import save_with_card
from esd_lora.fusing.closed_form import fuse_members
from esd_lora.fusing.harmonising import harmonise
from esd_lora.fusing.prompts import gather_members
from esd_lora.fusing.states import FusionState
from esd_lora.recipe_files import load_fuse_spec
from esd_lora.weights.merging import merge

if TYPE_CHECKING:
    from esd_lora.bases.base import Base

FLEET, MEASURED, CANDIDATE, PUBLISHED = "fleet", "measured", "candidate", "published"
"""Folders of a release: erasers of single requests, measurements of all together, what waits for its gates, and what passed."""
ERASER, MODEL = "eraser", "model"
_STEPS_NAME = "steps.json"


def release(
    requests: Sequence[Request],
    plan: Plan,
    out: str | Path,
    make_engine: MakeEngine,
    *,
    steps: int | None = None,
    gates: Sequence[str] = (),
    partial: bool = False,
    signed_by: str | None = None,
    registry: Registry | None = None,
    attempts: int = 3,
    progress: bool = True,
) -> Record:
    """Make a model without what requests name, and everything that goes with it.

    Args:
        requests: All of the list; those to be erased (`jobs.ACTIVE`) are.
        plan: Of the list, from `Plan.of`.
        out: Folder; a release that is made there again does what has changed alone.
        make_engine: As for `run_fleet`.
        steps: Harmonise the stack, in so many steps for each member; fused in closed form unless given.
        gates: Conditions on what all erasers leave and keep together, as `evaluate --fail-if` takes them, for every suite.
        partial: Whether to go on without requests that failed or were refused.
        signed_by: GnuPG's name of the key that signs the manifest; not signed unless given.
        registry: Where the requests come from, to note that they are done.
        attempts: As for `run_fleet`.
        progress: Whether to show progress bars.

    Raises:
        EsdLoraError: If a request has no eraser, a gate holds, or a step cannot be done; what was done stands.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with lock_output(out / "release"):
        statuses = run_fleet(requests, plan, out / FLEET, make_engine, attempts=attempts, progress=progress)
        wanted = [request for request in requests if request.status in ACTIVE]
        members = members_of(wanted, statuses, partial)
        run = _Run(plan, out, members, statuses, steps, progress)
        run.erase()
        run.merge()
        figures, held = run.measure(gates)
        record = run.write(figures, held, signed_by)
    if refused := [gate for gate, holds in record.gates.items() if holds]:
        raise EsdLoraError(f"not released: {'; '.join(refused)}. The numbers are in {out / MEASURED}.")
    if registry:
        registry.set_status((member.id for member in members), "done", f"release {record.number}")
    return record


def members_of(wanted: Sequence[Request], statuses: dict[str, Status], partial: bool) -> list[Request]:
    """Return the requests that have an eraser.

    Raises:
        EsdLoraError: If none has, or some have none and `partial` is not set.
    """
    done = [request for request in wanted if statuses[request.id].state == "done"]
    missing = [statuses[request.id] for request in wanted if statuses[request.id].state != "done"]
    if missing and not partial:
        first = f"{missing[0].id} {missing[0].state}: {missing[0].reason}"
        raise EsdLoraError(f"{len(missing)} of {len(wanted)} requests have no eraser ({first}). Mend them, or give --partial.")
    if not done:
        raise EsdLoraError("no request has an eraser: there is nothing to release.")
    return done


class _Run:
    """One release in the making.

    Args:
        plan: What all requests have in common.
        out: The release's folder.
        members: Requests that have an eraser.
        statuses: Where they stand, by id.
        steps: Of harmonising, for each member.
        progress: Whether to show progress bars.
    """

    def __init__(
        self, plan: Plan, out: Path, members: Sequence[Request], statuses: dict[str, Status], steps: int | None, progress: bool
    ):
        self.plan, self.out, self.members, self.statuses = plan, out, members, statuses
        self.steps, self.progress = steps, progress
        self._base: Base | None = None
        keys = sorted((member.id, statuses[member.id].key, member.private) for member in members)
        text = json.dumps([__version__, plan.digest, keys, steps])
        self.content = hashlib.sha256(text.encode()).hexdigest()
        """Hash of everything that the stack depends on."""
        # What is published changes as a whole, once nothing speaks against it.
        self.place = out / (PUBLISHED if published_content(out / PUBLISHED) == self.content else CANDIDATE)
        """Folder of the eraser and the model."""

    @property
    def base(self) -> Base:
        """The base, loaded when it is needed first."""
        if self._base is None:
            settings = self.plan.settings
            self._base = load_base(settings.base, device=settings.device, dtype=settings.dtype, config=settings.base_config)
        return self._base

    def erase(self) -> None:
        """Fuse or harmonise the members into one eraser."""
        if self.place.name == PUBLISHED or self._stands("eraser", self.content, self.place / ERASER):
            return
        members = [Eraser.load(folder_of(self.out / FLEET, member.id)) for member in self.members]
        if self.steps:
            whole = harmonise(members, self.base, steps=self.steps, progress=self.progress)
        else:
            whole = fuse_again(members, self.base, self.out / STATE_NAME, progress=self.progress)
        save_with_card(without_names(whole, self.members), self.place / ERASER)
        self._note("eraser", self.content)

    def merge(self) -> None:
        """Merge that eraser into the base."""
        base = self.plan.settings.base
        model = self.place / (f"{MODEL}.safetensors" if Path(base).is_file() else MODEL)
        if self.place.name == PUBLISHED or self._stands("model", self.content, model):
            return
        merge([self.place / ERASER], base, model, force=True, progress=self.progress)
        self._note("model", self.content)

    def measure(self, gates: Sequence[str]) -> tuple[dict[str, dict[str, float]], dict[str, bool]]:
        """Return what is left and kept with all erasers on, by kind, and which gates hold on any suite."""
        figures: dict[str, dict[str, float]] = {}
        held = dict.fromkeys(gates, False)
        for kind in dict.fromkeys(member.kind for member in self.members):
            own = [member for member in self.members if member.kind == kind]
            if not (suite := suite_for(own[0], self.plan.settings)):
                continue
            report = self._measured(kind, suite)
            figures[kind] = figures_of(report)
            held |= {gate: True for gate in gates if shortfalls(report, (gate,))}
        return figures, held

    def _measured(self, kind: str, suite: str) -> Report:
        """Return the report of a kind's suite, all erasers on; no request of another kind counts as lost there."""
        place = self.out / MEASURED / kind
        key = json.dumps([self.content, suite, dict(self.plan.settings.suite_settings), self.plan.settings.limit])
        if not self._stands(f"measured {kind}", key, place):
            whole = Eraser.load(self.place / ERASER)
            concepts = tuple(ErasedConcept(name=m.concept, synonyms=m.synonyms, pairs=(), eta=None) for m in self.members)
            named = Eraser(whole.pairs, whole.header.model_copy(update={"concepts": concepts}))
            loaded = load_suite(suite, self.plan.settings.suite_settings)
            limit = self.plan.settings.limit
            evaluate(self.base, loaded, place, erasers=[named], limit=limit, force=True, progress=self.progress)
            self._note(f"measured {kind}", key)
        return Report.load(place)

    def write(self, figures: dict[str, dict[str, float]], gates: dict[str, bool], signed_by: str | None) -> Record:
        """Write card, manifest, signature and record, and return the record."""
        before = last_record(self.out)
        entries = {
            member.id: Entry(
                kind=member.kind,
                name=member.id if member.private else member.concept,
                key=self.statuses[member.id].key,
                figures=self.statuses[member.id].figures,
            )
            for member in self.members
        }
        held = any(gates.values())
        record = Record(
            number=(before.number if before else 0) + (not held),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            version=__version__,
            base=without_folders(self.plan.settings.base),
            digest=self.plan.digest,
            requests=entries,
            figures=figures,
            gates=gates,
            manifest="",
        )
        if held:
            return record
        if before and same_content(before, record) and self._manifest_stands(before, signed_by):
            return before
        card = render_card(record, Changes.between(before.requests if before else {}, entries))
        write_atomically(self.place / CARD_NAME, card.encode("utf-8", "backslashreplace"))
        record = record.model_copy(update={"manifest": write_manifest(self.place, record.number, self.content, signed_by)})
        self._publish()
        records = self.out / RECORDS
        records.mkdir(exist_ok=True)
        write_atomically(records / f"{record.number}.json", f"{record.model_dump_json(indent=1)}\n".encode())
        return record

    def _publish(self) -> None:
        """Put the candidate in the place of what is published."""
        published = self.out / PUBLISHED
        if self.place == published:
            return
        for step in ("eraser", "model"):
            self._note(step, "")  # what lies in the candidate's folder afterwards is the release before
        replace_directory(published, self.place, None)
        shutil.rmtree(self.place, ignore_errors=True)
        self.place = published

    def _manifest_stands(self, before: Record, signed_by: str | None) -> bool:
        file, signature = self.place / MANIFEST_NAME, self.place / SIGNATURE_NAME
        whole = file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == before.manifest
        return whole and (signed_by is None or signature.is_file())

    def _steps(self) -> dict[str, str]:
        file = self.out / _STEPS_NAME
        return json.loads(read_bounded(file, LARGEST_RECORD)) if file.is_file() else {}

    def _stands(self, step: str, key: str, place: Path) -> bool:
        """Return whether a step's result is there, made from the same."""
        return self._steps().get(step) == key and place.exists()

    def _note(self, step: str, key: str) -> None:
        """Note that a step is done."""
        write_atomically(self.out / _STEPS_NAME, json.dumps(self._steps() | {step: key}, indent=1).encode())


def fuse_again(erasers: Sequence[Eraser], base: Base, state: Path, *, progress: bool = True) -> Eraser:
    """Return the fused stack of erasers, reading what has changed since the stack whose state a file holds; it is written anew.

    Args:
        erasers: All members.
        base: The loaded base.
        state: File with what was read for the stack before; everything is read where there is none, or it is of another base.
        progress: Whether to show a progress bar.

    Raises:
        EsdLoraError: As `fuse` does, or if the file is damaged.
    """
    started, spec = time.monotonic(), load_fuse_spec()
    known = FusionState.load(state) if state.is_file() else None
    if known and (known.record.held_in != base.held_in or known.spec != spec):
        known = None
    members = gather_members(erasers, base, None, None)
    with replaced_file(state) as file:
        return fuse_members(members, base, spec, known=known, state=file, started=started, progress=progress)


def without_names(whole: Eraser, members: Sequence[Request]) -> Eraser:
    """Return an eraser in which requests that are private stand by their id, with nothing that tells their name."""
    private = [member for member in members if member.private]
    if not private:
        return whole
    names = {name: member.id for member in private for name in member.names}
    concepts = [
        ErasedConcept(name=names[concept.name], pairs=(), eta=None, weight=concept.weight, blocks=concept.blocks)
        if concept.name in names
        else concept
        for concept in whole.header.concepts
    ]
    concepts = list({concept.name: concept for concept in concepts}.values())
    telling: dict[str, Any] = {"recipes": (), "solved": (), "calibrations": (), "evaluation": None, "preserve": ()}
    made = {
        field: tuple(step.model_copy(update={"dropped": ()}) for step in getattr(whole.header, field))
        for field in ("fusions", "distillations")
    }
    header: EraserHeader = whole.header.model_copy(update={"concepts": tuple(concepts), **telling, **made})
    return Eraser(whole.pairs, header)
