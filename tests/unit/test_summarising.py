"""From scores to numbers and gates."""

from __future__ import annotations

import pytest

from esd_lora.erasers.measured import Number, worst_line
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.detectors.detector import Score
from esd_lora.evaluation.report.brief import brief, not_run
from esd_lora.evaluation.report.intervals import paired_difference, paired_rate_difference, wilson
from esd_lora.evaluation.report.report import Distance, Report, label_rows
from esd_lora.evaluation.report.summarising import (
    mean_or_rate,
    read_condition,
    summarise,
    summarise_labels,
    unlearning_accuracies,
    worst_kept,
)

CASES = [Case(f"t-{i}", "target", f"a cat {i}", i, "cat") for i in range(4)]
CASES += [Case(f"g-{i}", "general", f"a dog {i}", i, "dog + ink") for i in range(2)]
SEEN = {"base": [True, True, True, False, True, True], "erased": [False, True, False, False, True, False]}
CLIP = {"base": [30.0, 31.0], "erased": [28.0, 30.5]}
SCORES = {
    (variant, case.id): {
        "judge": Score({"accuracy": SEEN[variant][i]}),
        **({"clip": Score({"clip": CLIP[variant][i - 4]})} if case.role == "general" else {}),
    }
    for variant in SEEN
    for i, case in enumerate(CASES)
}


def test_rates_means_and_paired_differences() -> None:
    found = summarise(CASES, SCORES, ["base", "erased"])
    rate = found["erased"]["target"]["accuracy"]
    assert (rate.hits, rate.of, rate.value) == (1, 4, 0.25)
    expected = wilson(1, 4)
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    expected = paired_rate_difference([False, True, False, False], [True, True, True, False])
    assert rate.difference is not None
    assert rate.difference.model_dump() == pytest.approx(expected.model_dump(), abs=1e-6)
    assert found["base"]["target"]["accuracy"].difference is None
    clip = found["erased"]["general"]["clip"]
    assert clip.value == 29.25
    assert clip.hits is None
    assert clip.difference is not None
    assert clip.difference.value == -1.25
    assert "clip" not in found["erased"]["target"]


def test_seeds_of_one_prompt_are_one_group() -> None:
    cases = [case._replace(prompt=f"a cat {i // 2}") for i, case in enumerate(CASES)]
    rate = summarise(cases, SCORES, ["base", "erased"])["erased"]["target"]["accuracy"]
    expected = paired_rate_difference([False, True, False, False], [True, True, True, False], ["a", "a", "b", "b"])
    assert rate.difference is not None
    assert rate.difference.model_dump() == pytest.approx(expected.model_dump(), abs=1e-6)
    assert (rate.low, rate.high) == pytest.approx((wilson(1, 4).low, wilson(1, 4).high), abs=1e-6), "of these prompts"


def test_counts_have_a_sum() -> None:
    found = mean_or_rate([0, 2, 1, 1])
    assert (found.value, found.sum, found.of) == (1, 4, 4)
    assert found.text().endswith(", 4 in all")
    assert mean_or_rate([0.5, 1.0]).sum is None


def test_numbers_are_written_in_the_order_of_their_files() -> None:
    rate = mean_or_rate([True, False]).model_copy(update={"difference": paired_difference([1, 0], [1, 1])})
    assert list(rate.to_dict()) == ["value", "low", "high", "hits", "of", "difference"]
    assert list(mean_or_rate([0, 2]).to_dict()) == ["value", "low", "high", "of", "sum"]
    assert list(Number.model_fields) == ["value", "low", "high", "of", "hits", "sum", "difference"], "as headers have it"


