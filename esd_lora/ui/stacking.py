"""The tab *Stack and merge*: several erasers as one, how they interfere, and a base without what they erase."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import gradio

from esd_lora.files import fresh_output
from esd_lora.ui.choosing import Choice, choose_erasers, optional_number, read_choice, read_number
from esd_lora.ui.inputs import QUIET, base_input, erasers_input
from esd_lora.ui.job_panel import JobPanel, choose, job_panel
from esd_lora.ui.markup import note
from esd_lora.ui.stacks import (
    How,
    Weighted,
    describe_merged,
    describe_stack,
    estimate_merge,
    estimate_stack,
    export_for_others,
    interference,
    merge_command,
    merged_name,
    output_name,
    stack_command,
)
from esd_lora.ui.workplace import MODEL_WORK, Workplace, in_one_sentence

TAB = "stack"
_RANK, _ENERGY = "Highest rank of a layer", "Share of every layer's effect to keep"
_WAYS = [
    ("Fuse: solved on the base, so that they leave the rest alone", "closed form"),
    ("Harmonise: distilled on the base in minutes; erases and keeps more", "harmonise"),
    ("Sum: exact, on no base; what each costs adds up", "sum"),
]


class _Inputs(NamedTuple):
    """What is chosen at the top of the tab."""

    choice: Choice
    base: gradio.Dropdown


def stack_tab(workplace: Workplace) -> None:
    """Fill the tab.

    Args:
        workplace: What the tabs share.
    """
    gradio.Markdown("Make one eraser of several, or a base that has forgotten what they erase.")
    inputs = _Inputs(choose_erasers(workplace, "Erasers to put together"), base_input(workplace))
    _add_interference(workplace, inputs)
    with gradio.Row():
        with gradio.Column(min_width=320):
            stack_button, stack_inputs, stacker = _add_stacking(workplace, inputs)
        with gradio.Column(min_width=320):
            merge_button, merge_inputs, merger = _add_merging(workplace, inputs)
    panel = job_panel(workplace, TAB)
    stack_button.click(in_one_sentence(stacker), stack_inputs, panel.chosen)
    merge_button.click(in_one_sentence(merger), merge_inputs, panel.chosen)
    _add_result(workplace, panel)


def _add_interference(workplace: Workplace, inputs: _Inputs) -> None:
    """Add what shows how the chosen erasers interfere."""
    with gradio.Accordion("How they interfere", open=False):
        on_base = gradio.Checkbox(False, label="Measure on the base, too: what they do to each other's prompts there")
        button = gradio.Button("Show")
        shown = gradio.HTML(note("Choose two erasers or more."))

    def show(base: str, measured: bool, names: list[str], *strengths: float) -> str:
        erasers = read_choice(workplace, names, strengths)
        if not measured:
            return interference(erasers)
        with workplace.base_in_use(base) as loaded:
            return interference(erasers, loaded)

    button.click(in_one_sentence(show), [inputs.base, on_base, *inputs.choice.inputs], shown, **MODEL_WORK)


def _add_stacking(workplace: Workplace, inputs: _Inputs) -> tuple[gradio.Button, list[Any], Any]:
    """Add what makes one eraser of several; return its button, what the button's handler takes, and the handler."""
    gradio.Markdown("### One eraser of several")
    how = gradio.Radio(_WAYS, value="closed form", label="How")
    name = gradio.Textbox("", label="Name of the stack", placeholder="after what is erased, such as no-cat-dog")
    with gradio.Accordion("Smaller", open=False):
        rank = optional_number(_RANK, "Empty: the ranks of all together.")
        energy = optional_number(_ENERGY, "0.99, say. Empty: all of it.")
    with gradio.Row():
        ask = gradio.Button("What will it take?")
        start = gradio.Button("Make the stack", variant="primary")
    answer = gradio.HTML()

    def estimate(base: str, how: str, names: list[str], *strengths: float) -> str:
        erasers = read_choice(workplace, names, strengths)
        if how == "sum":
            return note(estimate_stack(erasers, "sum"))
        with workplace.base_in_use(base) as loaded:
            return note(estimate_stack(erasers, cast("How", how), loaded))

    def begin(base: str, how: str, name: str, rank: str, energy: str, names: list[str], *strengths: float) -> Any:
        erasers = read_choice(workplace, names, strengths)
        place = workplace.place(base) if how != "sum" else ""
        options: dict[str, Any] = {"rank": read_number(rank, _RANK), "energy": read_number(energy, _ENERGY, whole=False)}
        out = workplace.new_output(name) if name.strip() else fresh_output(workplace.folder / output_name(erasers)).name
        command = stack_command(erasers, cast("How", how), place, Path(out), **options)
        return _submit(workplace, f"Stack {_count(erasers)} into {out}", command, out)

    ask.click(in_one_sentence(estimate), [inputs.base, how, *inputs.choice.inputs], answer, **MODEL_WORK)
    return start, [inputs.base, how, name, rank, energy, *inputs.choice.inputs], begin


