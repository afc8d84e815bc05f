"""The tab *Try*: a prompt, erasers with a slider each, and what the base and the erased model paint from the same seeds."""

from __future__ import annotations

import json
import time
from typing import Any

import gradio

from esd_lora.errors import EsdLoraError
from esd_lora.ui.choosing import choose_erasers
from esd_lora.ui.figures import figure, lines_of_terminal
from esd_lora.ui.inputs import base_input
from esd_lora.ui.painting import Applied, Painter, Scene, command_of, settings_of
from esd_lora.ui.workplace import MODEL_WORK, Workplace, in_one_sentence

MOST_SLIDERS = 6
"""Erasers that are on at once; more are stacked first."""
_SMALL = 256  # pixels of a picture's side: one as small is enlarged without blurring
_EXAMPLES = ("a cat in ink style", "a dog in twemoji style", "a rocket, noto style")
_STRENGTHS = "-1, 0, 0.5, 1, 1.5"
_MOST_PICTURES = 8
_TERMINAL = "The same in a terminal"


def try_tab(workplace: Workplace) -> None:
    """Fill the tab.

    Args:
        workplace: Has the bases and the erasers.
    """
    painter = Painter(workplace)
    with gradio.Row():
        with gradio.Column(scale=2, min_width=300):
            base = base_input(workplace)
            choice = choose_erasers(workplace, most=MOST_SLIDERS)
            prompt = gradio.Textbox(_EXAMPLES[0] if workplace.base == "emoji" else "", label="Prompt", lines=2)
            with gradio.Row():
                seed = gradio.Number(0, label="First seed", precision=0, minimum=0, min_width=110)
                count = gradio.Number(2, label="Pictures", precision=0, minimum=1, maximum=_MOST_PICTURES, min_width=110)
            gated = gradio.Checkbox(label="Gate: erasers on only for prompts near what they erase")
            with gradio.Accordion("More settings", open=False):
                threshold = gradio.Slider(0.5, 1, value=0.95, step=0.01, label="Gate's threshold")
                steps = gradio.Number(None, label="Denoising steps (empty: the base's)", precision=0, minimum=1)
                guidance = gradio.Number(None, label="Guidance scale (empty: the base's)", minimum=0)
            paint = gradio.Button("Paint", variant="primary")
        with gradio.Column(scale=5, min_width=320):
            with gradio.Row(equal_height=True):
                before = _gallery("Before: the base")
                after = _gallery("After: erasers on")
            status = gradio.Markdown("Choose erasers, write a prompt, and paint. The same seed starts from the same noise.")
            with gradio.Row():
                picture = gradio.DownloadButton("Download pictures", size="sm", interactive=False)
                settings = gradio.DownloadButton("Download settings", size="sm", interactive=False)
            command = gradio.HTML("")
            with gradio.Accordion("A grid over strengths", open=False):
                strengths = gradio.Textbox(_STRENGTHS, label="Strengths of all erasers together")
                paint_grid = gradio.Button("Paint the grid")
                sheet = gradio.HTML("")
                grid_file = gradio.DownloadButton("Download the grid", size="sm", visible=False)
    inputs = [base, choice.names, prompt, seed, count, gated, threshold, steps, guidance, *choice.sliders]
    outputs = [before, after, status, picture, settings, command]

    def paint_both(*values: Any) -> list[Any]:
        scene, applied = _read(*values)
        started = time.monotonic()
        painted = painter.paint(scene, applied)
        seconds = time.monotonic() - started
        kept = " The base's were kept from before." if painted.kept else ""
        alone = "" if applied.erasers else " No eraser is chosen, so both sides are the base."
        both = "" if not painted.gate else f" {painted.gate}"
        return [
            _pictures(painted.before, scene, "before"),
            _pictures(painted.after, scene, "after"),
            f"{scene.count} {'pictures' if scene.count > 1 else 'picture'} a side in {seconds:.1f} s.{kept}{alone}{both}",
            gradio.DownloadButton(value=workplace.download("before-and-after.png", _sheet(painted, scene)), interactive=True),
            gradio.DownloadButton(value=workplace.download("settings.json", _json(scene, applied)), interactive=True),
            lines_of_terminal(command_of(scene, applied), _TERMINAL),
        ]

    def paint_again(*values: Any) -> list[Any]:
        return paint_both(*values[1:]) if values[0] else [gradio.skip()] * len(outputs)

    def paint_strengths(text: str, *values: Any) -> list[Any]:
        from esd_lora.pictures import grid, png

        scene, applied = _read(*values)
        numbers = _numbers(text)
        painted = painter.paint_strengths(scene, applied, numbers)
        rows = {f"{strength:g}" + (" (base)" if strength == 0 else ""): images for strength, images in painted.items()}
        picture = png(grid(rows, [f"seed {seed}" for seed in scene.seeds]), scene.prompt)
        alt = f"{scene.prompt}: a row for each strength ({', '.join(rows)}), a column for each seed"
        file = gradio.DownloadButton(value=workplace.download("strengths.png", picture), visible=True)
        return [figure(picture, alt), file, lines_of_terminal(command_of(scene, applied, numbers), _TERMINAL)]

    shown_with: dict[str, Any] = {"api_visibility": "private", "show_progress_on": [before, after], **MODEL_WORK}
    gradio.on([paint.click, prompt.submit], in_one_sentence(paint_both), inputs, outputs, **shown_with)
    for slider in choice.sliders:
        slider.release(in_one_sentence(paint_again), [command, *inputs], outputs, trigger_mode="always_last", **shown_with)
    paint_grid.click(
        in_one_sentence(paint_strengths),
        [strengths, *inputs],
        [sheet, grid_file, command],
        api_visibility="private",
        **MODEL_WORK,
    )


