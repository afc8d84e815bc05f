"""esd-lora: erase concepts from text-to-image diffusion models with small LoRA files.

    import esd_lora

    recipe = esd_lora.load_recipe("fast", base="emoji", concepts=["a cat"])
    eraser = esd_lora.train(recipe, out="no-cat")
    images = esd_lora.generate("emoji", ["a cat in ink style"], erasers=[eraser])

Everything public is reachable from here and imported when first used, so `import esd_lora` loads neither torch nor
diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esd_lora.eraser import Eraser
    from esd_lora.errors import EsdLoraError
    from esd_lora.families import load_base
    from esd_lora.merging import merge
    from esd_lora.recipe import Recipe
    from esd_lora.recipe_files import load_recipe
    from esd_lora.sampling import generate
    from esd_lora.stacking import stack
    from esd_lora.training import train

__version__ = "0.1.0"

_HOMES = {
    "Eraser": "eraser",
    "EsdLoraError": "errors",
    "Recipe": "recipe",
    "generate": "sampling",
    "load_base": "families",
    "load_recipe": "recipe_files",
    "merge": "merging",
    "stack": "stacking",
    "train": "training",
}
__all__ = ["Eraser", "EsdLoraError", "Recipe", "generate", "load_base", "load_recipe", "merge", "stack", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'esd_lora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"esd_lora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