def _add_merging(workplace: Workplace, inputs: _Inputs) -> tuple[gradio.Button, list[Any], Any]:
    """Add what merges erasers into a base; return its button, what the button's handler takes, and the handler."""
    gradio.Markdown("### A base without what they erase")
    gradio.Markdown(
        "The chosen erasers are added to the base's weights for good, at their strengths: a new diffusers directory, or a new"
        " file where the base is one. Then every tensor is read again and compared."
    )
    name = gradio.Textbox("", label="Name of the merged base", placeholder="such as emoji-no-cat-dog")
    with gradio.Row():
        ask = gradio.Button("What will it take?")
        start = gradio.Button("Merge and verify", variant="primary")
    answer = gradio.HTML()

    def output(base: str, name: str, erasers: list[Weighted]) -> str:
        if name.strip():
            return workplace.new_output(merged_name(name.strip(), base))
        stem = Path(base).name.removesuffix(".safetensors")
        return fresh_output(workplace.folder / merged_name(f"{stem}-{output_name(erasers)}", base)).name

    def estimate(base: str, name: str, names: list[str], *strengths: float) -> str:
        erasers = read_choice(workplace, names, strengths)
        place = workplace.place(base)
        return note(estimate_merge(erasers, place, workplace.folder / output(place, name, erasers)))

    def begin(base: str, name: str, names: list[str], *strengths: float) -> Any:
        erasers = read_choice(workplace, names, strengths)
        place = workplace.place(base)
        out = output(place, name, erasers)
        command = merge_command(erasers, place, Path(out))
        return _submit(workplace, f"Merge {_count(erasers)} into {out}", command, out)

    taken = [inputs.base, name, *inputs.choice.inputs]
    ask.click(in_one_sentence(estimate), taken, answer, **MODEL_WORK)
    return start, taken, begin


def _count(erasers: list[Weighted]) -> str:
    return f"{len(erasers)} eraser{'s' * (len(erasers) != 1)}"


def _submit(workplace: Workplace, title: str, command: list[str], out: str) -> Any:
    job = workplace.jobs.submit(TAB, title, command, out)
    return choose(workplace, TAB, job.id)


def _add_result(workplace: Workplace, panel: JobPanel) -> None:
    """Add what jobs have made: what it is, what was lost or checked, and the file for other programs."""
    gradio.Markdown("### What was made")
    merged = gradio.HTML(visible=False)
    eraser = erasers_input(workplace, "Eraser to look at", several=False)
    described = gradio.HTML()
    with gradio.Row():
        write = gradio.Button("Write its file for ComfyUI, A1111 and Forge")
        file = gradio.DownloadButton("Download the file", interactive=False)
    shown = gradio.State(None)

    def look(job: str | None, before: tuple[str, str] | None) -> list[Any]:
        current = workplace.jobs.get(job) if job else None
        now = (current.id, current.state) if current else None
        if now == before:
            return [gradio.skip(), gradio.skip(), now]
        if current is None or current.state != "done" or current.out is None:
            return [gradio.HTML(visible=False), gradio.skip(), now]
        if current.arguments[0] == "merge":
            text = describe_merged(str(workplace.folder / current.out), workplace.jobs.log(current.id, 100))
            return [gradio.HTML(text, visible=True), gradio.skip(), now]
        return [gradio.HTML(visible=False), gradio.Dropdown(workplace.erasers(), value=current.out), now]

    def describe(name: str | None) -> list[Any]:
        text = describe_stack(workplace.place(name)) if name else ""
        return [text, gradio.DownloadButton("Download the file", interactive=False)]

    def export(name: str | None) -> Any:
        written = export_for_others(workplace.place(name or ""), workplace.folder)
        return gradio.DownloadButton(f"Download {written.name}", value=str(written), interactive=True)

    for event in (panel.chosen.change, panel.timer.tick):
        event(in_one_sentence(look), [panel.chosen, shown], [merged, eraser, shown], **QUIET)
    eraser.change(in_one_sentence(describe), eraser, [described, file], **QUIET)
    write.click(in_one_sentence(export), eraser, file)
