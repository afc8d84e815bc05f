"""Write docs/json.md: what every command prints with `--json`, from the types of their results in `esd_lora/cli/results.py`.

python benchmarks/json_page.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import click
from pydantic import TypeAdapter

from esd_lora.cli import main as esd_lora
from esd_lora.cli.commands import Verb
from esd_lora.cli.results import Error

PAGE = Path(__file__).parents[1] / "docs" / "json.md"
HEAD = """# Results as JSON

With `--json` a command prints its result as exactly one JSON object on standard output, and exits with 0. Warnings and bars go
to standard error; `--quiet` leaves them out, too. Numbers that JSON does not have (infinity, not a number) are null.

Where something fails, the object has one field, `error`, and the exit code is 1:

    {"error": "no eraser at no-cat: expected a directory with pytorch_lora_weights.safetensors, or a .safetensors file."}

`doctor` where it found a problem, and `requests overdue --fail` where a request is overdue, print their result and exit with 1.
Several ranks (`torchrun`) print one object together.

This page is written by `python benchmarks/json_page.py` from the types in `esd_lora/cli/results.py`, and tests hold what
commands print against them. A field is always there; fields may be added to a result, and none of them changes its meaning.
"""


def commands(group: click.Group = esd_lora, above: str = "") -> Iterator[tuple[str, Verb]]:
    """Yield name and command of all that return a result, in the order of the help."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{above}{name} ")
        elif isinstance(command, Verb):
            yield above + name, command


def schema_of(command: click.Command) -> dict[str, Any]:
    """Return the JSON schema of what a command prints, from what its function is said to return."""
    function: Any = inspect.unwrap(command.callback) if command.callback else None
    returned = SimpleNamespace(__annotations__={"return": function.__annotations__["return"].removesuffix(" | None")})
    return TypeAdapter(get_type_hints(returned, function.__globals__)["return"]).json_schema()


def page() -> str:
    """Return the text of the page."""
    parts = [HEAD]
    described: dict[str, dict[str, Any]] = {"Error": TypeAdapter(Error).json_schema()}
    for name, command in commands():
        schema = schema_of(command)
        described |= schema.get("$defs", {})
        whole = [part["$ref"].rpartition("/")[2] for part in schema.get("anyOf", [])]
        if not whole and "properties" in schema:
            described[schema["title"]] = {key: value for key, value in schema.items() if key != "$defs"}
            whole = [schema["title"]]
        shown = " or, with `--dry-run`, ".join(map(_link, whole)) or "The schema itself."
        parts.append(f"## esd-lora {name}\n\n{shown}\n")
    for title, schema in sorted(described.items()):
        rows = [f"| `{field}` | {_kind(part)} | {part['description']} |" for field, part in schema["properties"].items()]
        table = "\n".join(["| field | type | meaning |", "| --- | --- | --- |", *rows])
        parts.append(f"## {title}\n\n{schema['description']}\n\n{table}\n")
    return "\n".join(parts)


def _link(title: str) -> str:
    return f"[{title}](#{title.lower()})"


def _kind(part: Mapping[str, Any]) -> str:
    """Return the type of a field in words."""
    if "$ref" in part:
        return _link(part["$ref"].rpartition("/")[2])
    if "anyOf" in part:
        return " or ".join(map(_kind, part["anyOf"]))
    if "enum" in part:
        return " or ".join(f"`{value}`" for value in part["enum"])
    if part.get("type") == "array":
        return f"list of {_kind(part['items'])}" if part.get("items") else "list"
    if part.get("type") == "object":
        inner = part.get("additionalProperties")
        return f"object, each {_kind(inner)}" if isinstance(inner, Mapping) else "object"
    return part.get("type", "any")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(PAGE)
