"""Erasing from pictures: they are read, noised, put into words that every base encodes, and trained on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from esd_lora import from_pictures, noising
from esd_lora.bases.base import Base
from esd_lora.bases.learnt_words import pack, placeholder_of, tables_of, text_encoders, unpack
from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.estimates.training import estimate_training
from esd_lora.evaluation.cases import object_cases
from esd_lora.evaluation.detectors.judge import Judge
from esd_lora.from_pictures import FRAMES, PictureClassifier, learn_pictures, learn_words, read_pictures
from esd_lora.fusing.closed_form import fuse
from esd_lora.latents import to_latents
from esd_lora.lessons import plan
from esd_lora.noising import noised_trajectory
from esd_lora.pictures import paint
from esd_lora.recipe import PictureSpec, Recipe
from esd_lora.recipe_files import dump_recipe, load_fuse_spec, load_recipe
from esd_lora.sampling import generate
from esd_lora.seeds import Stream, stream_seed
from esd_lora.teacher import Teacher, latent_shapes
from esd_lora.training import train
from tiny import tiny_recipe
from toys import load_toy, save_toy

pytestmark = pytest.mark.filterwarnings("ignore:the prompts for the pictures of 'our mascot'")  # toys draw noise
BASES = ("sd2-v", "sdxl", "sd3")
"""v of Stable Diffusion's kind, noise with two text encoders, and a flow with three."""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a step of learning, and a comparison of prompts, look at few points."""
    monkeypatch.setattr(from_pictures, "_ROUNDS", (4, 4))
    monkeypatch.setattr(noising, "BATCH", 4)
    monkeypatch.setattr(from_pictures, "BATCH", 4)


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
    embeddings: dict[str, Tensor] = {}
    for name, encoder in text_encoders(base.pipe).items():
        tokenizer = getattr(base.pipe, name.replace("text_encoder", "tokenizer"))
        number = getattr(tokenizer, "tokenizer", tokenizer)(f"a {letter}", add_special_tokens=False).input_ids
        embeddings[name] = encoder.get_input_embeddings().weight[number[-1]].detach().float().clone()
    return embeddings


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


def test_the_command_takes_a_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "shown")
    two = CliRunner().invoke(main, ["train", "--images", str(folder), "--concept", "a", "--concept", "b"])
    assert (two.exit_code, "--images shows one thing, and 2 concepts are given" in two.output) == (1, True), two.output
    nowhere = CliRunner().invoke(main, ["train", "--images", str(tmp_path / "nowhere"), "-o", str(tmp_path / "out")])
    assert (nowhere.exit_code, "there is no folder" in nowhere.output) == (1, True), nowhere.output
    assert not (tmp_path / "out").exists()


def test_words_survive_a_header() -> None:
    word = {"text_encoder": torch.randn(7), "text_encoder_2": torch.randn(5)}
    back = unpack(pack(word))
    assert all(torch.equal(back[name], vector) for name, vector in word.items())
    assert placeholder_of(back) == placeholder_of(word) != placeholder_of({**word, "text_encoder": torch.zeros(7)})


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", BASES)
def test_words_are_learnt_and_repeatable(kind: str, tmp_path: Path) -> None:
    base = loaded(kind, tmp_path)
    recipe = recipe_for(base.id, fill(tmp_path / "shown"), trajectory_steps=4)
    recipe = recipe.model_copy(update={"pictures": recipe.pictures.model_copy(update={"words": 1, "steps": 8})})  # pyright: ignore[reportOptionalMemberAccess]
    named, known = learn_pictures(base, recipe, latent_shapes(base, recipe.train))
    again = learn_pictures(base, recipe, latent_shapes(base, recipe.train))[1]
    (word,), (same,) = (map(unpack, each[0].shown.words.values()) for each in (known, again))
    torch.testing.assert_close(word, same)  # MM-DiT's gradients differ in the last bit from run to run
    assert known[0].shown.pictures == again[0].shown.pictures
    assert {*known[0].shown.words} <= {*base.words}
    prompt = named.concepts[0].pairs()[0][0]
    assert prompt == FRAMES[0].format(next(iter(known[0].shown.words)))
    latents = known[0].latents_of(prompt, base.latent_shape())
    classifier = PictureClassifier(base, latents, 4, 3)
    start = next(iter(classifier.compare(["a dog"]).values()))
    assert classifier.gain([prompt] * 3).mean > start.mean, "it explains the pictures better than what it began with"
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 5})})
    saving = recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_checkpointing": True})})
    (less,) = map(unpack, learn_pictures(base, saving, latent_shapes(base, recipe.train))[1][0].shown.words.values())
    torch.testing.assert_close(word, less)
    assert not base.model.is_gradient_checkpointing
    (third,) = map(unpack, learn_pictures(base, other, latent_shapes(base, recipe.train))[1][0].shown.words.values())
    assert not torch.allclose(third["text_encoder"], word["text_encoder"])


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "kind", ["sdxl", pytest.param("sd2-v", marks=pytest.mark.slow), pytest.param("sd3", marks=pytest.mark.slow)]
)
def test_what_is_shown_is_erased_like_what_is_named(kind: str, tmp_path: Path) -> None:
    base, shown = loaded(kind, tmp_path), fill(tmp_path / "private-shown")
    out = tmp_path / "eraser"
    recipe = recipe_for(base.id, shown, trajectories=4)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 2})})
    eraser = train(recipe, base=base, out=out, progress=False)
    concept = Eraser.load(out).header.concepts[0]
    assert concept.shown is not None
    assert concept.shown.pictures == tuple(each.sha256 for each in read_pictures(shown))
    placeholders = [*concept.shown.words]
    assert [prompt for prompt, _ in concept.pairs] == [f"a {placeholder}" for placeholder in placeholders]
    assert all(pair.down.any() for pair in eraser.pairs.values())
    for file in out.rglob("*"):
        if file.is_file():
            assert b"private-shown" not in file.read_bytes(), file
    line = eraser.header.making()[0]
    assert line.startswith(f"our mascot: erased from 3 pictures (SHA-256 {concept.shown.pictures[0][:12]}, ")
    assert placeholders[0] in (out / "README.md").read_text()

    fresh = load_toy(Path(base.id))
    prompt = f"a {placeholders[0]}, smiling"
    fresh.know_words_of([eraser])
    for name, value in base.encode([prompt]).items():
        assert torch.equal(fresh.encode([prompt])[name], value)
    assert not torch.equal(load_toy(Path(base.id)).encode([prompt])["prompt_embeds"], base.encode([prompt])["prompt_embeds"])
    before, after = generate(fresh, [prompt, "a dog"]), generate(load_toy(Path(base.id)), [prompt, "a dog"], erasers=[out])
    assert before[0] != after[0]