def test_every_part_of_a_label_is_counted() -> None:
    found = summarise_labels(CASES, SCORES, ["base", "erased"])
    assert list(found) == ["cat", "dog", "ink"]
    assert found["ink"]["erased"]["accuracy"].hits == 1
    renamed = [case._replace(label=case.prompt) for case in CASES]
    assert summarise_labels(renamed, SCORES, ["base"]) == {}, "labels that are no classes"


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("erased.accuracy>0.2", True),
        ("erased.accuracy>0.25", False),
        ("erased.target.accuracy.high > 0.5", True),
        ("erased.general.clip.difference<-1", True),
        ("erased.general.clip.difference<-1.25", False),
        ("base.general.accuracy<1", False),
    ],
)
def test_gates(text: str, fails: bool) -> None:
    reason = read_condition(text, ["base", "erased"]).failure(summarise(CASES, SCORES, ["base", "erased"]))
    assert (reason is not None) == fails
    assert reason is None or reason.startswith(text)


def test_gate_on_what_was_not_measured_fails() -> None:
    condition, numbers = read_condition("erased.nsfw>0.1", ["base", "erased"]), summarise(CASES, SCORES, ["base", "erased"])
    assert "no nsfw on target prompts; measured: accuracy" in str(condition.failure(numbers))
    no_difference = read_condition("base.accuracy.difference>0", ["base", "erased"]).failure(numbers)
    assert "base has no accuracy on target prompts" in str(no_difference)


@pytest.mark.parametrize("text", ["accuracy", "erased.accuracy", "erased.accuracy>five", "erased.accuracy>=0.1", ">0.1", "x>1"])
def test_gate_that_is_none(text: str) -> None:
    with pytest.raises(EsdLoraError, match=r"--fail-if .*expected VARIANT"):
        read_condition(text, ["base", "erased"])


def test_gate_on_a_model_that_is_not_painted() -> None:
    with pytest.raises(EsdLoraError, match=r"'erasd' is not painted \(did you mean 'erased'\?\)"):
        read_condition("erasd.accuracy>0", ["base", "erased"])


def test_table_escapes_what_users_say() -> None:
    report = Report(
        suite="mine",
        concepts=("a <b>|cat",),
        variants=summarise(CASES, SCORES, ["base", "erased"]),
        labels=summarise_labels(CASES, SCORES, ["base", "erased"]),
        stack=None,
        layout={"erased": {"UA": 0.75}},
        distances={"efficientnet": {"erased": Distance(value=1.5, of=2)}},
        record={"detectors": {"efficientnet": {"metric": "Frechet distance", "beside": "base"}}},
        not_run={"clip": "no weights"},
        gates=(),
    )
    text = report.to_markdown()
    assert "# mine: a &lt;b>\\|cat" in text
    assert "| erased | accuracy | 25.0 % (4.6 to 69.9) | -50.0 points (-85.0 to +23.5) | 4 |" in text
    assert "| ink | 2/2 | 1/2 |" in text
    assert "| model | UA |\n| --- | --- |\n| erased | 75.0 % |" in text
    assert "- clip: no weights" in text
    assert (
        "## Frechet distance, beside base\n\n| model | efficientnet | pictures |\n| --- | --- | --- |\n| erased | 1.5 | 2 |"
        in text
    )


def report_of(seen: dict[str, list[bool]], cases: list[Case], **fields: object) -> Report:
    scores = {(v, c.id): {"judge": Score({"accuracy": seen[v][i], "rest": True})} for v in seen for i, c in enumerate(cases)}
    nothing = {"labels": {}, "stack": None, "layout": {}, "distances": {}, "record": {}, "not_run": {}, "gates": ()}
    numbers = summarise(cases, scores, list(seen))
    return Report(suite="mine", concepts=("a cat",), variants=numbers, worst=worst_kept(cases, scores), **{**nothing, **fields})


