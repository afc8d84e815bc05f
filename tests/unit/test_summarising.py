"""From scores to numbers and gates."""

from __future__ import annotations

import pytest

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation import tables
from esd_lora.evaluation.detectors import Score
from esd_lora.evaluation.intervals import paired_difference, wilson
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.summarising import by_label, failed, number, read_gate, summarise
from esd_lora.evaluation.tables import markdown, unlearning_accuracies

ASKED = [Asked(f"t-{i}", "target", f"a cat {i}", i, "cat") for i in range(4)]
ASKED += [Asked(f"g-{i}", "general", f"a dog {i}", i, "dog + ink") for i in range(2)]
SEEN = {"base": [True, True, True, False, True, True], "erased": [False, True, False, False, True, False]}
CLIP = {"base": [30.0, 31.0], "erased": [28.0, 30.5]}
SCORES = {
    (variant, one.case): {
        "judge": Score({"accuracy": SEEN[variant][i]}),
        **({"clip": Score({"clip": CLIP[variant][i - 4]})} if one.role == "general" else {}),
    }
    for variant in SEEN
    for i, one in enumerate(ASKED)
}


def test_rates_means_and_paired_differences() -> None:
    found = summarise(ASKED, SCORES, ["base", "erased"])
    rate = found["erased"]["target"]["accuracy"]
    assert (rate["hits"], rate["of"], rate["value"]) == (1, 4, 0.25)
    assert (rate["low"], rate["high"]) == pytest.approx(wilson(1, 4)[1:], abs=1e-6)
    expected = paired_difference([0, 1, 0, 0], [1, 1, 1, 0])
    assert rate["difference"] == pytest.approx(expected._asdict(), abs=1e-6)
    assert "difference" not in found["base"]["target"]["accuracy"]
    clip = found["erased"]["general"]["clip"]
    assert clip["value"] == 29.25
    assert "hits" not in clip
    assert clip["difference"]["value"] == -1.25
    assert "clip" not in found["erased"]["target"]


def test_counts_have_a_sum() -> None:
    found = number([0, 2, 1, 1])
    assert (found["value"], found["sum"], found["of"]) == (1, 4, 4)
    assert tables.number(found).endswith(", 4 in all")
    assert "sum" not in number([0.5, 1.0])


def test_every_part_of_a_label_is_counted() -> None:
    found = by_label(ASKED, SCORES, ["base", "erased"])
    assert list(found) == ["cat", "dog", "ink"]
    assert found["ink"]["erased"]["accuracy"]["hits"] == 1
    assert by_label([one._replace(label=one.prompt) for one in ASKED], SCORES, ["base"]) == {}, "labels that are no classes"


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
    reason = failed(read_gate(text, ["base", "erased"]), summarise(ASKED, SCORES, ["base", "erased"]))
    assert (reason is not None) == fails
    assert reason is None or reason.startswith(text)


def test_gate_on_what_was_not_measured_fails() -> None:
    gate = read_gate("erased.nsfw>0.1", ["base", "erased"])
    assert "no nsfw on target prompts; measured: accuracy" in str(failed(gate, summarise(ASKED, SCORES, ["base", "erased"])))


@pytest.mark.parametrize("text", ["accuracy", "erased.accuracy", "erased.accuracy>five", "erased.accuracy>=0.1", ">0.1", "x>1"])
def test_gate_that_is_none(text: str) -> None:
    with pytest.raises(EsdLoraError, match=r"--fail-if .*expected VARIANT"):
        read_gate(text, ["base", "erased"])


def test_gate_on_a_model_that_is_not_painted() -> None:
    with pytest.raises(EsdLoraError, match=r"'erasd' is not painted \(did you mean 'erased'\?\)"):
        read_gate("erasd.accuracy>0", ["base", "erased"])


def test_table_escapes_what_users_say() -> None:
    summary = {
        "suite": "mine",
        "concepts": ["a <b>|cat"],
        "variants": summarise(ASKED, SCORES, ["base", "erased"]),
        "labels": by_label(ASKED, SCORES, ["base", "erased"]),
        "stack": {},
        "layout": {"erased": {"UA": 0.75}},
        "distances": {"efficientnet": {"erased": {"value": 1.5, "of": 2}}},
        "record": {"detectors": {"efficientnet": {"metric": "Frechet distance", "beside": "base"}}},
        "not_run": {"clip": "no weights"},
    }
    text = markdown(summary)
    assert "# mine: a &lt;b>\\|cat" in text
    assert "| erased | accuracy | 25.0 % (4.6 to 69.9) | -50.0 points (-100.0 to +0.0) | 4 |" in text
    assert "| ink | 2/2 | 1/2 |" in text
    assert "| model | UA |\n| --- | --- |\n| erased | 75.0 % |" in text
    assert "- clip: no weights" in text
    assert (
        "## Frechet distance, beside base\n\n| model | efficientnet | pictures |\n| --- | --- | --- |\n| erased | 1.5 | 2 |"
        in text
    )


def test_layout_of_unlearncanvas() -> None:
    def rate(value: float) -> dict[str, float]:
        return {"value": value}

    target = {"style.accuracy": rate(0.1), "style.top5": rate(0.4), "object.rest": rate(0.9)}
    general = {"style.accuracy": rate(0.8), "object.accuracy": rate(0.7)}
    found = unlearning_accuracies({"erased": {"target": target, "general": general}, "attack-x": {"target": target}})
    assert found == {"erased": {"UA": 0.9, "IRA": 0.8, "CRA": 0.7}}
