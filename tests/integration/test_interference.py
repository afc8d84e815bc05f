"""The interference report: overlaps by hand, effects on a base, and a picture of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.stacking import Strength
from esd_lora.errors import EsdLoraError
from esd_lora.files import write_files
from esd_lora.fusing.interference import REPORT_FILES, measure_interference
from random_erasers import build_header


def one_layer(down: list[list[float]], up: list[list[float]], name: str = "a cat", module: str = "x") -> Eraser:
    return Eraser({module: LoraPair(torch.tensor(down), torch.tensor(up))}, build_header(name))


E1, E2, E3 = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
COLUMN = [[1.0], [0.0]]


@pytest.mark.parametrize(
    ("other", "reads", "writes", "cosine"),
    [
        (one_layer([E1], COLUMN), 1, 1, 1),
        (one_layer([[-3.0, 0, 0]], COLUMN), 1, 1, -1),
        (one_layer([E2], COLUMN), 0, 1, 0),
        (one_layer([[1.0, 1.0, 0.0]], COLUMN), 0.5, 1, 2**-0.5),
        (one_layer([E1], [[0.0], [2.0]]), 1, 0, 0),
        (one_layer([E1, E3], [[1.0, 0.0], [0.0, 1.0]]), 1, 1, 2**-0.5),
        (one_layer([E1, E1], [[0.5, 0.5], [0.0, 0.0]]), 1, 1, 1),
        (one_layer([E1], COLUMN, module="y"), 0, 0, 0),
    ],
    ids=[
        "same",
        "opposite",
        "other inputs",
        "half",
        "other outputs",
        "inside a larger one",
        "rank given twice",
        "other layers",
    ],
)
def test_overlaps_by_hand(other: Eraser, reads: float, writes: float, cosine: float) -> None:
    report = measure_interference([one_layer([E1], COLUMN), other])
    for matrix, expected in ((report.reads, reads), (report.writes, writes), (report.cosine, cosine)):
        assert matrix[0][1] == pytest.approx(expected, abs=1e-6)
        assert matrix[1][0] == pytest.approx(expected, abs=1e-6)
        assert matrix[0][0] == pytest.approx(1)
    assert report.shared == [[1, int("x" in other.pairs)], [int("x" in other.pairs), 1]]
    assert report.effect is None


def test_layers_count_by_their_norms() -> None:
    a = Eraser({**one_layer([E1], COLUMN).pairs, **one_layer([E1], [[3.0], [0.0]], module="y").pairs}, build_header())
    b = Eraser({**one_layer([E1], COLUMN).pairs, **one_layer([E2], [[3.0], [0.0]], module="y").pairs}, build_header())
    assert measure_interference([a, b]).reads[0][1] == pytest.approx(1 / (1 + 9))


def test_effects_on_a_base(base: Base, cat: Eraser, car: Eraser, tmp_path: Path) -> None:
    report = measure_interference([cat, car], base=base)
    assert report.effect is not None
    assert report.together is not None
    assert [report.effect[i][i] for i in range(2)] == pytest.approx([1, 1])
    assert all(value > 0.01 for value in (report.effect[0][1], report.effect[1][0], *report.together))
    write_files(tmp_path, report.files())
    assert {path.name for path in tmp_path.iterdir()} == set(REPORT_FILES)
    written = json.loads((tmp_path / REPORT_FILES[0]).read_text())
    assert written["names"] == ["a cat", "a car"]
    assert written["company"] == report.together
    with Image.open(tmp_path / REPORT_FILES[1]) as picture:
        assert picture.width > 600
        assert len(picture.getcolors(100_000) or []) > 8
    text = "\n".join(report.lines())
    assert "a cat" in text
    assert f"{report.together[0]:.1%}" in text


def test_member_of_strength_0_disturbs_nobody(base: Base, cat: Eraser, car: Eraser) -> None:
    report = measure_interference([cat, car], [1.0, 0.0], base=base)
    assert report.together is not None
    assert report.effect is not None
    assert report.together[0] == 0
    assert report.effect[0][1] == 0


def test_own_twin_disturbs_as_much_again(base: Base, cat: Eraser) -> None:
    """Twice the small update moves predictions nearly twice as far."""
    small = Strength(0.01)
    report = measure_interference([cat, cat], [small, small], base=base)
    assert report.together == pytest.approx([1, 1], abs=0.1)


def test_weights_and_names(cat: Eraser, car: Eraser) -> None:
    report = measure_interference([cat, car], [1.0, -2.0], names=["one", "two"])
    plain = measure_interference([cat, car])
    assert report.names == ["one", "two"]
    assert report.cosine[0][1] == pytest.approx(-plain.cosine[0][1], abs=1e-6)


def test_members_of_different_kinds(cat: Eraser, car: Eraser) -> None:
    other = Eraser(car.pairs, car.header.model_copy(update={"family": "sdxl"}))
    with pytest.raises(EsdLoraError, match="cannot stack"):
        measure_interference([cat, other])
