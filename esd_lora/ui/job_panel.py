"""The part of a tab that shows its jobs: which, how far, how much longer, the log, and buttons to stop and to resume."""

from __future__ import annotations

import html
from typing import Any, NamedTuple

import gradio

from esd_lora.ui.figures import lines_of_terminal
from esd_lora.ui.inputs import QUIET, on_load
from esd_lora.ui.jobs import Job, Progress
from esd_lora.ui.workplace import Workplace, in_one_sentence

_EVERY = 2.0  # seconds between two looks at a job
_WORDS = {
    "waiting": "Waiting for its turn",
    "running": "Running",
    "done": "Done",
    "failed": "Failed",
    "stopped": "Stopped",
}


class JobPanel(NamedTuple):
    """The components of a panel that a tab builds on."""

    chosen: gradio.Dropdown
    """Id of the job that is shown; a handler that starts one returns `choose(workplace, tab, job)` for it."""
    timer: gradio.Timer
    """Ticks every few seconds; a tab hangs what else it shows of a job on it: `timer.tick(look, chosen, outputs)`."""


def job_panel(workplace: Workplace, tab: str) -> JobPanel:
    """Add a panel for the jobs of a tab; it begins with the one that runs, or the newest.

    Args:
        workplace: Has the jobs.
        tab: As given to `Jobs.submit`.
    """
    jobs = workplace.jobs
    chosen = gradio.Dropdown([], label=f"Job ({tab})", filterable=False)
    status = gradio.HTML(describe(None))
    with gradio.Row():
        stop = gradio.Button("Stop", size="sm", interactive=False)
        resume = gradio.Button("Resume", size="sm", interactive=False)
    with gradio.Accordion("Log", open=False):
        log = gradio.HTML("")
    timer = gradio.Timer(_EVERY)
    shown = [status, stop, resume, log]

    def look(job: str | None) -> list[Any]:
        current = jobs.get(job) if job else None
        if current is not None and current.state == "running":
            text = describe(current, jobs.progress(current.id), jobs.log(current.id, 1))
        else:
            text = describe(current)
        stopped = current is not None and current.state in ("failed", "stopped")
        return [
            text,
            gradio.update(interactive=current is not None and not current.over),
            gradio.update(interactive=stopped),
            lines_of_terminal(jobs.log(job), "Last lines of the log") if job else "",
        ]

    def begin() -> Any:
        listed = jobs.all(tab)
        first = next((job.id for job in listed if not job.over), listed[0].id if listed else None)
        return choose(workplace, tab, first)

    def stop_job(job: str) -> list[Any]:
        jobs.stop(job)
        return look(job)

    def resume_job(job: str) -> list[Any]:
        jobs.resume(job)
        return look(job)

    chosen.change(in_one_sentence(look), chosen, shown, **QUIET)
    timer.tick(in_one_sentence(look), chosen, shown, **QUIET)
    stop.click(in_one_sentence(stop_job), chosen, shown, **QUIET)
    resume.click(in_one_sentence(resume_job), chosen, shown, **QUIET)
    on_load(begin, chosen)
    return JobPanel(chosen, timer)


def choose(workplace: Workplace, tab: str, job: str | None) -> Any:
    """Return what a handler gives to `JobPanel.chosen` so that a job is shown.

    Args:
        workplace: Has the jobs.
        tab: Of the panel.
        job: Id of the job.
    """
    choices = [(f"{each.id}  {each.title}", each.id) for each in workplace.jobs.all(tab)]
    return gradio.Dropdown(choices, value=job)


def describe(job: Job | None, progress: Progress | None = None, line: str = "") -> str:
    """Return a job's state as HTML: a word, a bar with the time left, and the sentence of a fault.

    Args:
        job: `None` where there is none yet.
        progress: Of its log's last bar.
        line: The last one of its log, where there is no bar.
    """
    if job is None:
        return '<p class="job-state" role="status">Nothing was started here yet.</p>'
    words = _WORDS[job.state]
    if job.over and job.started is not None and job.ended is not None:
        words += f" after {_duration(job.ended - job.started)}"
    lines = [f'<p class="job-state job-{job.state}" role="status"><b>{html.escape(job.title)}:</b> {words}.']
    if job.sentence:
        lines.append(f" {html.escape(job.sentence[:1].upper() + job.sentence[1:])}")
    lines.append("</p>")
    if progress:
        left = f", {progress.left} left" if progress.left and progress.left != "?" else ""
        what = html.escape(f"{progress.what or job.title}: {progress.share:.0%}{left}")
        lines.append(
            f'<div class="job-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100"'
            f' aria-valuenow="{progress.share:.0%}" aria-label="{what}"><div style="width: {progress.share:.1%}"></div></div>'
            f"<p>{what}</p>"
        )
    elif line:
        lines.append(f"<p>{html.escape(line)}</p>")
    return "".join(lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} minutes" if minutes else f"{rest} s"
