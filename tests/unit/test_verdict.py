"""What a training came to, in words that people understand."""

from __future__ import annotations

import pytest

from esd_lora.calibration import in_words, outcome, verdict
from esd_lora.erasers.header import Calibration, ErasedConcept, Reading
from random_erasers import random_eraser


def reading(residual: float, worst: float, drift: float) -> Reading:
    return Reading(step=60, residual=residual, residual_worst=worst, drift=drift, drift_worst=drift, null_drift=0.0)


@pytest.mark.parametrize(
    ("measured", "anchored", "words"),
    [
        (reading(-0.5, -0.1, 0.003), False, "gone, kept prompts moved 0.3 %"),
        (reading(0.05, 0.14, 0.1), True, "gone, kept prompts moved 10.0 %"),
        (reading(0.48, 0.6, 0.1), True, "52 % gone, kept prompts moved 10.0 %"),
        (reading(1.2, 1.3, 0.0), True, "0 % gone"),  # where no prompt is kept, none has moved
        (reading(-0.1, 0.2, 0.01), False, "99 % gone, kept prompts moved 1.0 %"),  # nothing is gone before all of it is
    ],
)
def test_few_words(measured: Reading, anchored: bool, words: str) -> None:
    assert in_words(measured, anchored=anchored) == words


def test_content_training_says_so_in_a_sentence() -> None:
    text = verdict(reading(-0.5, -0.1, 0.003), anchored=False)
    assert text.startswith("gone at the guidance that pictures are sampled with (of the push towards it nothing is left")
    assert text.endswith("; kept prompts moved 0.3 %")
    assert "short" not in text


def test_training_without_kept_prompts_says_nothing_of_them() -> None:
    assert "kept" not in verdict(reading(-0.5, -0.1, 0.0), anchored=False)


def test_short_training_says_what_is_short_and_what_to_do() -> None:
    text = verdict(reading(0.41, 0.6, 0.35), anchored=True)
    assert "short: not gone (of the push towards it 41 % is left" in text
    assert "gone is up to 10 % and 20 %): train longer (-s train.steps=400)" in text
    assert "gone is up to 10 % and 20 %): give more pictures" in verdict(reading(0.41, 0.6, 0.35), anchored=True, by_words=True)
    assert "short: kept prompts moved 35.0 %, beyond 30 % they may draw something else: --guard those" in text


def test_last_line_is_of_the_last_reading() -> None:
    eraser = random_eraser({"conv": 1})
    assert outcome(eraser.header) == ""
    calibration = Calibration(
        lr=1e-3,
        etas=((0, 0.0),),
        preserve_weights=((0, 1.0),),
        evaluations=1,
        readings=(reading(1, 1, 0), reading(0.05, 0.14, 0.02)),
        ending="ended",
    )
    concept = ErasedConcept(name="a cat", pairs=(("a cat", "a dog"),), eta=0.0)
    header = eraser.header.model_copy(update={"calibrations": (calibration,), "concepts": (concept,)})
    assert outcome(header) == "gone, kept prompts moved 2.0 %", "a dog is a place to arrive at"
    beyond = concept.model_copy(update={"pairs": (("a cat in ink style", "a cat"),)})
    assert outcome(header.model_copy(update={"concepts": (beyond,)})) == "95 % gone, kept prompts moved 2.0 %"
