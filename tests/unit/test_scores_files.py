"""Scores of an interrupted evaluation: what can be read counts, the rest is scored again or told."""

from __future__ import annotations

from pathlib import Path

import pytest

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors.detector import Score
from esd_lora.evaluation.scoring import _resume

HEAD = b'{"record": {"metric": "x"}}\n'
LINES = [
    b'{"variant": "base", "case": "%d", "values": {"x": %d}, "details": {"seen": "caf\xc3\xa9\xe2\x80\xa8"}}\n' % (i, i)
    for i in (0, 1)
]


def resumed(tmp_path: Path, content: bytes) -> dict[tuple[str, str], Score]:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    known = _resume(file, {"metric": "x"})
    assert _resume(file, {"metric": "x"}) == known
    return known


def test_file_cut_at_every_byte(tmp_path: Path) -> None:
    content = HEAD + b"".join(LINES)
    for cut in range(len(content) + 1):
        known = resumed(tmp_path, content[:cut])
        whole = sum(cut >= len(HEAD + b"".join(LINES[: i + 1])) - 1 for i in (0, 1))
        assert known == {("base", f"{i}"): Score({"x": i}, {"seen": "café\u2028"}) for i in range(whole)}


@pytest.mark.parametrize("line", [b"[]", b"{}", b'"x"', LINES[0].replace(b'{"x": 0}', b"3"), LINES[0].replace(b'"0"', b"[]")])
def test_line_that_is_no_score(tmp_path: Path, line: bytes) -> None:
    with pytest.raises(EsdLoraError, match=r"x\.jsonl is damaged: it holds what is no score"):
        resumed(tmp_path, HEAD + line + b"\n")


def test_deep_line(tmp_path: Path) -> None:
    assert resumed(tmp_path, HEAD + LINES[0] + b"[" * 100_000 + b"\n").keys() == {("base", "0")}
