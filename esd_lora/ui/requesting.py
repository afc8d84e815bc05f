"""The tab *Requests*: what is to be erased and by when, what became of it, and the fleet that does it."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import gradio

from esd_lora.errors import EsdLoraError
from esd_lora.fleet.registry import LOG, Decision, Registry
from esd_lora.fleet.request import Basis, Kind, Request
from esd_lora.ui.choosing import optional_number, read_number
from esd_lora.ui.inputs import QUIET, base_input, on_load
from esd_lora.ui.job_panel import JobPanel, choose, job_panel
from esd_lora.ui.markup import faults, frame, note
from esd_lora.ui.request_lists import (
    Work,
    add_file,
    add_form,
    fleet_command,
    fleet_page,
    has_registry,
    in_order,
    page_file,
    show_requests,
)
from esd_lora.ui.workplace import Workplace, in_one_sentence

TAB = "requests"
_PICTURES = "Most pictures of each kind of prompt"
_WORKS = [
    ("Fleet: an eraser for each, measured", "fleet"),
    ("Release: a model without all of them, with its card and manifest", "release"),
]
_FIELDS = ("id", "concept", "kind", "synonyms", "anchor", "keep", "basis", "reference", "received", "due", "private")
"""Columns of a request that the form has, in its order."""


class _Book(NamedTuple):
    """The registry of the page: where it is, who changes it, and what shows how its requests stand."""

    workplace: Workplace
    place: gradio.Textbox
    who: gradio.Textbox
    table: gradio.HTML
    decided: gradio.Dropdown
    withdrawn: gradio.Dropdown

    @property
    def outputs(self) -> list[Any]:
        """What `state` is for."""
        return [self.table, self.decided, self.withdrawn]

    def folder(self, place: str) -> Path:
        """Return the folder of a registry, which lies in the workplace.

        Raises:
            EsdLoraError: If it would lie elsewhere.
        """
        folder = (self.workplace.folder / place.strip()).resolve()
        if not place.strip() or not folder.is_relative_to(self.workplace.folder) or folder == self.workplace.folder:
            raise EsdLoraError(f"{place!r} is no name for a folder in {self.workplace.folder}. Give one such as registry.")
        return folder

    def open(self, place: str, who: str) -> Registry:
        """Return the registry, to change it.

        Raises:
            EsdLoraError: If nobody is named for the log, or as `Registry.open` does.
        """
        if not who.strip():
            raise EsdLoraError("nobody is named who makes this change. Say who you are: it stands in the log.")
        return Registry.open(self.folder(place), who, new=True)

    def state(self, place: str) -> list[Any]:
        """Return how requests stand: a table, and choices for what is decided and what is withdrawn."""
        folder = self.folder(place)
        requests = Registry.open(folder).requests() if has_registry(folder) else ()
        today = datetime.now(UTC).date()
        text = show_requests(requests, today) if requests else note("No request was added yet.")
        ordered = in_order(requests, today)
        open_ones = [request for request in ordered if request.status in ("open", "ambiguous")]
        there = [request for request in ordered if request.status != "withdrawn"]
        return [text, gradio.Dropdown(_choices(open_ones)), gradio.Dropdown(_choices(there))]


def _choices(requests: list[Request]) -> list[tuple[str, str]]:
    return [(f"{request.id}: {request.concept} ({request.status})", request.id) for request in requests]


def requests_tab(workplace: Workplace) -> None:
    """Fill the tab.

    Args:
        workplace: What the tabs share.
    """
    with gradio.Row():
        place = gradio.Textbox("registry", label="Registry", info="Folder in the workplace; made with the first request.")
        who = gradio.Textbox("", label="Who you are", info="Stands in the log beside each change, for good.")
    table = gradio.HTML(note("No request was added yet."))
    with gradio.Accordion("Add requests", open=False):
        upload, read, fields, add, added = _adding_inputs()
    with gradio.Row():
        with gradio.Column(min_width=300), gradio.Accordion("Decide on one", open=False):
            decided, decision_inputs, decide = _deciding_inputs()
        with gradio.Column(min_width=300), gradio.Accordion("Withdraw one", open=False):
            withdrawn = gradio.Dropdown([], value=None, label="Request to withdraw")
            why = gradio.Textbox("", label="Why it is withdrawn")
            withdraw = gradio.Button("Withdraw")
    book = _Book(workplace, place, who, table, decided, withdrawn)
    _connect_adding(book, upload, read, fields, add, added)
    _connect_changes(book, decision_inputs, decide, why, withdraw)
    gradio.Markdown("### Erase what they ask for")
    panel = _add_fleet(book)
    _keep_fresh(book, panel)


def _adding_inputs() -> tuple[gradio.File, gradio.Button, list[Any], gradio.Button, gradio.HTML]:
    """Add what requests are added by: a file, or a form."""
    with gradio.Row():
        with gradio.Column(min_width=280):
            upload = gradio.File(label="List of requests: CSV, or JSON Lines", file_types=[".csv", ".jsonl"], height=160)
            read = gradio.Button("Add the requests of this file")
        with gradio.Column(min_width=280):
            with gradio.Row():
                name = gradio.Textbox("", label="Id", placeholder="no-cat", min_width=130)
                concept = gradio.Textbox("", label="Concept", placeholder="a cat", min_width=130)
                kind = gradio.Dropdown([*get_args(Kind)], value="object", label="Kind", min_width=130)
            with gradio.Row():
                received = gradio.Textbox("", label="Received", placeholder="2026-11-30", min_width=130)
                due = gradio.Textbox("", label="Due", placeholder="2026-12-30", min_width=130)
            synonyms = gradio.Textbox("", label="Other names, ; between them")
            keep = gradio.Textbox("", label="Must not suffer, ; between them")
            with gradio.Accordion("More", open=False):
                anchor = gradio.Textbox(
                    "", label="What should appear instead", info="Empty: chosen. none: nothing in particular."
                )
                basis = gradio.Dropdown([("", ""), *((each, each) for each in get_args(Basis))], value="", label="Basis")
                reference = gradio.Textbox("", label="Reference", info="Where more is kept: a ticket. No personal data.")
                private = gradio.Checkbox(False, label="Private: what is published names the id alone")
            add = gradio.Button("Add this request")
    added = gradio.HTML()
    return upload, read, [name, concept, kind, synonyms, anchor, keep, basis, reference, received, due, private], add, added


def _deciding_inputs() -> tuple[gradio.Dropdown, list[Any], gradio.Button]:
    """Add what a request is decided by."""
    request = gradio.Dropdown([], value=None, label="Request to decide on")
    decision = gradio.Radio([("Have it erased", "open"), ("Refuse it", "refused")], value="open", label="Decision")
    reason = gradio.Textbox("", label="Why", info="A refusal takes a reason.")
    with gradio.Accordion("What exactly is meant", open=False):
        concept = gradio.Textbox("", label="Concept, in the place of its own")
        anchor = gradio.Textbox("", label="What should appear instead, in the place of its own")
        synonyms = gradio.Textbox("", label="Other names, in the place of its own, ; between them")
    return request, [request, decision, reason, concept, anchor, synonyms], gradio.Button("Decide")


def _connect_adding(
    book: _Book, upload: gradio.File, read: gradio.Button, fields: list[Any], add: gradio.Button, added: gradio.HTML
) -> None:
    """Have a file and a form add requests; what is wrong with them stays on the page until the next try."""

    def add_requests(place: str, work: Callable[[], Any]) -> list[Any]:
        try:
            result = work()
        except EsdLoraError as error:
            return [faults(str(error)), *[gradio.skip()] * len(book.outputs)]
        return [note(result.sentence()) + "".join(map(note, result.overlaps)), *book.state(place)]

    def from_file(place: str, who: str, file: str | None) -> list[Any]:
        if not file:
            raise EsdLoraError("no file was uploaded. Choose a CSV, or JSON Lines.")
        return add_requests(place, lambda: add_file(book.open(place, who), Path(file), Path(file).name))

    def from_form(place: str, who: str, *values: Any) -> list[Any]:
        return add_requests(place, lambda: add_form(book.open(place, who), dict(zip(_FIELDS, values, strict=True))))

    outputs = [added, *book.outputs]
    read.click(in_one_sentence(from_file), [book.place, book.who, upload], outputs, api_visibility="private")
    add.click(in_one_sentence(from_form), [book.place, book.who, *fields], outputs, api_visibility="private")


def _connect_changes(
    book: _Book, decision_inputs: list[Any], decide: gradio.Button, why: gradio.Textbox, withdraw: gradio.Button
) -> None:
    """Have requests decided and withdrawn."""

    def decide_on(
        place: str, who: str, request: str | None, decision: str, reason: str, concept: str, anchor: str, synonyms: str
    ) -> list[Any]:
        registry = book.open(place, who)
        names = {"concept": concept.strip() or None, "anchor": anchor.strip() or None}
        others = [name for name in synonyms.split(";") if name.strip()] or None
        registry.decide(_chosen(request), cast("Decision", decision), reason, synonyms=others, **names)
        return book.state(place)

    def withdraw_one(place: str, who: str, request: str | None, reason: str) -> list[Any]:
        book.open(place, who).withdraw(_chosen(request), reason)
        return book.state(place)

    inputs = [book.place, book.who]
    decide.click(in_one_sentence(decide_on), [*inputs, *decision_inputs], book.outputs, api_visibility="private")
    withdraw.click(in_one_sentence(withdraw_one), [*inputs, book.withdrawn, why], book.outputs, api_visibility="private")


def _chosen(request: str | None) -> str:
    if not request:
        raise EsdLoraError("no request is chosen. Choose one.")
    return request


def _add_fleet(book: _Book) -> JobPanel:
    """Add what erases all that is asked for, and the page that says how far it is."""
    workplace = book.workplace
    with gradio.Row():
        with gradio.Column(min_width=300):
            work = gradio.Radio(_WORKS, value="fleet", label="What to make")
            base = base_input(workplace)
            out = gradio.Textbox("fleet", label="Folder", info="What was begun in it goes on; what is done is not done again.")
        with gradio.Column(min_width=300):
            workers = gradio.Number(1, label="Workers", info="Each has a base of its own.", precision=0, minimum=1)
            pictures = optional_number(_PICTURES, "Empty: all that the suites have.")
            gate = gradio.Textbox("", label="Release nothing if", placeholder="erased.accuracy>0.05")
    start = gradio.Button("Start", variant="primary")
    panel = job_panel(workplace, TAB)
    page = gradio.HTML()
    shown = gradio.State("")

    def begin(place: str, work: str, base: str, out: str, workers: float | None, pictures: str, gate: str) -> Any:
        name = book.folder(out).relative_to(workplace.folder).as_posix()
        options: dict[str, Any] = {
            "workers": int(workers or 1),
            "pictures": read_number(pictures, _PICTURES),
            "gate": gate.strip(),
        }
        command = fleet_command(cast("Work", work), book.folder(place), workplace.place(base), Path(name), **options)
        job = workplace.jobs.submit(TAB, f"{work.capitalize()} of {place} in {name}", command, name)
        return choose(workplace, TAB, job.id)

    def look(job: str | None, before: str) -> list[Any]:
        current = workplace.jobs.get(job) if job else None
        file = page_file(workplace.folder / current.out) if current and current.out else None
        now = f"{file}:{file.stat().st_mtime_ns}" if file else ""
        if now == before:
            return [gradio.skip(), now]
        document = fleet_page(file) if file else ""
        return [frame(document, "Page of the fleet") if document else "", now]

    inputs = [book.place, work, base, out, workers, pictures, gate]
    start.click(in_one_sentence(begin), inputs, panel.chosen, api_visibility="private")
    work.change(lambda work: work, work, out, **QUIET)
    for event in (panel.chosen.change, panel.timer.tick):
        event(in_one_sentence(look), [panel.chosen, shown], [page, shown], **QUIET)
    return panel


def _keep_fresh(book: _Book, panel: JobPanel) -> None:
    """Show how requests stand when the page is opened, another registry is named, or somebody has changed something."""
    shown = gradio.State("")

    def name_user(request: gradio.Request) -> Any:
        return request.username or getpass.getuser()  # the first where the page has a password

    def look(place: str, before: str) -> list[Any]:
        log = book.folder(place) / LOG
        now = f"{log}:{log.stat().st_size}" if log.is_file() else f"{log}"
        return [*([gradio.skip()] * len(book.outputs) if now == before else book.state(place)), now]

    on_load(name_user, book.who)
    for event in (book.place.submit, book.place.blur, panel.timer.tick):
        event(in_one_sentence(look), [book.place, shown], [*book.outputs, shown], **QUIET)
