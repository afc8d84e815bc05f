"""Erasing from pictures: they are read, noised, put into words that every base encodes, and trained on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.bases.learnt_words import pack, placeholder_of, tables_of, text_encoders, unpack
from esd_lora.errors import EsdLoraError
from esd_lora.from_pictures import FRAMES, PictureClassifier, learn_pictures, read_pictures
from esd_lora.noising import noised_trajectory
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe
from esd_lora.teacher import latent_shapes
from esd_lora.training import train
from tiny import tiny_recipe
from toys import load_toy, save_toy

BASES = ("sd2-v", "sdxl", "sd3")
"""v of Stable Diffusion's kind, noise with two text encoders, and a flow with three."""


def loaded(kind: str, folder: Path) -> Base:
    return load_toy(save_toy(kind, folder / kind))


def fill(folder: Path, count: int = 3, side: int = 64) -> Path:
    """Write pictures that differ, and return their folder."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def recipe_for(base: str | Path, folder: Path, **train: Any) -> Recipe:
    """Return a short recipe for what a folder shows."""
    recipe = tiny_recipe(Path(base), **train).model_dump()
    recipe["concepts"] = [{"name": "our mascot", "images": str(folder), "anchor": "a dog"}]
    return Recipe.model_validate(recipe | {"pictures": {"words": 2, "steps": 2, "lr": 0.1, "share": 0.5}})


def test_pictures_are_read_as_they_are_looked_at(tmp_path: Path) -> None:
    turned = Image.new("RGB", (4, 2), "red")
    turned.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned.save(tmp_path / "a.png", exif=exif)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "b.webp", lossless=True)
    Image.new("L", (3, 3), 7).save(tmp_path / "c.jpg")
    (tmp_path / "notes.md").write_text("no picture")
    one, two, three = read_pictures(tmp_path)
    assert one.picture.size == (2, 4)
    assert one.picture.getpixel((1, 0)) == (0, 0, 255)
    assert two.picture.getpixel((0, 0)) == (255, 255, 255), "what is transparent is white"
    assert three.picture.mode == "RGB"
    assert {each.caption for each in (one, two, three)} == {None}
    assert two.sha256 == hashlib.sha256((tmp_path / "b.webp").read_bytes()).hexdigest()


def test_captions_lie_beside_pictures(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "0.txt").write_text("a robot\n  that waves\n")
    with pytest.raises(EsdLoraError, match=r"1 of 2 pictures .* have no caption \(1\.png the first\)"):
        read_pictures(tmp_path)
    (tmp_path / "1.txt").write_text("\n")
    with pytest.raises(EsdLoraError, match=r"1\.txt is an empty caption"):
        read_pictures(tmp_path)
    (tmp_path / "1.txt").write_text("a robot asleep")
    assert [each.caption for each in read_pictures(tmp_path)] == ["a robot that waves", "a robot asleep"]


@pytest.mark.parametrize(
    ("name", "text"), [("", "there is no folder"), ("bare", "holds no picture"), ("bad", "cannot be read")]
)
def test_what_shows_nothing_is_refused_before_a_base_is_loaded(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd_lora.training.load_base", lambda *_, **__: pytest.fail("a base was loaded"))
    for folder in ("bare", "bad"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(EsdLoraError, match=text):
        train(recipe_for("emoji", tmp_path / (name or "nowhere")), progress=False)


def test_images_need_to_know_how_they_are_learnt() -> None:
    with pytest.raises(EsdLoraError, match=r"nothing says how to learn from them: give pictures, or extend fast"):
        load_recipe("fast", {"pictures": None}, concepts=[{"name": "x", "images": "there"}])


@pytest.mark.parametrize("kind", BASES)
def test_pictures_are_noised_to_the_times_of_a_trajectory(kind: str, tmp_path: Path) -> None:
    base = loaded(kind, tmp_path)
    latents = torch.randn(2, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
    visited = noised_trajectory(base, latents, 5, torch.Generator().manual_seed(1))
    again, scheduler = torch.Generator().manual_seed(1), base.family.scheduler(base.pipe, 5, base.latent_shape())
    assert [float(sample.t[0]) for sample in visited] == [float(t) for t in scheduler.timesteps]
    for sample in visited:
        noise = torch.randn(latents.shape, generator=again)
        if base.prediction_type == "flow":
            s = sample.t.view(-1, 1, 1, 1) / 1000
            expected = (1 - s) * latents + s * noise
        else:
            a = scheduler.alphas_cumprod[int(sample.t[0])]  # pyright: ignore[reportAttributeAccessIssue]
            expected = a.sqrt() * latents + (1 - a).sqrt() * noise
            assert torch.equal(sample.x_t, scheduler.add_noise(latents, noise, sample.t))  # pyright: ignore[reportAttributeAccessIssue]
        torch.testing.assert_close(sample.x_t, expected)
        assert (sample.null, sample.prompted) == (None, None)


def token(base: Base, letter: str) -> dict[str, Tensor]:
    """Return the embedding of a letter behind another in every text encoder, whose toy tokenizers have one token for it."""
    found: dict[str, Tensor] = {}
    for name, encoder in text_encoders(base.pipe).items():
        tokenizer = getattr(base.pipe, name.replace("text_encoder", "tokenizer"))
        number = getattr(tokenizer, "tokenizer", tokenizer)(f"a {letter}", add_special_tokens=False).input_ids
        found[name] = encoder.get_input_embeddings().weight[number[-1]].detach().float().clone()
    return found


@pytest.mark.parametrize("kind", ["sd2-v", "sdxl", "sd3", "flux-dev", "qwen-image", "z-image"])
def test_a_placeholder_is_encoded_as_its_word(kind: str, tmp_path: Path) -> None:
    base = loaded(kind, tmp_path)
    word, other = token(base, "q"), token(base, "o")
    base.words |= {placeholder_of(word): word, placeholder_of(other): other}
    prompts = [f"a {placeholder_of(word)}, {placeholder_of(other)}", "", f"a w {placeholder_of(word)}"]
    before = {id(table): table.weight.clone() for encoder in text_encoders(base.pipe).values() for table in tables_of(encoder)}
    learnt, real = base.encode(prompts), base.encode(["a q, o", "", "a w q"])
    for name, value in real.items():
        assert torch.equal(learnt[name], value), name
    assert not torch.equal(real["prompt_embeds"][0], base.encode(["a o, q"])["prompt_embeds"][0])
    for encoder in text_encoders(base.pipe).values():
        for table in tables_of(encoder):
            assert torch.equal(table.weight, before[id(table)])
            assert not table._forward_hooks


def test_a_word_is_of_its_text_encoders(tmp_path: Path) -> None:
    base = loaded("sdxl", tmp_path)
    word = {"text_encoder": torch.ones(3)}
    base.words[placeholder_of(word)] = word
    with pytest.raises(EsdLoraError, match=r"was learnt with text encoders of widths .*3.* this base has .*16"):
        base.encode([placeholder_of(word)])
    base.encode(["a cat"])


def test_words_survive_a_header() -> None:
    word = {"text_encoder": torch.randn(7), "text_encoder_2": torch.randn(5)}
    back = unpack(pack(word))
    assert all(torch.equal(back[name], vector) for name, vector in word.items())
    assert placeholder_of(back) == placeholder_of(word) != placeholder_of({**word, "text_encoder": torch.zeros(7)})


@pytest.mark.parametrize("kind", BASES)
def test_words_are_learnt_and_repeatable(kind: str, tmp_path: Path) -> None:
    base = loaded(kind, tmp_path)
    recipe = recipe_for(base.id, fill(tmp_path / "shown"), trajectory_steps=4)
    recipe = recipe.model_copy(update={"pictures": recipe.pictures.model_copy(update={"words": 1, "steps": 12})})  # pyright: ignore[reportOptionalMemberAccess]
    named, known = learn_pictures(base, recipe, latent_shapes(base, recipe.train))
    again = learn_pictures(base, recipe, latent_shapes(base, recipe.train))[1]
    assert known[0].shown == again[0].shown
    assert {*base.words} == {*known[0].shown.words}
    prompt = named.concepts[0].pairs()[0][0]
    assert prompt == FRAMES[0].format(next(iter(base.words)))
    latents = known[0].latents_of(prompt, base.latent_shape())
    classifier = PictureClassifier(base, latents, 4, 3)
    start = next(iter(classifier.compare(["a dog"]).values()))
    assert classifier.gain([prompt] * 3).mean > start.mean, "it explains the pictures better than what it began with"
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 5})})
    assert learn_pictures(base, other, latent_shapes(base, recipe.train))[1][0].shown.words != known[0].shown.words