def _gallery(label: str) -> gradio.Gallery:
    return gradio.Gallery(
        label=label,
        columns=2,
        object_fit="contain",
        format="png",
        buttons=["download", "fullscreen"],
        min_width=240,
        height="auto",
    )


def _read(
    base: str,
    erasers: list[str],
    prompt: str,
    seed: float | None,
    count: float | None,
    gated: bool,
    threshold: float,
    steps: float | None,
    guidance: float | None,
    *strengths: float,
) -> tuple[Scene, Applied]:
    """Return what the inputs say.

    Raises:
        EsdLoraError: With what is out of range.
    """
    if len(erasers) > MOST_SLIDERS:
        raise EsdLoraError(f"{len(erasers)} erasers are chosen, and {MOST_SLIDERS} have a slider. Stack some of them first.")
    if seed is None or not 0 <= seed < 2**63:
        raise EsdLoraError("the first seed is a whole number from 0 on. Give one.")
    if count is None or not 1 <= count <= _MOST_PICTURES:
        raise EsdLoraError(f"1 to {_MOST_PICTURES} pictures are painted at a time. Give a number between.")
    if steps is not None and not 1 <= steps <= 1000:
        raise EsdLoraError("denoising takes 1 to 1000 steps. Give a number between, or leave it empty.")
    scene = Scene(base, prompt.strip(), int(seed), int(count), None if steps is None else int(steps), guidance)
    return scene, Applied(tuple(erasers), strengths[: len(erasers)], threshold if gated and erasers else None)


def _numbers(text: str) -> list[float]:
    """Return numbers with commas between.

    Raises:
        EsdLoraError: If something else is written there.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise EsdLoraError(f"strengths {text!r}: expected numbers with commas between, such as {_STRENGTHS}.") from error
    if not all(-10 <= number <= 10 for number in numbers):
        raise EsdLoraError("strengths lie between -10 and 10; -1 to 1.5 is usual.")
    return list(dict.fromkeys(numbers))


def _pictures(images: list[Any], scene: Scene, label: str) -> Any:
    """Return pictures for a gallery, each under its seed; small ones are not blurred."""
    small = ["small-pictures"] if images[0].width <= _SMALL else []
    captioned = [(image, f"{label}, seed {seed}") for image, seed in zip(images, scene.seeds, strict=True)]
    return gradio.Gallery(captioned, columns=min(2, len(images)), elem_classes=small)


def _sheet(painted: Any, scene: Scene) -> bytes:
    """Return a PNG of the pictures before above those after, with the prompt inside."""
    from esd_lora.pictures import grid, png

    columns = [f"{scene.prompt}, seed {seed}" for seed in scene.seeds]
    tile = max(128, min(painted.before[0].width, 512))
    return png(grid({"base": painted.before, "erased": painted.after}, columns, tile=tile), scene.prompt)


def _json(scene: Scene, applied: Applied) -> bytes:
    return json.dumps(settings_of(scene, applied), indent=1, ensure_ascii=False).encode()
