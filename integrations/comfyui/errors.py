# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The esd-lora authors
"""The error that a user can cause, which ComfyUI shows on the node."""


class EraserError(ValueError):
    """One sentence: what there is, what was expected, what to do."""
