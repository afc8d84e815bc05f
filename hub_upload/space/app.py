"""A Space that shows erasers: a prompt, a slider for every eraser's strength, and what the base and the erased model paint.

    pip install -r requirements.txt && python app.py

`ERASERS` (paths or Hub ids, with commas between) and `BASE` in the environment choose what is shown.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import esd_lora

BASE = os.environ.get("BASE", "emoji")
ERASERS = [name.strip() for name in os.environ.get("ERASERS", "esd-lora/emoji-no-cat,esd-lora/emoji-no-twemoji").split(",")]
EXAMPLES = ["a cat in ink style", "a dog in twemoji style", "a rocket, noto style", "a twemoji drawing of a cat"]


@cache
def loaded() -> tuple[Any, list[esd_lora.Eraser]]:
    """Return base and erasers, loaded once."""
    return esd_lora.load_base(BASE), [esd_lora.load_eraser(name) for name in ERASERS]


def paint(prompt: str, seed: float, *strengths: float) -> tuple[Any, Any]:
    """Return pictures of one prompt and seed: of the base, and with every eraser at its strength."""
    base, erasers = loaded()
    request = {"prompts": [prompt], "seeds": [int(seed)]}
    (before,) = esd_lora.generate(base, **request)
    (after,) = esd_lora.generate(base, **request, erasers=erasers, weights=list(strengths))
    side = max(256, before.width)  # the built-in base paints small; pixels stay pixels
    return tuple(picture.resize((side, side), 0 if before.width < side else 1) for picture in (before, after))


def build() -> Any:
    """Return the page."""
    import gradio

    _, erasers = loaded()
    with gradio.Blocks(title="Erasers") as page:
        gradio.Markdown(
            "# Erasers\nSmall LoRA files that remove concepts from a text-to-image model. 0 is the base as it is, 1 what the"
            " eraser was trained for; below 0 it amplifies."
        )
        prompt = gradio.Textbox(EXAMPLES[0], label="Prompt")
        seed = gradio.Number(0, label="Seed", precision=0)
        sliders = [
            gradio.Slider(-1, 2, value=1, step=0.1, label=f"{', '.join(eraser.names)} ({name})")
            for eraser, name in zip(erasers, ERASERS, strict=True)
        ]
        button = gradio.Button("Paint", variant="primary")
        with gradio.Row():
            pictures = [gradio.Image(label=label, type="pil") for label in ("base", "erased")]
        gradio.Examples(EXAMPLES, prompt)
        button.click(paint, [prompt, seed, *sliders], pictures)
    return page


if __name__ == "__main__":
    build().launch()
