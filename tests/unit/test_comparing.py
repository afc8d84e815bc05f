"""Two evaluations picture by picture: which pictures belong together, which differ, and what a stranger's file may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.report.comparing import find_evaluations, painted_otherwise, pair_pictures, read_pictures
from evaluations import Seen, made_evaluation, made_report

CAT = Seen("a cat", 1, "target", 200, "dog, ink", False)
DOG = Seen("a dog", 2, "general", 100, "dog, noto", True)
PIG = Seen("a pig", 3, "general", 50, "pig, noto", True)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """The cat erased, and the dog: of what both have, one picture is the same and one is not."""
    before = [picture._replace(shade=0) for picture in (CAT, DOG)]
    cat = made_evaluation(tmp_path / "cat", {"base": before, "erased": [CAT, DOG]})
    # The same prompts have other cases here, as what counts as a target moves to the front.
    dog = [PIG, DOG._replace(role="target", shade=103, seen="cat, noto", accurate=False), CAT._replace(role="general")]
    return cat, made_evaluation(tmp_path / "dog", {"erased": dog}, concepts=["a dog"])


def test_pictures_belong_together_by_prompt_and_seed(two: tuple[Path, Path]) -> None:
    same, other = pair_pictures(*two)
    assert [(pair.prompt, pair.seed) for pair in (same, other)] == [("a cat", 1), ("a dog", 2)]
    assert (same.first.role, same.second.role) == ("target", "general")
    assert (same.second.file.parent.parent.parent.name, same.second.file.name) == ("dog", "rest-00002.png")
    assert same.base
    assert same.base.file == two[0] / "images" / "base" / "rest-00000.png"
    assert not same.judged_differently
    assert same.distance() == 0
    assert other.judged_differently
    assert other.distance() == pytest.approx(3 / 255)
    assert other.second.values == {"accuracy": False}


def test_same_seed_with_another_guidance_is_another_picture(two: tuple[Path, Path]) -> None:
    lines = [json.loads(line) for line in (two[1] / "images.jsonl").read_text().splitlines()]
    lines[1]["guidance"] = 3.0
    (two[1] / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [pair.prompt for pair in pair_pictures(*two)] == ["a cat"]


def test_yes_and_no_are_compared_where_the_same_is_expected(two: tuple[Path, Path]) -> None:
    pair = pair_pictures(*two)[0]
    named = pair.second._replace(values={"accuracy": True})
    assert not pair._replace(second=named).judged_differently  # a cat that is left here is kept there
    assert pair._replace(second=named._replace(role="target")).judged_differently
    numbers = pair.second._replace(role="target", values={"accuracy": False, "ssim": 0.5})
    assert not pair._replace(second=numbers).judged_differently  # numbers always differ
    assert not pair._replace(first=numbers, second=numbers._replace(values={"accuracy": False, "ssim": 0.6})).judged_differently


def test_nothing_in_common_is_a_sentence(tmp_path: Path) -> None:
    one, other = (made_evaluation(tmp_path / str(i), {"erased": [picture]}) for i, picture in enumerate((CAT, DOG)))
    with pytest.raises(EsdLoraError, match="no picture of the same prompt and seed: 1 and 1 pictures of 'erased'"):
        pair_pictures(one, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"case": "../../secret"}, "is no name of a picture"),
        ({"case": ""}, "is no name of a picture"),
        ({"case": 7}, "is no name of a picture"),
        ({"role": "admin"}, "there is no role 'admin'"),
        ({"seed": "1"}, "prompt, seed or guidance is none"),
        ({"scores": 7}, "has no attribute"),
        ({"scores": {"judge": {"values": {}}}}, "KeyError"),
    ],
)
def test_damaged_list_of_pictures(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = made_evaluation(tmp_path / "one", {"erased": [CAT]})
    line = json.loads((folder / "images.jsonl").read_text()) | change
    (folder / "images.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(EsdLoraError, match=rf"images\.jsonl, line 1: cannot be read \(.*{words}"):
        read_pictures(folder, "erased")


def test_variant_does_not_lead_elsewhere(tmp_path: Path) -> None:
    folder = made_evaluation(tmp_path / "one", {"erased": [CAT]})
    line = json.loads((folder / "images.jsonl").read_text()) | {"variant": ".."}
    (folder / "images.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(EsdLoraError, match="is no name of a picture"):
        read_pictures(folder, "..")


def test_pictures_that_lie_elsewhere_are_left_out(tmp_path: Path) -> None:
    folder = made_evaluation(tmp_path / "one", {"erased": [CAT, DOG]})
    (folder / "images" / "erased" / "rest-00000.png").unlink()
    assert [prompt for prompt, *_ in read_pictures(folder, "erased")] == ["a dog"]
    (folder / "images.jsonl").unlink()
    with pytest.raises(EsdLoraError, match="cannot be read"):
        read_pictures(folder, "erased")


def test_evaluations_are_found_the_latest_first(tmp_path: Path) -> None:
    import os

    for day, name in enumerate(("old", "deep/er/new", ".hidden/none")):
        folder = made_evaluation(tmp_path / name, {"erased": [CAT]})
        os.utime(folder / "summary.json", (day, day))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "evaluation.json").write_text("{}")
    assert find_evaluations(tmp_path) == [tmp_path / "deep" / "er" / "new", tmp_path / "old"]
    with pytest.raises(EsdLoraError, match="there is no folder"):
        find_evaluations(tmp_path / "nowhere")


def test_another_base_is_named() -> None:
    ours, theirs = (
        made_report(record={"base": {"id": "a"}, "sampler": 1}),
        made_report(record={"base": {"id": "b"}, "sampler": 1}),
    )
    assert painted_otherwise(ours, ours) == []
    assert painted_otherwise(ours, theirs) == ["the base"]
