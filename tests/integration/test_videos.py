"""Bases that make videos: latents with frames in training and painting, files of both, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.bases.stored import open_stored
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.formats.cards import save_with_card
from esd_lora.pictures import film, paint, pictures_at_once, webp
from esd_lora.sampling import generate, generate_videos, sweep, write_pictures
from esd_lora.teacher import latent_shapes
from esd_lora.training import train
from esd_lora.trajectory import latents_per_batch
from esd_lora.watching import StepReport
from published_denoisers import denoiser
from tiny import tiny_recipe
from toys import load_toy, save_toy, wan

PROMPT = "a cat in the rain"
TOYS = {"Wan 2.1": {}, "TI2V-5B": {"expand_timesteps": True}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved toy of Wan 2.1. Tests only read it."""
    return save_toy("wan", tmp_path_factory.mktemp("toys") / "wan")


@pytest.fixture
def base(toy: Path) -> Base:
    return load_toy(toy)


@pytest.fixture(scope="module")
def eraser_dir(toy: Path) -> Path:
    """An eraser solved and trained on two frames of latents."""
    recipe = tiny_recipe(toy, resolution=64, video_frames=5, steps=3, lr=0.02, preserve_batch=1)
    train(recipe, out=toy.with_name("eraser"), progress=False)
    return toy.with_name("eraser")


def pixels(frames: Any) -> np.ndarray:
    return np.stack([np.asarray(frame.convert("RGB"), dtype=np.int16) for frame in frames])


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_prediction_for_frames_is_the_one_the_pipeline_makes(name: str, tmp_path: Path) -> None:
    """Bit for bit in the pipeline's own batches; TI2V-5B has a time for each patch of each frame."""
    wan(**TOYS[name]).save_pretrained(tmp_path)
    base, calls = load_toy(tmp_path), list[dict[str, Tensor]]()

    def record(_module: Any, _args: Any, kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        calls.append({"x_t": kwargs["hidden_states"], "t": kwargs["timestep"], "prediction": output[0]})

    hook = base.model.register_forward_hook(record, with_kwargs=True)
    options = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 3, "output_type": "latent"}
    base.pipe(prompt=PROMPT, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), **options)
    hook.remove()
    shape = base.latent_shape((64, 96), 9)
    assert shape == (4, 3, 8, 12)
    assert len(calls) == 6
    assert {tuple(call["t"].shape) for call in calls} == {(1, 3 * 4 * 6) if TOYS[name] else (1,)}
    conditions = base.encode([PROMPT]), base.encode([""])
    for i, call in enumerate(calls):
        assert tuple(call["x_t"].shape[1:]) == shape
        prediction = base.predict(call["x_t"], call["t"].flatten()[:1], conditions[i % 2])
        assert torch.equal(prediction, call["prediction"])


@torch.no_grad()
def test_text_ends_where_the_prompt_does(base: Base) -> None:
    """Zeros stand behind it, up to the 512 places of the pipeline's call: whatever the encoder makes of padding is cut off."""
    embeds = base.encode(["", "a cat"])["prompt_embeds"]
    assert embeds.shape == (2, 512, 16)
    filled = (embeds != 0).any(-1)
    assert filled.sum(1).tolist() == [1, len("a cat") + 1]
    assert filled[1, : len("a cat") + 1].all()


def test_videos_have_their_frames_and_pictures_are_the_middle_ones(base: Base, eraser_dir: Path) -> None:
    short = {"steps": 2, "frames": 9}
    (video,) = film(base, ["a cat"], [0], **short)
    assert len(video) == 9
    assert {frame.size for frame in video} == {(64, 64)}
    (picture,) = paint(base, ["a cat"], [0], **short)
    assert np.array_equal(pixels([picture]), pixels([video[4]]))
    (one,) = film(base, ["a cat"], [0], steps=2)
    assert len(one) == 1, "a picture, where no length is asked for"
    erased = generate_videos(base, ["a cat", "a dog"], erasers=[eraser_dir], **short)
    assert [len(frames) for frames in erased] == [9, 9]
    assert np.abs(pixels(erased[0]) - pixels(video)).max() > 1
    pictures = generate(base, ["a cat", "a dog"], erasers=[eraser_dir], **short)
    assert np.array_equal(pixels(pictures), pixels([frames[4] for frames in erased]))
    swept = sweep(base, ["a cat"], [0.0, 1.0], erasers=[eraser_dir], **short)
    assert np.abs(pixels(swept[0.0]) - pixels([video[4]])).max() <= 1


