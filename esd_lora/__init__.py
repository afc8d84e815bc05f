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
    from esd_lora.cataloging import catalog
    from esd_lora.eraser import Eraser
    from esd_lora.errors import EsdLoraError
    from esd_lora.evaluation.attaching import attach
    from esd_lora.evaluation.evaluating import evaluate, score_pictures
    from esd_lora.exporting import export
    from esd_lora.extracting import extract
    from esd_lora.families import load_base
    from esd_lora.fusing import fuse
    from esd_lora.gating import Gate
    from esd_lora.hub import pull
    from esd_lora.importing import import_lora
    from esd_lora.inspecting import diff, inspect_file
    from esd_lora.manifests import load_eraser
    from esd_lora.merging import merge
    from esd_lora.pushing import push
    from esd_lora.recipe import Recipe
    from esd_lora.recipe_files import load_recipe
    from esd_lora.sampling import generate, sweep
    from esd_lora.searching import search
    from esd_lora.stacking import Strength, compress, stack
    from esd_lora.training import train
    from esd_lora.verifying import verify

__version__ = "0.1.0"

_HOMES = {
    "Eraser": "eraser",
    "EsdLoraError": "errors",
    "Gate": "gating",
    "Recipe": "recipe",
    "Strength": "stacking",
    "attach": "evaluation.attaching",
    "catalog": "cataloging",
    "compress": "stacking",
    "diff": "inspecting",
    "evaluate": "evaluation.evaluating",
    "export": "exporting",
    "extract": "extracting",
    "fuse": "fusing",
    "generate": "sampling",
    "import_lora": "importing",
    "inspect_file": "inspecting",
    "load_base": "families",
    "load_eraser": "manifests",
    "load_recipe": "recipe_files",
    "merge": "merging",
    "pull": "hub",
    "push": "pushing",
    "score_pictures": "evaluation.evaluating",
    "search": "searching",
    "stack": "stacking",
    "sweep": "sampling",
    "train": "training",
    "verify": "verifying",
}
__all__ = [
    "Eraser",
    "EsdLoraError",
    "Gate",
    "Recipe",
    "Strength",
    "attach",
    "catalog",
    "compress",
    "diff",
    "evaluate",
    "export",
    "extract",
    "fuse",
    "generate",
    "import_lora",
    "inspect_file",
    "load_base",
    "load_eraser",
    "load_recipe",
    "merge",
    "pull",
    "push",
    "score_pictures",
    "search",
    "stack",
    "sweep",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'esd_lora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"esd_lora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
