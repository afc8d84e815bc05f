"""Faults of documents in plain words: nothing of pydantic's reaches a user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import core_schema

from esd_lora.erasers.header import parse_header
from esd_lora.erasers.manifests import load_eraser
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.report.report import Report
from esd_lora.evaluation.suites.suite_files import load_suite
from esd_lora.faults import _WORDS, faults_of, first_fault
from esd_lora.fleet.records import last_record
from esd_lora.fleet.requests import read_requests
from esd_lora.fleet.status import read_status
from esd_lora.recipe_files import load_recipe

FOREIGN = (
    "Input should",
    "a valid",
    "pydantic",
    "type=",
    "errors.",
    "Field required",
    "Value error",
    "permitted",
    "String should",
)
"""Words of pydantic's own messages."""
VALUES = ("1.5", "[]", "{}", "text", "-3", "null", "true", "[1, 2]", "{a: 1}", ".inf", "1e400", "''", "2026-13-45")
RECIPE = (
    *("base", "concepts", "scope", "objective", "eta", "anchor", "frames", "preserve", "avoid", "guard", "neighbours", "lora"),
    *("closed_form", "train", "lora.rank", "lora.ranks", "train.steps", "train.lr", "train.aspects", "train.x_t_from"),
    *("train.optimizer_args", "train.guidance", "train.stop_at", "nonsense", "train.nonsense"),
)
SUITE = (
    "description",
    "prompts",
    "detectors",
    "attacks",
    "distances",
    "steps",
    "guidance",
    "sensitive",
    "targets",
    "base",
    "no",
)


def plain(message: str) -> None:
    """Fail where a message holds what is not this project's own words."""
    assert not [word for word in FOREIGN if word in message], message
    assert message.count("\n") < 60


def message_of(read: Callable[[], object]) -> str | None:
    """Return what is wrong with what is read, `None` where nothing is; anything but one error is a bug."""
    try:
        read()
    except EsdLoraError as error:
        return str(error)
    return None


@pytest.mark.parametrize("place", RECIPE)
def test_recipe(tmp_path: Path, place: str) -> None:
    *parents, last = place.split(".")
    messages: list[str] = []
    for value in VALUES:
        file = tmp_path / "r.yaml"
        body = f"{last}: {value}\n" if not parents else f"{parents[0]}:\n  {last}: {value}\n"
        concepts = "" if place == "concepts" else "concepts: [cat]\n"
        file.write_text(f"extends: fast\n{concepts}{body}")
        if message := message_of(lambda file=file: load_recipe(file)):
            plain(message)
            messages.append(message)
    assert messages, "some of that is wrong everywhere"


@pytest.mark.parametrize("place", SUITE)
def test_suite(tmp_path: Path, place: str) -> None:
    for value in VALUES:
        file = tmp_path / "s.yaml"
        rest = "" if place == "prompts" else "prompts: {a: {role: general, templates: [a]}}\n"
        file.write_text(f"description: x\n{rest}" if place == "description" else f"description: x\n{rest}{place}: {value}\n")
        if message := message_of(lambda file=file: load_suite(file)):
            plain(message)


@pytest.mark.parametrize("value", VALUES)
def test_manifest(tmp_path: Path, value: str) -> None:
    for text in (
        f"stack: {value}\n",
        f"stack: [{value}]\n",
        f"stack: [{{file: a, weight: {value}}}]\n",
        f"stack: [{{no: {value}}}]\n",
    ):
        (tmp_path / "stack.yaml").write_text(text)
        message = message_of(lambda: load_eraser(tmp_path / "stack.yaml"))
        assert message
        plain(message)


@pytest.mark.parametrize("value", [1, [], {}, "x", None, True, "9" * 5000, {"a": {}}])
def test_json_documents(tmp_path: Path, value: object) -> None:
    """Headers, reports, where requests stand, records of releases: as JSON of another kind, and with another field."""
    readers: dict[str, Callable[[Path], object]] = {
        "summary.json": Report.load,
        "erasers/x/status.json": lambda _: read_status(tmp_path, "x"),
        "records/1.json": lambda _: last_record(tmp_path),
        "header": lambda file: parse_header(file.read_text(), file),
    }
    for name, read in readers.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        for document in (value, {"format": 1, "suite": value, "state": value, "number": value, "family": value}):
            file.write_text(json.dumps(document))
            if name != "records/1.json" or file.parent.name == "records":
                message = message_of(lambda read=read, file=file: read(file))
                if message:
                    plain(message.replace(str(value), ""))


@pytest.mark.parametrize("value", VALUES)
def test_requests(tmp_path: Path, value: str) -> None:
    file = tmp_path / "r.csv"
    for column in ("id", "concept", "kind", "due", "received", "private", "status", "train.steps", "eta", "guard", "lora.rank"):
        columns = {"id": "a", "concept": "cat", "kind": "object"} | {column: value}
        file.write_text(",".join(columns) + "\n" + ",".join(f'"{text}"' for text in columns.values()) + "\n")
        if message := message_of(lambda: read_requests(file)):
            plain(message)


def test_every_fault_that_is_worded_is_pydantic_s() -> None:
    """A name that pydantic has not is a typo here."""
    assert _WORDS.keys() <= {*get_args(core_schema.ErrorType)}


def test_what_has_no_words_of_its_own() -> None:
    class Model(BaseModel):
        value: bytes

    with pytest.raises(ValidationError) as raised:
        Model.model_validate({"value": 3})
    assert first_fault(raised.value) == "value: expected another kind of value"
    assert faults_of(raised.value)[0].value == 3
