"""Memory plans: published models fit the cards they are said to fit, and a training takes the setting that is chosen."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.bases.outlines import PUBLISHED, outline_base, outline_published
from esd_lora.cli import main
from esd_lora.doctor import examine
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.preparing import prepare_evaluation
from esd_lora.memory import counting
from esd_lora.memory_plans import GIB, IN_TURN, Setting, fit, fit_recipe, free_memory, plans, read_size
from esd_lora.pictures import paint
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe
from esd_lora.sampling import generate
from esd_lora.training import train
from original_checkpoints import save_checkpoint
from tiny import tiny_pipeline, tiny_recipe

PARAMETERS = {
    "SD 1.5": {"unet": 859_520_964, "text_encoder": 123_060_480},
    "SDXL": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "SD 3.5 medium": {"transformer": 2_243_171_520, "text_encoder_3": 4_762_310_656},
    "Flux.1 dev": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656},
    "PixArt-Sigma": {"transformer": 610_856_096, "text_encoder": 4_762_310_656},
    "Lumina 2": {"transformer": 2_609_769_152, "text_encoder": 2_614_341_888},
    "Qwen-Image": {"transformer": 20_430_401_088, "text_encoder": 8_292_166_656, "vae": 126_892_531},
    "Kolors": {"unet": 2_579_458_820, "text_encoder": 6_243_584_000},
    "Flux.2 Klein 4B": {"transformer": 3_875_544_576, "text_encoder": 4_022_468_096},
    "Flux.2 Klein 9B": {"transformer": 9_078_581_248, "text_encoder": 8_190_735_360},
    "Flux.2 dev": {"transformer": 32_223_281_152, "text_encoder": 24_011_361_280},
    "Z-Image Turbo": {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096},
    "Wan 2.1 1.3B": {"transformer": 1_418_996_800, "text_encoder": 5_680_910_336},
    "Wan 2.2 5B": {"transformer": 4_999_787_712, "text_encoder": 5_680_910_336},
    "Wan 2.1 14B": {"transformer": 14_288_491_584, "text_encoder": 5_680_910_336},
}
CARDS = [("SD 1.5", 6, "bfloat16")]
MORE_CARDS = [
    ("Flux.1 dev", 16, "nf4"),
    ("SDXL", 10, "bfloat16"),
    ("SD 3.5 medium", 12, "bfloat16"),
    ("PixArt-Sigma", 12, "bfloat16"),
    ("Lumina 2", 16, "bfloat16"),
    ("Kolors", 16, "bfloat16"),
    ("Qwen-Image", 24, "nf4"),
    ("Flux.2 Klein 4B", 12, "bfloat16"),
    ("Flux.2 Klein 9B", 24, "bfloat16"),
    ("Flux.2 dev", 80, "bfloat16"),
    ("Z-Image Turbo", 12, "int8"),
    ("Wan 2.1 1.3B", 16, "bfloat16"),
    ("Wan 2.2 5B", 16, "bfloat16"),
    ("Wan 2.1 14B", 24, "int8"),
]
CARDS += [pytest.param(*card, marks=pytest.mark.slow) for card in MORE_CARDS]


def published_recipe(base: Base) -> Recipe:
    return load_recipe(base.family.preset, concepts=["a cat"])


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_have_their_sizes(model: str) -> None:
    base = outline_published(model)
    for part, count in PARAMETERS[model].items():
        assert sum(parameter.numel() for parameter in getattr(base.pipe, part).parameters()) == count
    assert {parameter.device.type for parameter in base.model.parameters()} == {"meta"}


@pytest.mark.parametrize(("model", "size", "dtype"), CARDS)
def test_published_models_fit_their_cards(model: str, size: int, dtype: str) -> None:
    base = outline_published(model)
    plan = fit(base, published_recipe(base), size * GIB)
    assert plan.needed <= size * GIB
    assert plan.setting.dtype == dtype
    weights = PARAMETERS[model][base.family.denoiser] * {"bfloat16": 2, "int8": 1, "nf4": 0.5}[dtype]
    assert weights < plan.phases["closed form"] < plan.phases["step"]
    assert (IN_TURN in plan.phases) == (model == "SD 3.5 medium")


@pytest.mark.slow
def test_flux_fits_24_gigabytes_in_int8_and_12_not_at_all_in_bfloat16() -> None:
    base = outline_published("Flux.1 dev")
    recipe = published_recipe(base)
    assert fit(base, recipe, 24 * GIB).setting.dtype == "int8"
    with pytest.raises(EsdLoraError, match=r"does not fit 12\.0 GiB: with bfloat16, .* GiB planned, most for .*Take a larger"):
        fit(base, recipe, 12 * GIB, ("bfloat16",))


def test_settings_from_the_recipe_s_own_to_the_smallest(tiny_dir: Path) -> None:
    base = outline_base(str(tiny_dir), dtype=torch.float32)
    recipe = tiny_recipe(tiny_dir, scope="noxattn", walk_batch=8, trajectories=8, preview_every=2)
    planned = list(plans(base, recipe, ("float32", "int8")))
    assert [plan.setting for plan in planned] == [
        Setting(dtype, *rest) for dtype in ("float32", "int8") for rest in ((False, 8), (True, 8), (True, 1))
    ]
    kept, recomputed, alone = planned[:3]
    assert recomputed.phases["step"] < kept.phases["step"]
    assert alone.phases["walk"] < recomputed.phases["walk"]
    assert alone.phases["painting"] < recomputed.phases["painting"]
    assert (
        planned[3].phases["closed form" if recipe.closed_form else "walk"] < kept.phases["walk"] + base.model.num_parameters()
    )
    assert not hasattr(base.model, "peft_config"), "the outline is as it came"


def test_a_step_takes_what_was_planned(tiny_dir: Path) -> None:
    """What `train` itself holds at most beside weights, counted while it runs: within 15 %."""
    recipe = tiny_recipe(tiny_dir, scope="noxattn", steps=3, batch_size=16, preserve_batch=0, preserve=[], trajectory_steps=2)
    outline, base = outline_base(str(tiny_dir), dtype=torch.float32), load_base(tiny_dir)
    plan = next(plans(outline, recipe, ("float32",)))
    with counting() as count:
        train(recipe, base=base, progress=False)
    weights = sum(parameter.nbytes for parameter in base.model.parameters())
    assert plan.phases["step"] - weights == pytest.approx(count.peak, rel=0.15)


def test_outlines_of_every_kind_of_base(tiny_dir: Path, tmp_path: Path) -> None:
    assert outline_base("emoji").latent_shape() == (8, 8, 8)
    whole, outline = load_base(tiny_dir), outline_base(str(tiny_dir))
    assert outline.latent_shape() == whole.latent_shape()
    assert {name: value.shape[1:] for name, value in whole.encode(["a cat"]).items()} == {
        name: torch.Size(shape) for name, shape in outline.family.condition_shapes(outline.pipe).items()
    }
    file = save_checkpoint(tiny_pipeline(), tmp_path / "model.safetensors")
    assert outline_base(str(file), config=tiny_dir).latent_shape() == whole.latent_shape()
    with pytest.raises(EsdLoraError, match="no base 'nowhere/at/all'"):
        outline_base("nowhere/at/all")
    with pytest.raises(EsdLoraError, match="cannot be loaded"):
        outline_base("owner/name")


@pytest.mark.parametrize(("text", "size"), [("12GB", 12.0), ("12", 12.0), ("11.5 GiB", 11.5), ("8g", 8.0)])
def test_sizes_of_cards(text: str, size: float) -> None:
    assert read_size(text) == size * GIB


@pytest.mark.parametrize("text", ["", "0GB", "twelve", "12 MB", "-3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(EsdLoraError, match="expected gigabytes, such as 12GB"):
        read_size(text)


def test_a_training_takes_the_setting_that_fits(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_dir, scope="noxattn", batch_size=64, walk_batch=8, preview_every=2)
    outline = outline_base(str(tiny_dir))
    settings = list(plans(outline, recipe, ("bfloat16",)))
    fitted, plan = fit_recipe(recipe, settings[1].needed)
    assert plan.setting == settings[1].setting
    assert (fitted.train.gradient_checkpointing, fitted.train.walk_batch) == plan.setting[1:]
    args = ["train", "fast", "--concept", "a cat", "--base", str(tiny_dir), "--anchor", "a dog", "-s", "frames=[]"]
    args += ["-s", "train.steps=1", "-s", "train.lr=0.001", "-s", "train.preserve_weight=1", "-s", "eta=0"]
    args += ["-s", "closed_form=null", "-s", "train.preserve_trajectories=1", "-s", "train.trajectories=1"]
    args += ["-s", "train.preview_every=0", "-s", "preserve=[a hat]", "-s", "train.trajectory_steps=2"]
    result = CliRunner().invoke(main, [*args, "--fit", "6GB", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "fit: bfloat16, no gradient checkpointing, walk_batch 32: 0." in result.stdout
    refused = CliRunner().invoke(main, [*args, "--fit", "0.1GB", "-o", str(tmp_path / "no")])
    assert refused.exit_code == 1
    assert "does not fit 0.1 GiB" in refused.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a card")
def test_no_card_to_fit() -> None:
    with pytest.raises(EsdLoraError, match="say what to fit, such as --fit 12GB"):
        free_memory()


@pytest.mark.slow
def test_the_doctor_plans_for_a_card() -> None:
    states = {finding.name: finding for finding in examine(6 * GIB) if " on a card of 6 GB" in finding.name}
    assert [name.removesuffix(" on a card of 6 GB") for name in states] == list(PUBLISHED)
    assert "GiB planned, most for painting" in states["SD 1.5 on a card of 6 GB"].state
    assert "does not fit 6.0 GiB" in states["Flux.1 dev on a card of 6 GB"].state
    assert all(finding.ok for finding in states.values()), "a small card is no fault"


def encoders_of(base: Base) -> list[weakref.ref[Any]]:
    return [weakref.ref(base.pipe.text_encoder)]


def test_text_encoders_leave_before_anything_is_painted(tiny_dir: Path, cat: Eraser, tmp_path: Path) -> None:
    expected = generate(load_base(tiny_dir), ["a cat", "a dog"], erasers=[cat], steps=2)
    base = load_base(tiny_dir, text_first=True)
    encoders = encoders_of(base)
    made = generate(base, ["a cat", "a dog"], erasers=[cat], steps=2)
    assert [picture.tobytes() for picture in made] == [picture.tobytes() for picture in expected]
    assert [encoder() for encoder in encoders] == [None]

    measured = load_base(tiny_dir, text_first=True)
    encoders = encoders_of(measured)
    prepared = prepare_evaluation(measured, "emoji-object", tmp_path, erasers=[cat], limit=2, settings={"steps": 2})
    assert [encoder() for encoder in encoders] == [None]
    for variant in prepared.variants:
        with variant.on() as painter:
            assert len(painter(prepared.plan.cases[:2])) == 2

    kept = load_base(tiny_dir)
    generate(kept, ["a cat"], steps=2)
    assert kept.pipe.text_encoder is not None, "a base that was loaded whole leaves as it came"


def test_the_vae_comes_for_painting_alone(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(tiny_dir)
    moves: list[str] = []
    vae, device = base.pipe.vae, torch.device("meta")
    monkeypatch.setattr(type(vae), "device", property(lambda _: device))
    monkeypatch.setattr(vae, "to", lambda place: moves.append(str(place)))
    with base.vae_in_place():
        assert moves == ["cpu"]
    assert moves == ["cpu", "meta"], "it goes back to where it was"
    monkeypatch.undo()
    paint(base, ["a cat"], [0], steps=2)
    assert moves == ["cpu", "meta"], "and stays where it is beside the denoiser"