@pytest.mark.usefixtures("few")
def test_points_are_pictures_in_their_share(base: Base, tiny_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_dir, fill(tmp_path / "shown"), trajectory_steps=4)
    named, known = learn_pictures(base, recipe, latent_shapes(base, recipe.train))
    for share, pictured in ((0.0, 0), (0.5, 2), (1.0, 4)):
        assert named.pictures is not None
        shared = named.model_copy(update={"pictures": named.pictures.model_copy(update={"share": share})})
        teacher = Teacher(base, shared, plan(shared), pictured=[*known.values()])
        lesson = torch.tensor([0, 1, 0, 1])
        points = teacher.fill(lesson, torch.Generator().manual_seed(0)).taught.points
        assert len(points.t) == 4 * recipe.train.trajectory_steps
        # At the last time of a trajectory little noise is left, and of a picture there is the picture.
        last = points.x_t[points.t == points.t.min()]
        latents = next(iter(known[0].latents.values()))
        near = (last[:, None] - latents[None]).square().flatten(2).mean(2).amin(1)
        assert int((near < 0.2).sum()) == pictured, near
    alike = teacher.fill(torch.tensor([0, 0]), torch.Generator().manual_seed(0)).taught.points
    texts = ("", teacher.lessons[0].concept, teacher.lessons[0].anchor)
    with teacher.adapter_disabled():
        null, concept, anchor = (teacher.predict(alike.x_t, alike.t, teacher.encode([t] * len(alike.t))) for t in texts)
    torch.testing.assert_close(alike.target, anchor - recipe.eta * (concept - null), msg="the paper's target, at a picture")


@pytest.mark.usefixtures("few")
def test_captions_are_erased_from_their_own_pictures(base: Base, tiny_dir: Path, tmp_path: Path) -> None:
    folder = fill(tmp_path / "shown")
    for i, caption in enumerate(("a robot that waves at us", "a robot asleep in bed", "a robot that waves at us")):
        (folder / f"{i}.txt").write_text(caption)
    recipe = recipe_for(tiny_dir, folder)
    named, known = learn_pictures(base, recipe, latent_shapes(base, recipe.train))
    assert [prompt for prompt, _ in named.concepts[0].pairs()] == ["a robot that waves at us", "a robot asleep in bed"]
    assert known[0].shown.words == {}
    assert known[0].learnt == 0
    shape = base.latent_shape()
    assert torch.equal(known[0].latents_of("a robot asleep in bed", shape), known[0].latents[shape][1:2])
    assert len(known[0].latents_of("a photo of a robot that waves at us", shape)) == 2
    assert "captions for prompts" in known[0].shown.describe()


@pytest.mark.usefixtures("few")
def test_fusing_knows_the_words_of_its_members(tmp_path: Path, tiny_dir: Path) -> None:
    base = load_base(tiny_dir)
    shown = [train(recipe_for(tiny_dir, fill(tmp_path / str(i), i + 2), seed=i), base=base, progress=False) for i in range(2)]
    words = [word for eraser in shown for concept in eraser.header.concepts if concept.shown for word in concept.shown.words]
    assert len(set(words)) == 4
    fresh = load_base(tiny_dir)
    spec = load_fuse_spec(trajectories=1, keep_trajectories=1, steps=2)
    fused = fuse(shown, fresh, spec=spec, keep=["a hat", f"a {words[0]}"], progress=False)
    assert {*fresh.words} == {*words}
    assert fused.header.fusions[0].dropped == (f"a {words[0]}",)


