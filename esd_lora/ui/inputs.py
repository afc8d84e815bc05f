"""Inputs that several tabs have: a base, and erasers from the workplace, by path or from the Hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio
from gradio.components import Component
from gradio.context import Context

from esd_lora.built_in import BUILT_IN
from esd_lora.ui.workplace import Workplace

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For events that only keep a page up to date."""


def on_load(handler: Callable[..., Any], output: Component) -> None:
    """Call a handler whenever the page that is being built is opened.

    Args:
        handler: Returns the component's update.
        output: The component.
    """
    assert Context.root_block, "handlers are added while a page is built"
    Context.root_block.load(handler, None, output, **QUIET)


def base_input(workplace: Workplace) -> gradio.Dropdown:
    """Add an input for a base; its value is what `Workplace.base_in_use` and `--base` take."""
    return gradio.Dropdown(
        list(dict.fromkeys((workplace.base, *BUILT_IN))),
        value=workplace.base,
        label="Base",
        info="Built-in name, checkpoint, directory or Hub id" if workplace.open else None,
        allow_custom_value=workplace.open,
        interactive=workplace.open,
    )


def erasers_input(workplace: Workplace, label: str = "Erasers", *, several: bool = True) -> gradio.Dropdown:
    """Add an input for erasers of the workplace, or by path or Hub id; its choices are looked up anew when it is entered.

    Args:
        workplace: Lists the erasers.
        label: Name of the input.
        several: Whether its value is a list of names, or one name.
    """
    chosen = gradio.Dropdown(
        workplace.erasers(),
        value=list(workplace.shown) if several else None,
        label=label,
        info="From the folder, or a path or Hub id" if workplace.open else None,
        multiselect=several,
        allow_custom_value=workplace.open,
    )

    def look_again() -> Any:
        return gradio.Dropdown(choices=workplace.erasers())

    chosen.focus(look_again, None, chosen, **QUIET)
    on_load(look_again, chosen)
    return chosen
