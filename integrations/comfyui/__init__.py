# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The esd-lora authors
"""ComfyUI nodes for erasers of esd-lora: load, stack, gate by prompt. README.md beside this file says how to use them."""

from .nodes import GateByPrompt, LoadEraser, StackErasers

NODE_CLASS_MAPPINGS = {
    "EsdLoadEraser": LoadEraser,
    "EsdStackErasers": StackErasers,
    "EsdGateByPrompt": GateByPrompt,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "EsdLoadEraser": "Load eraser",
    "EsdStackErasers": "Stack erasers",
    "EsdGateByPrompt": "Gate eraser by prompt",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
