"""Negative prompts, sizes and schedulers of pictures: every family that can paints by them, and one that cannot says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from PIL.Image import Image

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.bases.schedulers import SCHEDULERS, make_scheduler, scheduler_name, schedulers_for
from esd_lora.errors import EsdLoraError
from esd_lora.pictures import grid, paint
from esd_lora.sampling import generate
from toys import TOYS, load_toy, save_toy

GUIDED = [name for name in TOYS if not name.startswith("flux")]
"""Toys of models that are guided against a prompt."""


@pytest.fixture(scope="module", params=TOYS)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved toy pipeline. Tests only read it."""
    return save_toy(request.param, tmp_path_factory.mktemp("toys") / request.param)


def pixels(picture: Image) -> np.ndarray:
    return np.asarray(picture, dtype=float)


def own_call(base: Base, **kwargs: object) -> np.ndarray:
    """A picture by the pipeline itself."""
    width, height = base.picture_size()
    guidance = base.family.guidance_kwargs(5.0, 1)
    options = {
        "height": height,
        "width": width,
        **base.family.call_kwargs(base.pipe),
        **guidance,
        **kwargs,
        "output_type": "pil",
    }
    generator = torch.Generator().manual_seed(3)
    painted = base.pipe(prompt=["a cat"], num_inference_steps=3, generator=[generator], return_dict=False, **options)[0][0]
    return pixels(painted[0] if base.family.frames_per_latent else painted)


def test_pictures_are_the_pipeline_s_own(toy: Path) -> None:
    """By negative prompt and size as the pipeline paints them, with its text encoders there and once they are gone."""
    base = load_toy(toy)
    width, height = base.picture_size()
    sizes = {"width": width * 2, "height": height}
    options = {"steps": 3, "guidance": 5.0, "width": width * 2}
    expected = {"plain": own_call(base), "wide": own_call(base, **sizes)}
    (plain,) = paint(base, ["a cat"], [3], steps=3, guidance=5.0)
    painted = {"plain": plain, "wide": paint(base, ["a cat"], [3], **options)[0]}
    takes_negative = base.family.takes_negative_prompt(base.pipe)
    assert takes_negative == (toy.name in GUIDED)
    if takes_negative:
        expected["negative"] = own_call(base, negative_prompt=["a dog, blurry"], **sizes)
        options["negative_prompt"] = "a dog, blurry"
        painted["negative"] = paint(base, ["a cat"], [3], **options)[0]
    assert painted["wide"].size == (width * 2, height)
    for name, picture in painted.items():
        assert np.array_equal(pixels(picture), expected[name]), name
    if takes_negative:
        assert not np.array_equal(expected["negative"], expected["wide"])
        waiting = load_toy(toy, text_first=True)
        (later,) = generate(waiting, ["a cat"], seeds=[3], **options)
        assert waiting.pipe.text_encoder is None
        assert np.abs(pixels(later) - expected["negative"]).max() <= 1, "the pipeline was handed what it would have encoded"


def test_base_without_negative_prompts_says_so(toy: Path) -> None:
    base = load_toy(toy)
    if base.family.takes_negative_prompt(base.pipe):
        least = base.family.unguided
        with pytest.raises(EsdLoraError, match=rf"guidance {least:g} is against no prompt, .* guide by more than {least:g}\."):
            paint(base, ["a cat"], [0], guidance=least, negative_prompt="a dog")
    else:
        with pytest.raises(EsdLoraError, match=r"takes no negative prompt: its guidance is distilled into it"):
            paint(base, ["a cat"], [0], negative_prompt="a dog")


def test_sides_that_a_base_does_not_draw(toy: Path) -> None:
    base = load_toy(toy)
    multiple = base.family.pixels_per_latent(base.pipe) * base.family.multiple
    with pytest.raises(
        EsdLoraError, match=f"width {multiple + 1}: .* draws multiples of {multiple} pixels. Take {multiple} or"
    ):
        paint(base, ["a cat"], [0], width=multiple + 1)
    if toy.name.startswith("sd3"):
        most = base.family.largest_side(base.pipe) * base.pipe.vae_scale_factor
        assert paint(base, ["a cat"], [0], steps=2, height=most)[0].height == most
        with pytest.raises(EsdLoraError, match=f"draws up to {most} pixels"):
            paint(base, ["a cat"], [0], height=most + multiple)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # which numpy tells diffusers' schedulers
def test_schedulers_keep_what_the_base_was_trained_with(toy: Path) -> None:
    base = load_toy(toy)
    own = base.pipe.scheduler
    if base.family.needs_own_scheduler(base.pipe):
        assert toy.name in ("flux-schnell", "lumina2", "qwen-image", "z-image")
        with pytest.raises(EsdLoraError, match="is painted by its own scheduler alone: leave UniPCMultistep out"):
            paint(base, ["a cat"], [0], scheduler="UniPCMultistep")
        return
    for name in set(SCHEDULERS) - {*schedulers_for(base.prediction_type)}:
        with pytest.raises(EsdLoraError, match=f"scheduler {name} is none for a base that predicts "):
            paint(base, ["a cat"], [0], scheduler=name)
    for name in schedulers_for(base.prediction_type):
        other = make_scheduler(name, own, base.prediction_type)
        with base.scheduled_by(name):
            assert base.prediction_type == base.family.prediction_type(base.pipe)
        for field in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
            if field in own.config and field in other.config:
                assert other.config[field] == own.config[field], field
        (picture,) = paint(base, ["a cat"], [0], steps=4, guidance=3.0, scheduler=name)
        assert np.isfinite(pixels(picture)).all()
    assert base.pipe.scheduler is own


def test_own_scheduler_by_name_paints_the_same(tiny_dir: Path) -> None:
    base = load_base(tiny_dir, device="cpu")
    name = type(base.pipe.scheduler).__name__
    plain, named, other = (paint(base, ["a cat"], [0], steps=4, scheduler=which)[0] for which in (None, name, "Euler"))
    assert np.array_equal(pixels(plain), pixels(named))
    assert not np.array_equal(pixels(plain), pixels(other))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("ddim", "DDIM"), ("Euler", "EulerDiscrete"), ("EulerDiscreteScheduler", "EulerDiscrete"), ("unipc", "UniPCMultistep")],
)
def test_names_of_schedulers(name: str, meant: str) -> None:
    assert scheduler_name(name) == meant


def test_name_of_no_scheduler() -> None:
    with pytest.raises(EsdLoraError, match=r"unknown scheduler 'DDIMM' \(did you mean 'DDIM'\?\)\. Known: DDIM, DDPM"):
        scheduler_name("DDIMM")


def test_wide_pictures_keep_their_shape_on_a_sheet() -> None:
    sheet = grid({"a": [PIL.Image.new("RGB", (64, 32), "black")]}, ["x"], tile=128)
    dark = np.asarray(sheet).sum(2) == 0
    rows, columns = np.flatnonzero(dark.sum(1) > 100), np.flatnonzero(dark.sum(0) > 50)
    assert (len(rows), len(columns)) == (64, 128)
