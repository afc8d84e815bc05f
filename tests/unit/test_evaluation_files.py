"""Files of evaluations that a stranger wrote or damaged: each fault is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.tensor_files import Header, hash_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import Case, read_cases
from esd_lora.evaluation.evaluating import _differences
from esd_lora.evaluation.report.attaching import attach
from esd_lora.evaluation.report.report import Report
from esd_lora.weights.streaming import MERGED_KEY, merged_before
from random_erasers import random_eraser

EMPTY: dict[str, Any] = {name: {} for name in ("variants", "labels", "layout", "distances", "not_run", "record", "stack")}
EMPTY |= {"suite": "x", "concepts": [], "gates": []}
FID = {"fid": {"erased": {"value": 1.5, "of": 3}}}


def saved(folder: Path, **values: Any) -> Path:
    (folder / "summary.json").write_text(json.dumps(EMPTY | values))
    return folder


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"distances": FID}, "does not say what the distance fid is measured by"),
        ({"distances": FID, "record": {"detectors": 7}}, "does not say"),
        ({"distances": FID, "record": {"detectors": {"fid": {"metric": "x"}}}}, "does not say"),
        ({"layout": {"a": {"x": 0.5}, "b": {"y": 0.5}}}, "different columns"),
        ({"variants": [[]]}, "expected a mapping of names"),
    ],
)
def test_report_that_is_not_whole(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(EsdLoraError, match=rf"no report can be read from .*{words}"):
        Report.load(saved(tmp_path, **values))


def test_report_that_is_whole(tmp_path: Path) -> None:
    record = {"detectors": {"fid": {"metric": "FID", "beside": "base"}}}
    layout = {"a": {"x": 0.5, "y": 0.1}, "b": {"y": 0.5, "x": 0.2}}
    assert "| 1.5 |" in Report.load(saved(tmp_path, distances=FID, record=record, layout=layout)).to_markdown()


@pytest.mark.parametrize("text", ["[" * 100_000, "\ud83d", "{", "[]"])
def test_damaged_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(EsdLoraError, match="no report can be read from"):
        Report.load(tmp_path)


def test_report_without_end(tmp_path: Path) -> None:
    with (tmp_path / "summary.json").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(EsdLoraError, match=r"summary\.json has more than 16,777,216 bytes"):
        Report.load(tmp_path)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return random_eraser({"conv": 1}, "a cat", dtype=torch.float32).save(tmp_path / "mine")


@pytest.mark.parametrize(
    "record",
    [
        {"variants": 7},
        {"variants": {"erased": []}},
        {"variants": {"erased": {"erasers": 7}}},
        {"variants": {"erased": {"erasers": [7]}}},
        {"variants": {"erased": {"erasers": [{}, {}]}}},
        {"variants": {"erased": {"erasers": [{"sha256": "HASH"}]}}},
    ],
)
def test_record_of_another_shape_is_not_attached(mine: Path, tmp_path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record).replace("HASH", hash_tensors(Eraser.load(mine).state_dict()))
    with pytest.raises(EsdLoraError, match="these numbers are not of"):
        attach(mine, saved(tmp_path, record=json.loads(text)))


@pytest.mark.parametrize("weight", [7, "x", None, []])
def test_strength_of_another_shape_is_not_attached(mine: Path, tmp_path: Path, weight: object) -> None:
    member = {"sha256": hash_tensors(Eraser.load(mine).state_dict()), "weight": weight, "blocks": {}}
    with pytest.raises(EsdLoraError, match="at another strength"):
        attach(mine, saved(tmp_path, record={"variants": {"erased": {"erasers": [member]}}}))


CASE = Case("a-1", "target", "a cat", 3).to_dict()


@pytest.mark.parametrize(
    "line",
    [
        *(json.dumps(value).encode() for value in (7, None, [], {}, "x", {**CASE, "role": "x"}, {**CASE, "role": []})),
        *(json.dumps({**CASE, "case": name}).encode() for name in ("../../x", "/etc/passwd", "a/b", 7, None, "x" * 300)),
        *(json.dumps({**CASE, "prompt": prompt}).encode() for prompt in (7, None, {})),
        *(b"{", b"[" * 100_000, b"\xff", b" " * (2**20 + 1)),
    ],
)
def test_damaged_cases(mine: Path, tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_bytes(json.dumps(CASE).encode() + b"\n" + line + b"\n")
    where = 1 if line == b"\xff" else 2  # it is no text at all then
    with pytest.raises(EsdLoraError, match=rf"cases\.jsonl, line {where}: damaged .* Expected what an evaluation wrote"):
        read_cases(file)
    member = {"sha256": hash_tensors(Eraser.load(mine).state_dict()), "weight": 1.0, "blocks": {}}
    with pytest.raises(EsdLoraError, match=rf"cases\.jsonl, line {where}: damaged"):
        attach(mine, saved(tmp_path, record={"variants": {"erased": {"erasers": [member]}}}), pictures=tmp_path)


def test_no_cases(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match=r"cases\.jsonl, line 1: damaged \(FileNotFoundError"):
        read_cases(tmp_path / "cases.jsonl")


def test_cases_without_end(tmp_path: Path) -> None:
    with (tmp_path / "cases.jsonl").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(EsdLoraError, match="has more than 67,108,864 bytes"):
        read_cases(tmp_path / "cases.jsonl")


def test_cases_come_back(tmp_path: Path) -> None:
    cases = [Case("a-1", "target", "two\u2028lines", 2**63), Case("ä b-2", "general", "", 0)]
    text = "".join(json.dumps(case.to_dict(), ensure_ascii=False) + "\n" for case in cases)
    (tmp_path / "cases.jsonl").write_text(text, "utf-8")
    assert read_cases(tmp_path / "cases.jsonl") == cases


@pytest.mark.parametrize("content", [b"[]", b"7", b"[" * 100_000, b"\xff", b"{"])
def test_damaged_record_of_an_evaluation(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "evaluation.json"
    file.write_bytes(content)
    with pytest.raises(EsdLoraError, match=r"evaluation\.json is damaged .* Choose another output, or add --force") as caught:
        _differences(file, {"suite": "x"}, tolerant=False)
    assert "\n" not in str(caught.value)
    assert _differences(file, {"suite": "x"}, tolerant=True) == ["suite"]


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "{}", "7"])
def test_what_was_merged_before_is_nothing_where_it_is_damaged(text: str) -> None:
    assert merged_before(Header({}, {MERGED_KEY: text}, 0)) == []
