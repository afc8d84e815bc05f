"""The tab *Erase*: what to erase, what that will take and why, then the training as it goes, and the measured card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gradio

from esd_lora.built_in import BUILT_IN, domain
from esd_lora.erasers.eraser import CURVES_NAME, LOG_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.formats.cards import CARD_NAME
from esd_lora.ui.figures import figure
from esd_lora.ui.inputs import QUIET, base_input
from esd_lora.ui.job_panel import choose, job_panel
from esd_lora.ui.jobs import Job
from esd_lora.ui.training_plan import TrainingPlan, presets_for
from esd_lora.ui.workplace import MODEL_WORK, Workplace, in_one_sentence
from esd_lora.wording import mentions

TAB = "erase"
_LIMIT = 20  # pictures of each prompt set of a small evaluation
_SAMPLES = "samples/before_after.png"
_PRESETS = {
    "instant": "instant: solved in a second or two, no training",
    "fast": "fast: solved, and trained where something is short",
    "thorough": "thorough: solved, and trained for a minute more",
}


def erase_tab(workplace: Workplace) -> None:
    """Fill the tab.

    Args:
        workplace: Where erasers are made.
    """
    with gradio.Row():
        with gradio.Column(scale=2, min_width=300):
            concepts = gradio.Textbox("", label="What to erase", info="Such as: a cat. Several, one a line.", lines=2)
            kept = gradio.Textbox("", label="What must be kept", info="Beside the base's own list; one prompt a line.", lines=2)
            guard = gradio.Textbox(
                "", label="What no update may touch at all", info="A few prompts, one a line; or a number: so many, chosen."
            )
            base = base_input(workplace)
            preset = gradio.Radio(_choices(workplace.base), label="Preset", value=_choices(workplace.base)[0][1])
            with gradio.Accordion("More settings", open=False):
                anchor = gradio.Textbox(
                    "", label="What should appear instead", info="Empty: chosen. none: nothing in particular."
                )
                out = gradio.Textbox("", label="Name of the eraser", info="Empty: after what it erases.")
            with gradio.Row():
                ask = gradio.Button("What will it take?", size="md", min_width=120)
                start = gradio.Button("Erase", variant="primary", size="md", min_width=120)
        with gradio.Column(scale=3, min_width=320):
            answer = gradio.Markdown("", container=False)
            panel = job_panel(workplace, TAB)
            curves, preview = gradio.HTML(visible=False), gradio.HTML(visible=False)
            measure = gradio.Button("Measure it with a small evaluation", visible=False)
            with gradio.Accordion("Model card", open=True, visible=False) as card_box:
                card = gradio.Markdown("", container=False)
    inputs = [concepts, kept, guard, anchor, preset, base, out]
    shown = gradio.State("")
    """What of a run is shown by now, so that nothing is sent twice."""
    outputs = [shown, curves, preview, measure, card_box, card]

    def explain(*texts: str) -> str:
        estimate, reasons = TrainingPlan.read(workplace, *texts).explain(workplace)
        least, most = estimate.seconds()
        rows = "\n".join(estimate.lines())
        return f"**It will take {_span(least, most)}**, beside loading the base.\n\n```text\n{rows}\n```\n\n" + "\n".join(
            f"- {reason}" for reason in reasons
        )

    def begin(*texts: str) -> Any:
        plan = TrainingPlan.read(workplace, *texts)
        plan.recipe()  # its faults are told here
        job = workplace.jobs.submit(TAB, f"Erase {', '.join(plan.concepts)}", plan.arguments(), plan.out)
        return choose(workplace, TAB, job.id)

    def measure_it(job: str | None) -> Any:
        trained = _job_of_eraser(workplace, job)
        return choose(workplace, TAB, _submit_measurement(workplace, trained).id)

    def look(job: str | None, before: str) -> list[Any]:
        current = workplace.jobs.get(job) if job else None
        folder = workplace.folder / current.out if current and current.out else None
        state = _signature(current, folder)
        if state == before:
            return [gradio.skip()] * len(outputs)
        done = current is not None and current.state == "done"
        text = _card(folder) if done and folder else ""
        return [
            state,
            _shown(_curves(folder) if folder else ""),
            _shown(_preview(folder, done=done) if folder else ""),
            gradio.Button(
                visible=done and current is not None and current.arguments[0] == "train" and _suite(current) is not None
            ),
            gradio.Accordion(visible=bool(text)),
            text,
        ]

    def presets(name: str) -> Any:
        choices = _choices(workplace.place(name))
        return gradio.Radio(choices, value=choices[0][1])

    ask.click(in_one_sentence(explain), inputs, answer, api_visibility="private", **MODEL_WORK)
    start.click(in_one_sentence(begin), inputs, panel.chosen, api_visibility="private")
    measure.click(in_one_sentence(measure_it), panel.chosen, panel.chosen, api_visibility="private")
    base.change(in_one_sentence(presets), base, preset, **QUIET)
    panel.chosen.change(in_one_sentence(look), [panel.chosen, shown], outputs, **QUIET)
    panel.timer.tick(in_one_sentence(look), [panel.chosen, shown], outputs, **QUIET)


def _choices(base: str) -> list[tuple[str, str]]:
    """Return the presets for a base, each with what it does."""
    try:
        names = presets_for(base)
    except EsdLoraError:  # a base that is not here is told when it is used
        names = presets_for(BUILT_IN[0])
    return [(_PRESETS.get(name, f"{name}: solved, and trained where something is short"), name) for name in names]


def _span(least: float, most: float) -> str:
    """Return seconds in words."""
    low, high = (f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes" for seconds in (least, most))
    return low if low == high else f"{low} to {high}"


def _shown(text: str) -> Any:
    return gradio.HTML(text, visible=bool(text))


def _signature(job: Job | None, folder: Path | None) -> str:
    """Return what changes when there is something new to show of a run."""
    if job is None or folder is None:
        return ""
    files = [folder / name for name in (LOG_NAME, CURVES_NAME, _SAMPLES, CARD_NAME)] + sorted(folder.glob("previews/*.png"))
    times = [f"{file.name}:{file.stat().st_mtime_ns}" for file in files if file.is_file()]
    return " ".join([job.id, job.state, *times])


def _curves(folder: Path) -> str:
    """Return the plot of a run: the one it ended with, or one of what its probe has read so far."""
    from esd_lora.curves import draw_curves
    from esd_lora.erasers.header import Calibration, Reading
    from esd_lora.pictures import png

    log = folder / LOG_NAME
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.is_file() else []
    probed = [line for line in lines if "probe" in line]
    readings = [Reading.model_validate(line["probe"]) for line in probed]
    if (folder / CURVES_NAME).is_file():
        content = (folder / CURVES_NAME).read_bytes()
    elif readings:
        so_far = Calibration(lr=0, etas=(), preserve_weights=(), evaluations=0, readings=tuple(readings), ending="")
        content = png(draw_curves(so_far, f"so far, {lines[-1]['step']} steps", anchored=probed[0]["eta"] == 0))
    else:
        return ""
    words = "How far the concept is gone and the rest is kept, on prompts that no step trains on"
    if readings:
        last = readings[-1]
        words += f": after {last.step} steps {last.residual:.0%} of the push is left, and the rest moved by {last.drift:.0%}"
    return figure(content, words)


def _preview(folder: Path, *, done: bool) -> str:
    """Return the newest pictures of a run."""
    previews = sorted(folder.glob("previews/step_*.png"))
    if done and (folder / _SAMPLES).is_file():
        return figure((folder / _SAMPLES).read_bytes(), "The same prompts and seeds: the base above, erased below")
    if not previews:
        return ""
    step = int(previews[-1].stem.removeprefix("step_"))
    return figure(previews[-1].read_bytes(), f"The same prompts and seeds after {step} steps: the base above, erased below")


def _card(folder: Path) -> str:
    """Return an eraser's model card as a page shows it: without what the Hub's index reads, the recipe and the citation."""
    file = folder / CARD_NAME
    if not file.is_file():
        return ""
    text = re.sub(r"\A---\n.*?\n---\n", "", file.read_text("utf-8"), flags=re.DOTALL)
    return re.split(r"^## (?:Recipe|Cite)$", text, maxsplit=1, flags=re.MULTILINE)[0]


def _job_of_eraser(workplace: Workplace, job: str | None) -> Job:
    current = workplace.jobs.get(job) if job else None
    if current is None or current.arguments[0] != "train" or current.state != "done":
        raise EsdLoraError("there is no finished eraser to measure. Erase something first.")
    return current


def _suite(job: Job) -> str | None:
    """Return the suite that measures what a training erased; other bases than the built-in ones have theirs in *Measure*."""
    base = _option(job, "base")
    if base not in BUILT_IN:
        return None
    styles = [style for style in domain(base)["styles"] if any(mentions(name, [style]) for name in _options(job, "concept"))]
    return f"{base}-style" if styles else f"{base}-object"


def _submit_measurement(workplace: Workplace, trained: Job) -> Job:
    """Queue the small evaluation of an eraser, whose numbers go into its card."""
    suite, out = _suite(trained), f"{trained.out}-measured"
    if suite is None:
        raise EsdLoraError("there is no suite that goes with this base by itself. Choose one in the tab Measure.")
    arguments = ["evaluate", str(trained.out), f"--base={_option(trained, 'base')}", f"--suite={suite}", f"--limit={_LIMIT}"]
    arguments += ["--attach", f"--out={out}"]
    return workplace.jobs.submit(TAB, f"Measure {trained.out}", arguments, trained.out)


def _options(job: Job, name: str) -> list[str]:
    start = f"--{name}="
    return [argument.removeprefix(start) for argument in job.arguments if argument.startswith(start)]


def _option(job: Job, name: str) -> str:
    return next(iter(_options(job, name)), "")
