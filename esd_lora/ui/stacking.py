"""The tab *Stack and merge*."""

from __future__ import annotations

import gradio

from esd_lora.ui.workplace import Workplace


def stack_tab(workplace: Workplace) -> None:
    """Fill the tab.

    Args:
        workplace: What the tabs share.
    """
    gradio.Markdown(f"Not built yet: {workplace.folder}")
