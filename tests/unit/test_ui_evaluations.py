"""Evaluations on the page: command lines, a result in a few lines, and which pairs of pictures are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from esd_lora.errors import EsdLoraError
from esd_lora.estimates.estimate import Estimate, Pace, Work
from esd_lora.evaluation.report.comparing import pair_pictures
from esd_lora.ui import evaluations
from esd_lora.ui.evaluations import (
    Size,
    chosen_pairs,
    differences,
    evaluate_command,
    is_sensitive,
    page_of,
    show_pairs,
    suites,
    summary,
    title_of,
)
from esd_lora.ui.stacks import Weighted
from evaluations import Seen, made_evaluation, made_report

EVIL = "<img src=x onerror=alert(1)>"
SHADES = (10, 11, 40, 250)
"""Grey levels of the second's pictures; those of the first are all 10."""


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    first = [Seen(f"{EVIL} {i}", i, "target" if i < 2 else "general", 10, "cat", i != 1) for i in range(4)]
    second = [picture._replace(shade=shade, accurate=True) for picture, shade in zip(first, SHADES, strict=True)]
    base = [picture._replace(shade=0) for picture in first]
    return [
        made_evaluation(tmp_path / "measured" / "one", {"base": base, "erased": first}),
        made_evaluation(tmp_path / "measured" / "other", {"erased": second}, concepts=[EVIL], record={"sampler": 1}),
    ]


def test_evaluate_command() -> None:
    command = evaluate_command(
        [Weighted("a"), Weighted("b", 0.5)], "emoji", "emoji-object", Path("out"), limit=3, prompts="p.csv"
    )
    rest = ["--base=emoji", "--suite=emoji-object", "--limit=3", "--prompts=p.csv", "--out=out"]
    assert command == ["evaluate", "a:1", "b:0.5", *rest]
    assert evaluate_command([], "emoji", "custom", Path("out"))[:2] == ["evaluate", "--base=emoji"]
    with pytest.raises(EsdLoraError, match="choose a base"):
        evaluate_command([], "", "custom", Path("out"))
    with pytest.raises(EsdLoraError, match="choose a suite"):
        evaluate_command([], "emoji", "", Path("out"))


def test_size_is_a_sentence() -> None:
    work = Work(pictures=1200)
    estimate = Estimate(work, work, Pace(picture=0.042), 0, 3 * 2**30)
    assert Size(1200, ["base", "erased"], estimate, {}).sentence() == (
        "1,200 pictures of base and erased. About 50 seconds, beside loading the base; at most 3.0 GiB of memory."
    )


def test_every_suite_is_described() -> None:
    assert len(suites()) >= 12
    assert all(suites().values())


def test_summary_says_what_is_better_and_what_is_not_sure() -> None:
    html = summary(made_report())
    assert "<td>5.0 % (1.7 to 13.7)</td><td>100.0 %</td>" in html
    assert '<td class="good">-95.0 points (-99.0 to -86.0): better</td>' in html
    assert '<td class="soft">-1.7 points (-9.0 to +5.0): no difference that is sure</td>' in html
    assert "no weights &lt;b&gt;here&lt;/b&gt;" in html


def test_summary_of_nothing_measured() -> None:
    html = summary(made_report().model_copy(update={"variants": {}}))
    assert "nothing: no detector ran" in html
    assert "<table" not in html


def test_titles_and_pages(two: list[Path], tmp_path: Path) -> None:
    assert title_of(two[0], tmp_path).startswith("measured/one: a cat, emoji-object, 20")
    assert "<h1>Measured</h1>" in page_of(two[0])
    (two[0] / "report.html").unlink()
    (two[0] / "summary.json").write_text("{")
    assert title_of(two[0], tmp_path) == "measured/one: damaged"
    with pytest.raises(EsdLoraError, match="there is no page"):
        page_of(two[0])


def test_filters(two: list[Path]) -> None:
    pairs = pair_pictures(*two)
    assert [pair.seed for pair in chosen_pairs(pairs, "all")] == [0, 1, 2, 3]
    assert [pair.seed for pair in chosen_pairs(pairs, "all", "general")] == [2, 3]
    assert [pair.seed for pair in chosen_pairs(pairs, "judged differently")] == [1]
    shares: list[float] = []
    assert [pair.seed for pair in chosen_pairs(pairs, "painted differently", progress=shares.append)] == [3, 2]
    assert shares == [0, 0.25, 0.5, 0.75]


def test_too_many_pictures_are_not_opened(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "_MOST_OPENED", 3)
    with pytest.raises(EsdLoraError, match="4 pairs of pictures would be opened, more than 3"):
        chosen_pairs(pair_pictures(*two), "painted differently")


def test_pairs_are_shown_with_the_base_between_them(two: list[Path]) -> None:
    html = show_pairs(pair_pictures(*two)[:1], ("one", EVIL))
    assert "<img src=x" not in html
    assert [part.partition("<")[0] for part in html.split("<figcaption><b>")[1:]] == [
        "one",
        "base",
        "&lt;img src=x onerror=alert(1)&gt;",
    ]
    assert html.count('class="small"') == 3
    assert "cat; accuracy: yes" in html
    assert "seed 0, target" in html


def test_what_else_differs_is_said(two: list[Path]) -> None:
    assert differences(two[0], two[0]) == ""
    assert "another the sampler" not in differences(*two)
    assert differences(*two).startswith("These two differ in the sampler, too")


@pytest.mark.parametrize(("suite", "blurred"), [("emoji-object", False), ("nudity", True), ("somebody's own", True)])
def test_pictures_of_unknown_suites_are_blurred(suite: str, blurred: bool) -> None:
    assert is_sensitive(made_report(suite=suite)) == blurred
