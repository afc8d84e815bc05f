"""`esd-lora push`, `pull`, `search`, `catalog`: erasers on the Hub and on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esd_lora.cli.commands import Verb
from esd_lora.cli.completing import complete_erasers
from esd_lora.cli.options import choose_out, force_option, names_of, out_option
from esd_lora.cli.printing import Output, say
from esd_lora.cli.results import HubEraser, Listed, LocalEraser, Pulled, Pushed, Searched
from esd_lora.errors import EsdLoraError
from esd_lora.wording import printable

if TYPE_CHECKING:
    from esd_lora.sharing import catalog as catalogs
    from esd_lora.sharing.pushing import Draft


@click.command(cls=Verb)
@click.argument("eraser", type=click.Path(), shell_complete=complete_erasers)
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository one that only you see.")
@click.option("--revision", help="Branch to push to; made if it is not there.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--kohya", is_flag=True, help="Put a file for A1111, Forge and ComfyUI beside it.")
@click.option("--license", metavar="NAME", help="Hub's name of a licence, or NAME=URL; default: that of a known base.")
@click.option("--base-model", metavar="OWNER/NAME", help="The base on the Hub, if a copy on this machine was trained on.")
@click.option("--sensitive", is_flag=True, help="Mask the concept's name in the card, and leave the base's pictures out.")
@click.option("--dry-run", is_flag=True, help="Show what would become public, and send nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def push(
    eraser: str,
    repo: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    kohya: bool,
    license: str | None,
    base_model: str | None,
    sensitive: bool,
    dry_run: bool,
    yes: bool,
) -> Pushed:
    """Publish an eraser on the Hugging Face Hub, with its card, recipe and pictures.

    \b
    esd-lora push no-cat me/no-cat --dry-run
    esd-lora push no-style me/no-style --kohya --base-model stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    from esd_lora.sharing.pushing import drafted
    from esd_lora.sharing.pushing import push as run

    settings: dict[str, Any] = {
        "revision": revision,
        "kohya": kohya,
        "license": license,
        "base_model": base_model,
        "sensitive": sensitive,
    }
    if dry_run:
        draft = drafted(eraser, repo, **settings)
        say(*draft.lines(), "", "The card:", "", *_card(draft).split("\n"), "nothing was sent")
        return _pushed(draft, None)
    drafts: list[Draft] = []

    def confirm(draft: Draft) -> bool:
        drafts.append(draft)
        say(*draft.lines())
        return yes or click.confirm("push this?")

    _require_answer(yes)
    pushed = run(eraser, repo, private=private, create_pr=create_pr, confirm=confirm, **settings)
    say("nothing was sent" if pushed is None else f"{'pushed' if pushed.changed else 'nothing changed'}: {pushed.url}")
    return _pushed(drafts[-1], pushed and pushed.url)


def _require_answer(yes: bool) -> None:
    """Refuse to ask where nobody reads the question."""
    output = Output.current()
    if not yes and (output.quiet or output.as_json):
        raise EsdLoraError("push shows what becomes public and asks, which --quiet and --json leave no place for: add --yes.")


def _card(draft: Draft) -> str:
    return draft.files["README.md"].decode()


def _pushed(draft: Draft, url: str | None) -> Pushed:
    """Return what was sent, or would be."""
    files = {place: len(content) for place, content in draft.files.items()}
    return {"repo": draft.repo, "sent": url is not None, "url": url, "files": files, "card": _card(draft)}


@click.command(cls=Verb)
@click.argument("repo", metavar="OWNER/NAME[@REVISION]")
@out_option("Directory for the eraser", "erasers/NAME")
@force_option
def pull(repo: str, out: Path | None, force: bool) -> Pulled:
    """Fetch an eraser from the Hub with its card and pictures, checked before anything is written."""
    from esd_lora.sharing.pulling import pull as run

    pulled = run(repo, choose_out(out, "erasers", names_of(repo), again=force), force=force)
    for name in pulled.left_out:
        say(f"left out: {name!r}, not a kind of file that is taken", err=True)
    say(f"{repo} at {pulled.commit[:12]}, {len(pulled.files)} files: {pulled.directory}")
    return {"eraser": str(pulled.directory), "commit": pulled.commit, "files": pulled.files, "left_out": pulled.left_out}


@click.command(cls=Verb)
@click.argument("text", required=False)
@click.option("--concept", help="What it should erase.")
@click.option("--base", metavar="OWNER/NAME", help="The base it was made for.")
@click.option("--tag", "tags", multiple=True, help="Further tags it must have.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="At most so many.")
def search(text: str | None, concept: str | None, base: str | None, tags: tuple[str, ...], limit: int) -> Searched:
    """Find erasers on the Hub, by words of their name, concept, base and tags."""
    from esd_lora.sharing.catalog import search as run

    erasers = run(text, concept=concept, base=base, tags=tags, limit=limit)
    _print_table(erasers)
    return {"erasers": [HubEraser(**eraser.as_json()) for eraser in erasers]}


@click.command(cls=Verb)
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@click.option("--cache/--no-cache", default=True, help="List what was fetched from the Hub, too.")
def catalog(folders: tuple[Path, ...], cache: bool) -> Listed:
    """List the erasers below FOLDERS (default: here) and in the Hub's cache."""
    from esd_lora.sharing.catalog import catalog as run

    erasers = run(folders or (Path(),), cache=cache)
    _print_table(erasers)
    return {"erasers": [LocalEraser(**eraser.as_json()) for eraser in erasers]}


def _print_table(erasers: Sequence[catalogs.LocalEraser | catalogs.HubEraser]) -> None:
    """Print erasers, a line each in columns; control characters of a stranger's file are shown, not obeyed."""
    if not erasers:
        say("none found")
    else:
        lines = [erasers[0].COLUMNS, *(list(map(printable, eraser.row())) for eraser in erasers)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