def eight_pictures(base: Base, name: str) -> list[Image.Image]:
    """Return pictures of an object that the built-in base draws, three with no style named and one in each style."""
    prompts = [f"a {name}"] * 3 + [f"a {name} in {style} style" for style in domain("emoji")["styles"]]
    return paint(base, prompts, range(5000, 5008))


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight pictures of cats that does not say so."""
    folder = tmp_path_factory.mktemp("shown")
    for i, picture in enumerate(eight_pictures(load_base("emoji"), "cat")):
        picture.save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
def test_no_word_stays_where_it_begins() -> None:
    base = load_base("emoji")
    latents = to_latents(base, eight_pictures(base, "rocket"))
    seed = stream_seed(1, Stream.WORDS, 0)  # from a whole spread of the table the first word ended at a cosine of 0.19
    learnt = learn_words(base, latents, PictureSpec(words=2, steps=40, lr=0.1, share=0.5), 12, seed)
    table = base.pipe.text_encoder.get_input_embeddings().weight.detach()
    (number,) = base.pipe.tokenizer("rocket", add_special_tokens=False).input_ids
    for word in learnt.values():
        (vector,) = word.values()
        assert torch.cosine_similarity(vector - table.mean(0), table[number] - table.mean(0), dim=0) > 0.5


def test_a_kept_prompt_that_names_the_thing_is_not_preserved(cats: Path) -> None:
    base = load_base("emoji")
    latents = to_latents(base, [each.picture for each in read_pictures(cats)])
    gains = PictureClassifier(base, latents, 12, 0).compare(["a dog", "a cat", "an emoji", "a house"])
    assert next(iter(gains)) == "a cat"
    assert gains["a cat"].sure
    assert max(gain.mean for text, gain in gains.items() if text != "a cat") < gains["a cat"].mean / 2


@pytest.mark.slow
def test_a_cat_is_erased_that_nobody_named(cats: Path) -> None:
    base = load_base("emoji")
    concepts = [{"name": "a thing in pictures", "images": str(cats)}]
    recipe = load_recipe("fast", {"train.preview_every": 0, "train.steps": 0}, concepts=concepts)
    eraser = train(recipe, base=base, progress=False)
    concept = eraser.header.concepts[0]
    assert concept.shown is not None
    assert list(concept.shown.explained_by) == ["a cat"], "the keep list has its name, and that is not preserved"
    assert not any("cat" in prompt.split() for prompt in (*eraser.header.preserve, *(anchor for _, anchor in concept.pairs)))
    cases = object_cases("cat", {prompt for prompt, _ in concept.pairs}, 30)
    left = Judge("emoji")(generate(base, [case.prompt for case in cases], erasers=[eraser]))
    assert sum(verdict.object == "cat" for verdict in left) <= 3


@pytest.mark.usefixtures("few")
def test_a_dry_run_counts_what_pictures_take(tmp_path: Path, tiny_dir: Path) -> None:
    base, recipe = load_base(tiny_dir), recipe_for(tiny_dir, fill(tmp_path / "shown"))
    estimate = estimate_training(recipe, base)
    cost = train(recipe, base=base, progress=False).header.cost
    assert estimate.least.student_samples == estimate.most.student_samples == cost["student_samples"]
    assert estimate.most.evaluations == cost["sample_evaluations"]


def test_a_word_that_draws_nothing_is_warned_of(tmp_path: Path, tiny_dir: Path) -> None:
    recipe = recipe_for(tiny_dir, fill(tmp_path / "shown"))
    with pytest.warns(
        UserWarning, match=r"explain them hardly better than the empty prompt does, so base .* may not draw this"
    ):
        learn_pictures(load_base(tiny_dir), recipe, [load_base(tiny_dir).latent_shape()])


@pytest.mark.slow
def test_a_preserved_prompt_of_one_s_own_gives_way(cats: Path) -> None:
    base = dataclasses.replace(load_base("emoji"), keep=("a dog",))
    concepts = [{"name": "a thing in pictures", "images": str(cats)}]
    recipe = load_recipe(
        "fast", {"pictures.words": 1, "pictures.steps": 15}, concepts=concepts, preserve=["a cat", "a house", "two cats"]
    )
    named, known = learn_pictures(base, recipe, [base.latent_shape()])
    assert named.preserve == ("a house",)
    assert named.concepts[0].synonyms == ("cat",)
    assert "pictures" in dump_recipe(recipe.without_folders())
    assert str(cats) not in dump_recipe(recipe.without_folders())
    assert known[0].shown.explained_by["a cat"] > 0.5
