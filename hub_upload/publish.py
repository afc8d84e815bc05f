"""Make and publish the collection: every eraser of collection.yaml is trained, measured and pushed.

    python hub_upload/publish.py                        # trains and measures what is not there, shows what would be pushed
    python hub_upload/publish.py --only emoji-no-cat --publish

What lies in `--out` is not made again, measuring goes on where it stopped, and files that a repository holds already are not
sent again, so the same command may be run as often as one likes. An eraser that fails one of its gates is not pushed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import esd_lora
from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.sharing.pushing import Draft, drafted
from esd_lora.yaml_files import checked, read_yaml


class Entry(BaseModel):
    """One eraser of the collection."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    """Name or path, as `esd-lora train` takes it."""
    repo: str
    """Name of the repository, without its owner."""
    license: str
    kohya: bool = False
    sensitive: bool = False
    suite: str
    settings: dict[str, Any] = {}
    """Dotted keys over the suite."""
    concepts: tuple[str, ...] = ()
    """What counts as erased, where the recipe's names are not the suite's."""
    limit: int | None = None
    fail_if: tuple[str, ...] = Field(min_length=1)
    """Gates such as `erased.accuracy>0.05`; if one of them is true, the eraser is not published."""


class Collection(BaseModel):
    """The document: an owner and the erasers of the collection."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str
    erasers: tuple[Entry, ...]


def read_collection(path: Path) -> Collection:
    """Read and check the collection's file."""
    return checked(Collection, read_yaml(path, "collection", "owner: me"), kind="collection", source=str(path))


def make(entry: Entry, out: Path) -> Path:
    """Return the eraser's directory, trained if it is not there and measured as far as it is not.

    Raises:
        EsdLoraError: If something is missing, or a gate fails.
    """
    folder, recipe = out / entry.repo, esd_lora.load_recipe(entry.recipe)
    base = esd_lora.load_base(recipe.base)
    if not (folder / WEIGHTS_NAME).exists():
        esd_lora.train(recipe, base=base, out=folder, force=True)
    elif esd_lora.Eraser.load(folder).header.recipes != (recipe,):
        raise EsdLoraError(f"{folder} was made by another recipe than {entry.recipe} is now. Remove it to make it anew.")
    measured = out / f"{entry.repo}-measured"
    options = {"concepts": entry.concepts, "limit": entry.limit, "settings": entry.settings, "fail_if": entry.fail_if}
    summary = esd_lora.evaluate(base, entry.suite, measured, erasers=[folder], **options)
    esd_lora.attach(folder, summary, None if entry.sensitive else measured)
    return folder


def publish(collection: Collection, out: Path, only: Sequence[str] = (), send: bool = False) -> list[str]:
    """Make every eraser and push it, or show what would be pushed; return what failed and why.

    Args:
        collection: The collection.
        out: Directory for erasers and evaluations.
        only: Names of repositories; all of them unless given.
        send: Whether to push.

    Raises:
        EsdLoraError: If a name is not in the collection.
    """
    names = [entry.repo for entry in collection.erasers]
    for name in only:
        if name not in names:
            raise EsdLoraError(f"the collection has no {name!r}{did_you_mean(name, names)}. It has {', '.join(names)}.")

    def show(draft: Draft) -> bool:
        print("\n".join(draft.lines()), flush=True)
        return True

    failed: list[str] = []
    for entry in collection.erasers:
        if only and entry.repo not in only:
            continue
        terms = {"license": entry.license, "kohya": entry.kohya, "sensitive": entry.sensitive}
        try:
            folder, repo = make(entry, out), f"{collection.owner}/{entry.repo}"
            if send:
                pushed = esd_lora.push(folder, repo, **terms, confirm=show)
                print(f"{'pushed' if pushed.changed else 'nothing changed'}: {pushed.url}", flush=True)
            else:
                show(drafted(folder, repo, **terms))
                print("  not sent: --publish sends it", flush=True)
        except EsdLoraError as error:
            failed.append(f"{entry.repo}: {error}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", type=Path, default=Path(__file__).with_name("collection.yaml"))
    parser.add_argument("--out", type=Path, default=Path("out/collection"))
    parser.add_argument("--only", action="append", default=[], metavar="REPO", help="One eraser; may be given several times.")
    parser.add_argument("--publish", action="store_true", help="Send it; otherwise this is a dry run.")
    options = parser.parse_args()
    try:
        failed = publish(read_collection(options.collection), options.out, options.only, options.publish)
    except EsdLoraError as error:
        failed = [str(error)]
    for reason in failed:
        print(f"error: {reason}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
