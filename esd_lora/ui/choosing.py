"""Inputs with more to them: erasers, each with its strength; a number that need not be given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio

from esd_lora.errors import EsdLoraError
from esd_lora.ui.inputs import QUIET, erasers_input
from esd_lora.ui.stacks import Weighted
from esd_lora.ui.workplace import Workplace

MOST = 12
"""Erasers that are chosen at once: each has a slider of its own."""


class Choice(NamedTuple):
    """The components of a choice of erasers."""

    names: gradio.Dropdown
    sliders: list[gradio.Slider]

    @property
    def inputs(self) -> list[Any]:
        """What an event takes, for `read_choice`."""
        return [self.names, *self.sliders]


def choose_erasers(workplace: Workplace, label: str = "Erasers", *, most: int = MOST) -> Choice:
    """Add an input for several erasers, and below it a slider for the strength of each that is chosen.

    Args:
        workplace: Lists the erasers.
        label: Name of the input.
        most: Erasers that have a slider.
    """
    names = erasers_input(workplace, label)
    labels = [f"Strength of {name}" for name in workplace.shown[:most]]
    sliders = [gradio.Slider(-1, 1.5, 1, step=0.05, label=label) for label in labels]
    sliders += [gradio.Slider(-1, 1.5, 1, step=0.05, label="Strength", visible=False) for _ in range(most - len(labels))]
    shown = gradio.State(list(workplace.shown))

    def arrange(chosen: list[str], before: list[str], *values: float) -> list[Any]:
        known = dict(zip(before, values, strict=False))  # a strength stays with its eraser, whichever slider it moves to
        updates: list[Any] = []
        for i in range(most):
            name = chosen[i] if i < len(chosen) else None
            updates.append(
                gradio.update(visible=False)
                if name is None
                else gradio.update(visible=True, label=f"Strength of {name}", value=known.get(name, 1))
            )
        return [chosen, *updates]

    names.change(arrange, [names, shown, *sliders], [shown, *sliders], **QUIET)
    return Choice(names, sliders)


def read_choice(workplace: Workplace, names: Sequence[str], strengths: Sequence[float]) -> list[Weighted]:
    """Return the erasers that are chosen.

    Args:
        workplace: Knows where they lie.
        names: Value of the input.
        strengths: Values of all sliders.

    Raises:
        EsdLoraError: If they are too many, or a name is none.
    """
    if len(names) > MOST:
        raise EsdLoraError(f"{len(names)} erasers are chosen, and the page takes {MOST}. Stack more of them in a terminal.")
    return [Weighted(workplace.place(name), float(strength)) for name, strength in zip(names, strengths, strict=False)]


def optional_number(label: str, info: str) -> gradio.Textbox:
    """Add an input for a number that need not be given, for `read_number`: an empty one of gradio's own shows 0."""
    return gradio.Textbox("", label=label, info=info, max_lines=1)


def read_number(text: str, label: str, *, whole: bool = True) -> float | None:
    """Return the number of an input; `None` where it is empty.

    Args:
        text: What stands in it.
        label: What it is called.
        whole: Whether it is a whole number from 1 on, not a share above 0 and up to 1.

    Raises:
        EsdLoraError: If it is none.
    """
    if not text.strip():
        return None
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    if not (number >= 1 if whole else 0 < number <= 1):
        expected = "a whole number from 1 on" if whole else "a share above 0 and up to 1, such as 0.99"
        raise EsdLoraError(f"{label}: {text.strip()!r} is no number that fits. Give {expected}, or leave it empty.")
    return number
