"""A hook of mkdocs: the page of the command line, made from click's own records when the site is built."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import click

from esd_lora.cli import main

PAGE = "cli.md"
_AS_IT_STANDS = "\b\n"
"""What click takes for the beginning of a paragraph that is not to be wrapped; here those are examples."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of a page, with every command below that of the command line's."""
    return markdown + "\n".join(reference(main)) if page.file.src_uri == PAGE else markdown


def reference(command: click.Command, parent: click.Context | None = None) -> Iterator[str]:
    """Yield a command and those below it as lines of Markdown: a heading, the usage, what it does, arguments and options."""
    name = command.name if parent else "esd-lora"
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    usage = command.get_usage(context).partition(": ")[2].split()
    yield from ("", f"## {context.command_path}", "", "```text", " ".join(usage), "```", "")
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith(_AS_IT_STANDS):
            yield from ("```sh", paragraph.removeprefix(_AS_IT_STANDS), "```", "")
        else:
            yield from (_plain(" ".join(paragraph.split())), "")
    records = [record for option in command.get_params(context) if (record := option.get_help_record(context))]
    yield from ("| option | what it says |", "|---|---|")
    for declaration, text in records:
        yield f"| `{declaration}` | {_plain(text)} |"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from reference(command.commands[name], context)


def _plain(text: str) -> str:
    """Return text as Markdown shows it to the letter."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text
