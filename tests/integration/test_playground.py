"""The learned bases of playground/: they load like any directory, and draw what they are asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.evaluation.cases import fill_template
from esd_lora.evaluation.detectors.judge import Judge
from esd_lora.pictures import paint
from esd_lora.training import train
from tiny import tiny_recipe

PLAYGROUND = Path(__file__).parents[2] / "playground"
BASES = {"emoji-xl": ("sdxl", "v_prediction", 384), "emoji-flow": ("sd3", "flow", 384)}


@pytest.mark.parametrize("name", BASES)
def test_a_learned_base_draws_what_it_is_asked_for(name: str) -> None:
    base, known = load_base(PLAYGROUND / name), domain("emoji")
    width = base.encode(["a cat"])["prompt_embeds"].shape[-1]
    assert (base.family.name, base.prediction_type, width) == BASES[name]
    names = known["objects"][::4]
    prompts = [fill_template("{a} in noto style", name) for name in names]
    verdicts = Judge("emoji")(paint(base, prompts, range(len(prompts)), steps=20, guidance=4.0))
    assert sum(verdict.object == name for verdict, name in zip(verdicts, names, strict=True)) >= 9
    assert sum(verdict.style == "noto" for verdict in verdicts) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_a_learned_base_is_trained_on(name: str) -> None:
    base = dataclasses.replace(load_base(PLAYGROUND / name), keep=tuple(domain("emoji")["keep"]))
    measured = tiny_recipe(base.id, preserve="default", lr="auto", eta="auto", probe_every=2)
    header = train(measured, base=base, progress=False).header
    assert header.family == BASES[name][0]
    assert len(header.preserve) == 2
    assert [reading.step for reading in header.calibrations[0].readings] == [2, 4]
    assert header.calibrations[0].readings[0].residual < 1
