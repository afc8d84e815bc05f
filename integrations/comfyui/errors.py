# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The esd-lora authors
"""The error that a user can cause, which ComfyUI shows on the node; text of strangers' files that may be shown."""


class EraserError(ValueError):
    """One sentence: what there is, what was expected, what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return a text as a page or a log may have it: what would be obeyed, such as an escape, is shown by its code."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
