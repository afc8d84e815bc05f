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
    from esd_lora.bases.loading import load_base
    from esd_lora.erasers.eraser import Eraser
    from esd_lora.erasers.manifests import load_eraser
    from esd_lora.erasers.stacking import Strength, compress, stack
    from esd_lora.errors import EsdLoraError
    from esd_lora.evaluation.evaluating import evaluate, score_pictures
    from esd_lora.evaluation.report.attaching import attach
    from esd_lora.evaluation.report.report import Report
    from esd_lora.formats.exporting import export
    from esd_lora.formats.importing import import_lora
    from esd_lora.formats.inspecting import diff, inspect_file
    from esd_lora.fusing.closed_form import fuse
    from esd_lora.fusing.growing import change_members
    from esd_lora.fusing.harmonising import harmonise
    from esd_lora.gating import Gate
    from esd_lora.recipe import Recipe
    from esd_lora.recipe_files import load_recipe
    from esd_lora.sampling import generate, generate_videos, sweep
    from esd_lora.sharing.catalog import catalog, search
    from esd_lora.sharing.pulling import pull
    from esd_lora.sharing.pushing import push
    from esd_lora.training import train
    from esd_lora.weights.extracting import extract
    from esd_lora.weights.merging import merge
    from esd_lora.weights.verifying import verify

__version__ = "0.1.0"

_HOMES = {
    "Eraser": "erasers.eraser",
    "EsdLoraError": "errors",
    "Gate": "gating",
    "Recipe": "recipe",
    "Report": "evaluation.report.report",
    "Strength": "erasers.stacking",
    "attach": "evaluation.report.attaching",
    "catalog": "sharing.catalog",
    "change_members": "fusing.growing",
    "compress": "erasers.stacking",
    "diff": "formats.inspecting",
    "evaluate": "evaluation.evaluating",
    "export": "formats.exporting",
    "extract": "weights.extracting",
    "fuse": "fusing.closed_form",
    "generate": "sampling",
    "generate_videos": "sampling",
    "harmonise": "fusing.harmonising",
    "import_lora": "formats.importing",
    "inspect_file": "formats.inspecting",
    "load_base": "bases.loading",
    "load_eraser": "erasers.manifests",
    "load_recipe": "recipe_files",
    "merge": "weights.merging",
    "pull": "sharing.pulling",
    "push": "sharing.pushing",
    "score_pictures": "evaluation.evaluating",
    "search": "sharing.catalog",
    "stack": "erasers.stacking",
    "sweep": "sampling",
    "train": "training",
    "verify": "weights.verifying",
}
__all__ = [
    "Eraser",
    "EsdLoraError",
    "Gate",
    "Recipe",
    "Report",
    "Strength",
    "attach",
    "catalog",
    "change_members",
    "compress",
    "diff",
    "evaluate",
    "export",
    "extract",
    "fuse",
    "generate",
    "generate_videos",
    "harmonise",
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
