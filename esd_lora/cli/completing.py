"""Completion in the shell: names of bases, recipes and erasers, quickly and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from esd_lora.bases.schedulers import SCHEDULERS
from esd_lora.built_in import BUILT_IN

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_MOST_FOLDERS = 2000  # that are looked into; whoever has more completes paths
_DEEPEST = 3  # folders below the working directory


def complete_bases(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the built-in bases, diffusers directories and checkpoints, and whatever the shell makes of a path."""
    folders = (folder for folder in _folders() if (folder / "model_index.json").is_file())
    return _items([*BUILT_IN, *folders, *Path().glob("*.safetensors")], incomplete)


def complete_recipes(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the recipes that ship, YAML files, and whatever the shell makes of a path."""
    from esd_lora.recipe_files import recipe_names

    return _items([*recipe_names(), *Path().glob("*.yaml")], incomplete)


def complete_erasers(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return folders with weights or a manifest, files of weights, and whatever the shell makes of a path."""
    folders = (folder for folder in _folders() if any(folder.glob("*.safetensors")) or (folder / "stack.yaml").is_file())
    return _items([*folders, *Path().glob("*.safetensors")], incomplete)


def complete_schedulers(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the schedulers, in whatever case they are begun."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(name) for name in SCHEDULERS if name.lower().startswith(incomplete.lower())]


def _folders() -> Iterator[Path]:
    """Yield the folders below the working directory, those nearest first, to a bounded depth and number."""
    level, seen = [Path()], 0
    for _ in range(_DEEPEST):
        level = [below for folder in level for below in sorted(_visible(folder))]
        for folder in level:
            seen += 1
            if seen > _MOST_FOLDERS:
                return
            yield folder


def _visible(folder: Path) -> Iterator[Path]:
    """Yield the folders in a folder but hidden ones and links."""
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield path
    except OSError:  # it may not be read
        return


def _items(names: Iterable[str | Path], incomplete: str) -> list[CompletionItem]:
    """Return names that begin with what is there; the shell completes paths where there is none."""
    from click.shell_completion import CompletionItem

    texts = dict.fromkeys(name.as_posix() if isinstance(name, Path) else name for name in names)
    return [CompletionItem(incomplete, type="file"), *(CompletionItem(text) for text in texts if text.startswith(incomplete))]
