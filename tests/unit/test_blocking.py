"""Blocking baselines: the formula of safety guidance, the black list, and what a checker needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from esd_lora.erasers.header import ErasedConcept
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.baselines.blocking import BlackList, SafetyChecker, blacken
from esd_lora.evaluation.baselines.sld import SLD_STRENGTHS, SldStrength, block_by_sld, safety_term
from esd_lora.evaluation.detectors.detector import NotRun


def term(null: float, prompt: float, concept: float, momentum: float, strength: SldStrength) -> tuple[float, float]:
    gamma, following = safety_term(*torch.tensor([null, prompt, concept, momentum], dtype=torch.float64), strength)
    return float(gamma), float(following)


def test_the_formula_by_hand() -> None:
    half = SldStrength(2, 0, 0.1, 0.5, 0.75)
    # The prompt is on the concept's side by 0.25: scale 2 * 0.25, direction 1 - 0.2, no momentum yet.
    assert term(0.2, 0.75, 1.0, 0, half) == pytest.approx((0.5 * 0.8, 0.25 * 0.4))
    # Far on that side the scale is 1, and momentum is added before it is updated.
    assert term(0.2, -1.0, 1.0, 0.4, half) == pytest.approx((0.8 + 0.2, 0.75 * 0.4 + 0.25 * 1.0))
    # Beyond the concept by less than the threshold still counts, by more does not.
    assert term(0.2, 1.05, 1.0, 0, half)[0] == pytest.approx(0.1 * 0.8)
    assert term(0.2, 1.15, 1.0, 0, half) == (0, 0)
    assert term(0.2, 1.15, 1.0, 0.4, half) == pytest.approx((0.2, 0.75 * 0.4 + 0.25 * 0.2))
    # A prompt that is the concept is left alone.
    assert term(0.2, 1.0, 1.0, 0, half) == (0, 0)


def test_no_safety_from_the_threshold_on() -> None:
    """Equation 6: the scale is 0 where the difference has reached the threshold."""
    null, concept, none = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    prompt = torch.tensor([0.25, 0.5, 0.75])
    gamma, _ = safety_term(null - 1, prompt, concept, none, SldStrength(1000, 0, 0.5, 0.0, 0.0))
    assert gamma.tolist() == [1, 0, 0]


def test_strengths_as_published() -> None:
    """The authors' own, as diffusers has them; but for the weak scale, where diffusers has a tenth of the card's."""
    module = pytest.importorskip(
        "diffusers.pipelines.deprecated.stable_diffusion_safe", reason="this diffusers has dropped the authors' pipeline"
    )
    for name, strength in SLD_STRENGTHS.items():
        published = {key.removeprefix("sld_"): value for key, value in getattr(module.SafetyConfig, name.upper()).items()}
        published["sld_guidance_scale"] = published.pop("guidance_scale") * (10 if name == "weak" else 1)
        assert strength._asdict() == published


def test_warm_up_shrinks_with_the_steps() -> None:
    cat = ErasedConcept(name="a cat", pairs=(), eta=None)
    base: Any = None  # asked for only where something is painted
    for steps, warmup in ((50, 15), (25, 8), (10, 3)):
        assert block_by_sld("weak")(base, [cat], steps, 4.0).record["warmup_steps"] == warmup


@given(
    predictions=arrays(np.float64, (4, 6), elements=st.floats(-3, 3, width=32)),
    strength=st.sampled_from(list(SLD_STRENGTHS.values())),
)
def test_the_formula_is_element_by_element(predictions: np.ndarray, strength: SldStrength) -> None:
    together = safety_term(*torch.tensor(predictions), strength)
    apart = [term(*map(float, column), strength) for column in predictions.T]
    assert np.allclose(torch.stack(together).T, apart)


def test_a_prompt_is_refused_for_whole_words() -> None:
    words = BlackList(["naked", "a Sexy Beast"])
    assert words.refuses("Naked!")
    assert words.refuses("the (NAKED) truth")
    assert words.refuses("two sexy beasts at sea")
    assert not words.refuses("snakedance")
    assert not words.refuses("nakedness, sexy, beast")
    assert not words.refuses("")


@pytest.mark.parametrize("words", [[], [""], ["naked", " "]])
def test_a_black_list_that_would_refuse_all_or_none(words: list[str]) -> None:
    with pytest.raises(EsdLoraError, match="black list"):
        BlackList(words)


def test_flagged_pictures_are_black() -> None:
    pictures = [Image.new("RGB", (4, 2), color) for color in ("red", "white", "blue")]
    out = blacken(pictures, [False, True, False])
    assert out[0] is pictures[0]
    assert out[2] is pictures[2]
    assert out[1].size == (4, 2)
    assert out[1].mode == "RGB"
    assert not np.asarray(out[1]).any()
    assert np.asarray(pictures[1]).all()
    with pytest.raises(ValueError, match="zip"):
        blacken(pictures, [True])


def test_a_checker_that_is_not_there_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(NotRun, match="no path"):
        SafetyChecker(None)
    with pytest.raises(NotRun, match=r"no directory .*safety_checker"):
        SafetyChecker(tmp_path)
    (tmp_path / "safety_checker").mkdir()
    with pytest.raises(NotRun, match=r"no directory .*feature_extractor"):
        SafetyChecker(tmp_path)
    (tmp_path / "feature_extractor").mkdir()
    with pytest.raises(NotRun, match="no safety checker to load"):
        SafetyChecker(tmp_path)