def test_eraser_is_on_in_every_frame_as_plain_diffusers_paints_it(toy: Path, base: Base, eraser_dir: Path) -> None:
    from diffusers import DiffusionPipeline

    (ours,) = generate_videos(base, ["a cat"], erasers=[eraser_dir], steps=3, frames=5)
    pipe = DiffusionPipeline.from_pretrained(toy)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(eraser_dir)
    options = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3, "output_type": "pil"}
    theirs = pipe("a cat", generator=torch.Generator().manual_seed(0), guidance_scale=base.guidance, **options).frames[0]
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_files_of_videos_lie_beside_their_stills(base: Base, eraser_dir: Path, tmp_path: Path) -> None:
    files = write_pictures(
        base, ["a cat", "a dog"], tmp_path / "out", erasers=[eraser_dir], compare=True, steps=2, frames=5, width=64, height=64
    )
    names = ["000_seed0.png", "001_seed0.png", "000_seed0.webp", "001_seed0.webp", "comparison.png"]
    assert [file.name for file in files] == names
    with Image.open(tmp_path / "out" / "000_seed0.webp") as video, Image.open(tmp_path / "out" / "000_seed0.png") as still:
        assert video.n_frames == 5
        video.seek(2)
        assert np.array_equal(pixels([video]), pixels([still])), "lossless"
    alone = write_pictures(base, ["a cat"], tmp_path / "pictures", steps=2)
    assert [file.name for file in alone] == ["000_seed0.png"]


def test_animation_keeps_every_frame() -> None:
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(6)]
    content = webp(frames)
    assert content[8:12] == b"WEBP"
    import io

    with Image.open(io.BytesIO(content)) as opened:
        assert opened.n_frames == 6


def test_command_generates_a_video(toy: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from esd_lora.cli import main

    command = ["generate", "a cat", "--base", str(toy), "--frames", "5", "--steps", "2", "--width", "64", "--height", "64"]
    done = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [Path(video).name for video in result["videos"]] == ["000_seed0.webp"]
    assert [Path(each["file"]).name for each in result["pictures"]] == ["000_seed0.png"]
    assert result["sheets"] == []


def test_training_has_one_frame_of_latents_unless_more_are_asked_for(base: Base, toy: Path) -> None:
    seen: list[tuple[int, ...]] = []
    predict = base.family.predict

    def note(report: StepReport) -> None:
        seen.extend(latent_shapes(report.teacher.base, report.teacher.spec))

    assert latent_shapes(base, tiny_recipe(toy).train) == [(4, 1, 8, 8)]
    several = tiny_recipe(toy, video_frames=9, steps=1, trajectory_steps=2, aspects=["2:1", "1:1"])
    train(several, base=base, on_step=[note], progress=False)
    assert seen == [(4, 3, 6, 12), (4, 3, 8, 8)]
    assert predict == base.family.predict


def test_lengths_that_a_base_does_not_make(base: Base, tiny_dir: Path, toy: Path) -> None:
    with pytest.raises(EsdLoraError, match=r"6 frames: .* makes videos of 1, 5, 9, \.\.\. frames\. Take 5 or 9\."):
        film(base, ["a cat"], [0], frames=6)
    with pytest.raises(EsdLoraError, match=r"4 frames: .* Take 1 or 5"):
        train(tiny_recipe(toy, video_frames=4), base=base, progress=False)
    pictures = load_base(tiny_dir, device="cpu")
    with pytest.raises(EsdLoraError, match=r"5 frames: .* makes pictures, not videos"):
        generate(pictures, ["a cat"], frames=5)
    with pytest.raises(EsdLoraError, match=r"5 frames: .* makes pictures, not videos"):
        train(tiny_recipe(tiny_dir, video_frames=5), base=pictures, progress=False)
    assert len(generate(pictures, ["a cat"], frames=1, steps=2)) == 1


def test_what_goes_through_at_once_counts_frames(base: Base) -> None:
    assert latents_per_batch((16, 60, 104)) == latents_per_batch((16, 1, 60, 104)) == 5
    assert latents_per_batch((16, 3, 60, 104)) == 1
    size = (256, 256)
    assert pictures_at_once(base, size=size) == 32
    assert pictures_at_once(base, size=size, frames=17) == 32 * 64 * 64 // (5 * 32 * 32)


def test_two_denoisers_that_take_turns_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    """Wan 2.2's A14B."""
    pipe = wan()
    pipe.register_modules(transformer_2=pipe.transformer)
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    for opened in (load_base, open_stored):
        with pytest.raises(
            EsdLoraError, match=r"two denoisers that take turns .* transformer and transformer_2, and an eraser"
        ):
            opened(tmp_path)


def test_a_latent_of_48_channels_is_16_pixels_whether_the_vae_is_there_or_not(base: Base) -> None:
    large = base.pipe
    large.register_modules(transformer=denoiser("wan-5b"), vae=None)
    assert base.family.pixels_per_latent(large) == 16
    assert base.latent_shape((256, 512), 5) == (48, 2, 16, 32)
    assert base.picture_size(320, 640) == (320, 640)
    with pytest.raises(EsdLoraError, match=r"draws multiples of 32 pixels"):
        base.picture_size(336, 640)


def test_card_shows_how_to_make_a_video(eraser_dir: Path, tmp_path: Path) -> None:
    save_with_card(Eraser.load(eraser_dir), tmp_path / "card", {})
    assert 'video = pipe("a prompt").frames[0]' in (tmp_path / "card" / "README.md").read_text("utf-8")
