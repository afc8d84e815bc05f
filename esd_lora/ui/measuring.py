"""The tab *Measure*: what is left and what it cost, by a suite; and two erasers beside each other, picture by picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import gradio

from esd_lora.built_in import BUILT_IN
from esd_lora.erasers.measured import TITLES
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.report.comparing import find_evaluations, pair_pictures
from esd_lora.evaluation.report.report import Report
from esd_lora.files import fresh_output
from esd_lora.ui.choosing import choose_erasers, optional_number, read_choice, read_number
from esd_lora.ui.evaluations import (
    PAIRS_AT_ONCE,
    Filter,
    chosen_pairs,
    differences,
    evaluate_command,
    is_sensitive,
    measure_size,
    page_of,
    show_pairs,
    suites,
    summary,
    title_of,
)
from esd_lora.ui.inputs import QUIET, base_input, on_load
from esd_lora.ui.job_panel import JobPanel, choose, job_panel
from esd_lora.ui.markup import figures, frame, note
from esd_lora.ui.stacks import output_name
from esd_lora.ui.workplace import MODEL_WORK, Workplace, in_one_sentence

TAB = "measure"
_LIMIT = "Most pictures of each kind of prompt"
_FILTERS = [
    ("All", "all"),
    ("Judged differently", "judged differently"),
    ("Painted differently, most of all first", "painted differently"),
]


class _Shown(NamedTuple):
    """Pairs of pictures that are looked through."""

    pairs: list[Any]
    names: tuple[str, str]
    veiled: bool
    first: int = 0
    """Number of the first on the page."""


def measure_tab(workplace: Workplace) -> None:
    """Fill the tab.

    Args:
        workplace: What the tabs share.
    """
    with gradio.Row():
        with gradio.Column(scale=2, min_width=300):
            start, inputs, begin = _add_inputs(workplace)
        with gradio.Column(scale=3, min_width=320):
            panel = job_panel(workplace, TAB)
            shown = _add_results(workplace, panel)
    start.click(in_one_sentence(begin), inputs, panel.chosen, api_visibility="private")
    with gradio.Accordion("Compare two, picture by picture", open=True):
        _add_comparison(workplace, shown)


def _add_inputs(workplace: Workplace) -> tuple[gradio.Button, list[Any], Any]:
    """Add what is measured; return the button that starts it, what its handler takes, and the handler."""
    choice = choose_erasers(workplace, "Erasers to measure, all on together")
    base = base_input(workplace)
    usual = "emoji-object" if workplace.base in BUILT_IN else "objects"
    known = suites()
    suite = gradio.Dropdown(list(known), value=usual, label="Suite", info=known[usual])
    limit = optional_number(_LIMIT, "Empty: all that the suite has.")
    prompts = gradio.Textbox("", label="Prompt file", info="Path of a CSV or text file, for a suite that takes one.")
    with gradio.Row():
        ask = gradio.Button("What will it take?")
        start = gradio.Button("Measure", variant="primary")
    answer = gradio.HTML()

    def options_of(limit: str, prompts: str) -> dict[str, Any]:
        return {"limit": read_number(limit, _LIMIT), "prompts": prompts.strip() or None}

    def estimate(base: str, suite: str, limit: str, prompts: str, names: list[str], *strengths: float) -> str:
        erasers = read_choice(workplace, names, strengths)
        out = fresh_output(workplace.folder / "measured")
        with workplace.base_in_use(base) as loaded:
            size = measure_size(erasers, loaded, suite, out, **options_of(limit, prompts))
        return note(size.sentence()) + figures({f"Not run: {name}": reason for name, reason in size.not_run.items()})

    def begin(base: str, suite: str, limit: str, prompts: str, names: list[str], *strengths: float) -> Any:
        erasers = read_choice(workplace, names, strengths)
        name = f"{output_name(erasers)}-measured" if erasers else "base-measured"
        out = fresh_output(workplace.folder / name).name
        command = evaluate_command(erasers, workplace.place(base), suite, Path(out), **options_of(limit, prompts))
        job = workplace.jobs.submit(TAB, f"Measure {', '.join(names) or 'the base'} by {suite}", command, out)
        return choose(workplace, TAB, job.id)

    inputs = [base, suite, limit, prompts, *choice.inputs]
    ask.click(in_one_sentence(estimate), inputs, answer, api_visibility="private", **MODEL_WORK)
    suite.change(lambda name: gradio.Dropdown(info=known[name]), suite, suite, **QUIET)
    return start, inputs, begin


def _evaluations(workplace: Workplace) -> list[tuple[str, str]]:
    """Return the evaluations of a workplace as choices: what they are called, and where they lie in it."""
    folders = find_evaluations(workplace.folder)
    return [(title_of(folder, workplace.folder), folder.relative_to(workplace.folder).as_posix()) for folder in folders]


def _evaluation_input(workplace: Workplace, label: str) -> gradio.Dropdown:
    """Add an input for one of the evaluations; its choices are looked up anew when it is entered."""
    chosen = gradio.Dropdown(_evaluations(workplace), value=None, label=label)

    def look_again() -> Any:
        return gradio.Dropdown(choices=_evaluations(workplace))

    chosen.focus(look_again, None, chosen, **QUIET)
    on_load(look_again, chosen)
    return chosen


def _folder(workplace: Workplace, name: str | None, what: str) -> Path:
    """Return where an evaluation lies that was chosen.

    Raises:
        EsdLoraError: If none was, or it is not one of the workplace's.
    """
    if not name:
        raise EsdLoraError(f"no {what} is chosen. Measure an eraser first, or choose one that was measured.")
    folder = (workplace.folder / name).resolve()
    if not folder.is_relative_to(workplace.folder):
        raise EsdLoraError(f"{name!r} is no evaluation in {workplace.folder}. Choose one of the list.")
    return folder


def _add_results(workplace: Workplace, panel: JobPanel) -> gradio.Dropdown:
    """Add the result of one evaluation, that of the job that has just ended or any other; return what chooses it."""
    evaluation = _evaluation_input(workplace, "Evaluation to look at")
    result = gradio.HTML()
    with gradio.Accordion("Its page, with pictures", open=False):
        page = gradio.HTML()
    shown = gradio.State(None)

    def look(job: str | None, before: tuple[str, str] | None) -> list[Any]:
        current = workplace.jobs.get(job) if job else None
        now = (current.id, current.state) if current else None
        if now == before or current is None or current.state != "done":
            return [gradio.skip(), now]
        return [gradio.Dropdown(_evaluations(workplace), value=current.out), now]

    def show(name: str | None) -> list[str]:
        if not name:
            return ["", ""]
        folder = _folder(workplace, name, "evaluation")
        return [summary(Report.load(folder)), frame(page_of(folder), f"Page of the evaluation {name}")]

    for event in (panel.chosen.change, panel.timer.tick):
        event(in_one_sentence(look), [panel.chosen, shown], [evaluation, shown], **QUIET)
    evaluation.change(in_one_sentence(show), evaluation, [result, page], api_visibility="private")
    return evaluation


def _add_comparison(workplace: Workplace, shown: gradio.Dropdown) -> None:
    """Add what shows the pictures of two evaluations beside each other, with the base's between them.

    Args:
        workplace: Has the evaluations.
        shown: The evaluation that is looked at, which becomes the first of the two.
    """
    with gradio.Row():
        first = _evaluation_input(workplace, "First")
        second = _evaluation_input(workplace, "Second")
    with gradio.Row():
        which = gradio.Radio(_FILTERS, value="all", label="Show")
        role = gradio.Dropdown([("all", ""), *((title, name) for name, title in TITLES.items())], value="", label="Prompts")
    compare = gradio.Button("Compare", variant="primary")
    answer = gradio.HTML()
    sheet = gradio.HTML()
    with gradio.Row():
        back = gradio.Button("Previous", interactive=False)
        on = gradio.Button("Next", interactive=False)
    state = gradio.State(None)
    outputs = [answer, sheet, back, on, state]

    def begin(one: str | None, other: str | None, which: str, role: str, progress: Any = gradio.Progress()) -> list[Any]:  # noqa: B008
        ours, theirs = (
            _folder(workplace, name, what) for name, what in ((one, "first evaluation"), (other, "second evaluation"))
        )
        if ours == theirs:
            raise EsdLoraError("the first and the second are the same evaluation. Choose another.")
        every = pair_pictures(ours, theirs)
        pairs = chosen_pairs(every, cast("Filter", which), role, progress=lambda share: progress(share, "comparing"))
        veiled = any(is_sensitive(Report.load(folder)) for folder in (ours, theirs))
        answer = " ".join([f"{len(pairs)} of {len(every)} prompts and seeds that both have.", differences(ours, theirs)])
        return [note(answer), *turn(_Shown(pairs, (str(one), str(other)), veiled))]

    def turn(shown: _Shown, by: int = 0) -> list[Any]:
        shown = shown._replace(first=shown.first + by)
        last = min(shown.first + PAIRS_AT_ONCE, len(shown.pairs))
        html = show_pairs(shown.pairs[shown.first : last], shown.names, veiled=shown.veiled)
        place = note(f"{shown.first + 1} to {last} of {len(shown.pairs)}") if shown.pairs else ""
        buttons = [gradio.Button(interactive=shown.first > 0), gradio.Button(interactive=last < len(shown.pairs))]
        return [place + html, *buttons, shown]

    def turn_back(shown: _Shown) -> list[Any]:
        return turn(shown, -PAIRS_AT_ONCE)

    def turn_on(shown: _Shown) -> list[Any]:
        return turn(shown, PAIRS_AT_ONCE)

    private: dict[str, Any] = {"api_visibility": "private"}
    shown.change(lambda name: gradio.Dropdown(_evaluations(workplace), value=name), shown, first, **QUIET)
    compare.click(in_one_sentence(begin), [first, second, which, role], outputs, **private)
    back.click(in_one_sentence(turn_back), state, outputs[1:], **private)
    on.click(in_one_sentence(turn_on), state, outputs[1:], **private)