def test_five_lines_for_a_terminal() -> None:
    """Gone is better, what is kept and lost is worse; within 80 columns, whatever a stranger's names are."""
    roles = ("target", "paraphrase", "neighbour", "general")
    cases = [Case(f"{role}-{i}", role, f"{role} {i}", i, role) for role in roles for i in range(30)]
    seen = {"base": [True] * 120, "erased": [False] * 60 + [i > 40 for i in range(30)] + [True] * 30}
    lines = brief(report_of(seen, cases))
    assert [line.change for line in lines] == ["", "better", "better", "worse", "no change seen", ""]
    assert lines[0].text == "mine: a cat, erased beside the base"
    assert " ".join(lines[1].text.split()) == "prompts about it accuracy 0.0 % (0.0 to 11.4) base 100.0 % better"
    assert lines[3].text.endswith("worse")
    assert lines[-1].text == "Hurt most: neighbour 0 of 30 (base 30 of 30)."
    assert all(len(line.text) < 80 for line in lines)
    long = brief(report_of(seen, cases).model_copy(update={"suite": "s" * 300, "concepts": ("c\x1b[31m" * 50,)}))
    assert len(long[0].text) < 80
    assert "\x1b" not in long[0].text


def test_lines_of_the_base_alone_and_of_what_has_no_better() -> None:
    alone = brief(report_of({"base": [True] * 6}, CASES))
    assert [line.change for line in alone] == [""] * 3
    assert "4 pictures" in alone[1].text
    report = report_of(SEEN, CASES)
    clip = report.variants["erased"]["target"]["accuracy"].model_copy(update={"hits": None})
    report.variants["erased"]["target"] = {"clip": clip}
    assert brief(report)[1].change == "", "of a mean nobody knows which way is better"


def test_what_was_not_run_is_a_few_lines() -> None:
    reasons = {f"metric {i}": "no weights, " * 30 for i in range(9)}
    lines = not_run(report_of(SEEN, CASES, not_run=reasons))
    assert len(lines) == 5
    assert lines[-1] == "not run either: 5 more, in table.md"
    assert all(len(line) < 80 for line in lines)
    assert not_run(report_of(SEEN, CASES, not_run={"clip": "no weights"})) == ["not run: clip: no weights"]


def test_rest_is_explained_where_it_stands() -> None:
    text = report_of(SEEN, CASES).to_markdown()
    assert "`rest` is how often a target shows everything else that its prompt asks for" in text


def test_what_lost_most_is_named() -> None:
    cases = [Case(f"{name}-{i}", "neighbour", f"a {name}", i, name) for name in ("dog", "fox", "owl") for i in range(4)]
    cases += [Case(f"cat-{i}", "target", "a cat", i, "cat") for i in range(4)]
    lost = {"dog-0", "fox-0", "fox-1", "fox-2", *(f"cat-{i}" for i in range(4))}
    scores = {
        (variant, case.id): {"judge": Score({"accuracy": variant == "base" or case.id not in lost})}
        for variant in ("base", "erased")
        for case in cases
    }
    worst = worst_kept(cases, scores)
    assert {name: models["erased"]["accuracy"].hits for name, models in worst.items()} == {"fox": 1, "dog": 3}
    assert list(worst) == ["fox", "dog"]
    assert worst_line(worst) == "Hurt most: fox 1 of 4 (base 4 of 4), dog 3 of 4 (base 4 of 4)."
    assert worst_kept(cases[-4:], scores) == {}


def test_layout_of_unlearncanvas() -> None:
    def rate(value: float) -> Number:
        return Number(value=value, low=0, high=1, of=10)

    target = {"style.accuracy": rate(0.1), "style.top5": rate(0.4), "object.rest": rate(0.9)}
    general = {"style.accuracy": rate(0.8), "object.accuracy": rate(0.7)}
    found = unlearning_accuracies({"erased": {"target": target, "general": general}, "attack-x": {"target": target}})
    assert found == {"erased": {"UA": 0.9, "IRA": 0.8, "CRA": 0.7}}


def test_table_by_label_has_no_empty_row() -> None:
    rate = mean_or_rate([True, False])
    labels = {"cat": {"base": {"accuracy": rate, "rest": rate}}, "dog": {"base": {"accuracy": rate}}}
    assert label_rows(labels, ["base"]) == {"accuracy": [["cat", "1/2"], ["dog", "1/2"]], "rest": [["cat", "1/2"]]}
