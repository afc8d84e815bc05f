"""Every command of README and docs runs as it is printed, in order, in one empty directory; what does not is counted here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from documentation import PROJECT, RUN, SHOWN, blocks, commands, is_operator, name_of, pages, run_blocks, unfenced, words_of
from esd_lora.cli import main
from esd_lora.errors import EsdLoraError

NOT_RUN: dict[str, dict[str, int]] = {
    "README.md": {"needs the network": 1, "needs the weights of a published model": 2},
    "docs/choosing.md": {"a benchmark, which takes minutes to hours": 1, "needs pictures of one's own": 1},
    "docs/comfyui.md": {"needs ComfyUI": 2},
    "docs/configuration.md": {"is for the start-up files of a shell": 1},
    "docs/evaluation.md": {"needs the weights of a published model": 1, "a benchmark, which takes minutes to hours": 2},
    "docs/files.md": {"needs the weights of a published model": 2},
    "docs/fleet.md": {"needs a cluster": 1},
    "docs/install.md": {"needs the network": 5},
    "docs/ranks.md": {"needs the weights of a published model": 1},
    "docs/roles/hobbyist.md": {"needs the weights of a published model": 2, "needs the Hub": 1},
    "docs/sharing.md": {"needs the Hub": 2},
    "docs/stacking.md": {"a benchmark, which takes minutes to hours": 3},
    "docs/training.md": {"needs the weights of a published model": 1},
    "docs/troubleshooting.md": {"needs the weights of a published model": 1},
    "docs/ui.md": {"opens a page until it is ended": 2},
    "docs/your-model.md": {"needs the weights of a published model": 1},
}
"""Page to why blocks of it are not run, and how many: one that is left out by mistake, or without need, changes a count."""
RUN_BY_MAKE_TEST = ("README.md",)
"""Pages whose commands take seconds; those of the others run in `make test-slow`."""


def run_pages() -> list[str]:
    """Return the pages with something to run."""
    return [name_of(page) for page in pages() if any(each.language in RUN and not each.reason for each in blocks(page))]


@pytest.mark.parametrize(
    "page", [pytest.param(name, marks=() if name in RUN_BY_MAKE_TEST else pytest.mark.slow) for name in run_pages()]
)
def test_commands_run_as_they_are_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_blocks(PROJECT / page, tmp_path)


def test_what_is_not_run_is_counted() -> None:
    counted = {name_of(page): Counter(block.reason for block in blocks(page) if block.reason) for page in pages()}
    assert {page: dict(reasons) for page, reasons in counted.items() if reasons} == NOT_RUN


def fault_of(words: Sequence[str]) -> str:
    """Return what click says of the arguments of a command line of ours; nothing where they are as they should be."""
    command: click.Command | None = main
    context = click.Context(main)
    arguments = list(words)
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(context, arguments)
        context = click.Context(command or main, info_name=name, parent=context)
    try:
        command.make_context(context.info_name, arguments, parent=context.parent) if command else None
    except (click.UsageError, EsdLoraError) as error:
        return error.message if isinstance(error, click.UsageError) else str(error)
    return ""


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_commands_have_the_options_that_they_are_given(page: Path) -> None:
    """Those that are not run, too."""
    for block in blocks(page):
        for command in commands(block.text) if block.language == "sh" else ():
            words = words_of(command)
            end = next((place for place, word in enumerate(words) if is_operator(word)), len(words))
            if words[0] == "esd-lora" and not words[1].startswith("-"):
                fault = fault_of(words[1:end])
                assert not fault or "does not exist" in fault, f"{block.page}:{block.line}: {command}: {fault}"


def test_an_option_that_there_is_not_is_seen() -> None:
    assert fault_of(["requests", "list", "-r", "registry"]) == ""
    assert "--registri" in fault_of(["requests", "list", "--registri", "registry"])
    assert "--lora" in fault_of(["generate", "a cat", "--lora", "no-cat", "-o", "pictures"])


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    """A command in a block without a language, or in an indented one, would be run by nobody."""
    assert [block for block in blocks(page) if block.language not in (*RUN, *SHOWN)] == []
    assert [block for block in blocks(page) if block.reason and block.language not in RUN] == []
    assert re.findall(r"^ +(?:esd-lora|python|pip|make|[A-Z_]+=\S+ python) .*", unfenced(page), re.MULTILINE) == []
    assert "```" not in re.sub(r"````", "", unfenced(page))


def test_readme_can_be_read_in_one_go() -> None:
    assert len((PROJECT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_nothing_is_installed_from_where_it_is_not() -> None:
    """The package is on no registry: `pip install esd-lora` fetches what others put there under its name, or nothing."""
    wanted = [PROJECT / "README.md", PROJECT / "SECURITY.md", PROJECT / "CONTRIBUTING.md"]
    for folder, endings in (("docs", ("md", "ipynb")), ("esd_lora", ("py", "md", "html")), ("hub_upload", ("py", "md"))):
        wanted += [path for ending in endings for path in (PROJECT / folder).rglob(f"*.{ending}")]
    pattern = re.compile(r"pip install [^\n`]*(?<!/)\besd[-_]lora(?:\[\w+\])?['\"]?(?! @)(?:[\s`'\").]|$)")
    assert [name_of(path) for path in wanted if pattern.search(path.read_text("utf-8"))] == []
    assert not re.search(
        r"nstall.*esd-lora\[", "\n".join(path.read_text("utf-8") for path in (PROJECT / "esd_lora").rglob("*.py"))
    )
    assert pattern.search("`pip install esd-lora`")
    assert pattern.search("pip install 'esd-lora[ray]'.")
    assert not pattern.search('pip install "esd-lora @ git+https://example.org/x"')


def test_commands_are_taken_apart_as_a_shell_would() -> None:
    text = "# only words\nesd-lora a \\\n    --b c   # why\n\ncat > file <<'END'\nesd-lora d\nEND\nesd-lora e"
    assert list(commands(text)) == ["esd-lora a --b c   # why", "cat > file <<'END'\nesd-lora d\nEND", "esd-lora e"]


def test_a_command_that_fails_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        "esd-lora recipes check no-such-recipe",
        "false | true",
        "python -c 1/0",
        "esd-lora recipes list > /no/such",
    ):
        page = tmp_path / "page.md"
        page.write_text(f"Words.\n\n```sh\nmkdir folder\n{command}\n```\n", "utf-8")
        with pytest.raises(AssertionError):
            run_blocks(page, tmp_path)
        (tmp_path / "folder").rmdir()
