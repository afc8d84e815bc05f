"""The notebooks run from top to bottom on the built-in base, and print what is kept with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from notebooks import VARIES, notebooks, read, run, texts

RUN_BY_MAKE_TEST = ("quick_start",)
"""Notebooks that take seconds; the others run in `make test-slow`."""


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, id=file.stem, marks=() if file.stem in RUN_BY_MAKE_TEST else pytest.mark.slow) for file in notebooks()],
)
def test_notebook_prints_what_is_kept(file: Path, tmp_path: Path) -> None:
    assert texts(run(file, tmp_path)) == texts(read(file))


@pytest.mark.parametrize("file", notebooks(), ids=lambda file: file.stem)
def test_notebook_is_kept_with_its_outputs(file: Path) -> None:
    cells = [cell for cell in read(file).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert sum(map(bool, texts(read(file)))) >= 2, "there is something to compare"
    assert sum(VARIES in cell.metadata.get("tags", ()) for cell in cells) <= 2
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


def test_there_is_one_for_each_thing_one_does_first() -> None:
    assert [file.stem for file in notebooks()] == ["measuring", "quick_start", "stacking"]
