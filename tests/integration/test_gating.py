"""Gates: erasers that are on by prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModelWithProjection

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.families import family_named
from esd_lora.gating import Gate, gated
from esd_lora.sampling import generate, sweep
from toys import load_toy, make_toy, save_toy


def named(eraser: Eraser, name: str, *synonyms: str) -> Eraser:
    (concept,) = eraser.header.concepts
    changed = concept.model_copy(update={"name": name, "synonyms": synonyms})
    return Eraser(eraser.pairs, eraser.header.model_copy(update={"concepts": (changed,)}))


@pytest.fixture(scope="module")
def emoji() -> Base:
    return load_base("emoji", device="cpu", vae=False)


def test_names_and_synonyms_open_it(emoji: Base, cat: Eraser, car: Eraser) -> None:
    gate = Gate(emoji, [named(cat, "a cat", "a kitten"), named(car, "van Gogh")])
    assert gate("three Cats at sea") == [1, 0]
    assert gate("a KITTEN") == [1, 0]
    assert gate("a painting by van gogh of a cat") == [1, 1]
    assert gate("a catalogue of vans") == [0, 0]
    assert gate("") == [0, 0]


def test_similarity_is_of_the_nearest_words(emoji: Base, cat: Eraser) -> None:
    gate = Gate(emoji, [named(cat, "a cat")])
    words = {word: gate.similarities(word)[0] for word in ("tiger", "house", "rain", "of")}
    assert len(set(words.values())) == 4
    assert all(-1 < similarity < 1 for similarity in words.values())
    assert gate.similarities("tiger of house, rain!")[0] == pytest.approx(max(words.values()))
    assert gate.similarities("of rain")[0] == pytest.approx(max(words["of"], words["rain"]))
    assert gate.similarities("cat") == gate.similarities("a dog and a cat") == [1]


def test_runs_are_as_long_as_the_name(emoji: Base, cat: Eraser) -> None:
    gate = Gate(emoji, [named(cat, "balloon key")])

    def similarity(prompt: str) -> float:
        return gate.similarities(prompt)[0]

    assert similarity("rain fish") < similarity("fish") - 0.1, "a single word may come nearer than a pair with it"
    assert similarity("house rain fish") == pytest.approx(max(similarity("house rain"), similarity("rain fish")))
    assert similarity("rain, fish") == similarity("rain fish")


def cosines(directions: torch.Tensor) -> torch.Tensor:
    return (directions @ directions.T)[*torch.triu_indices(len(directions), len(directions), 1)]


def test_unrelated_words_are_not_alike_where_guidance_is_against_zeros(emoji: Base, cat: Eraser) -> None:
    """SDXL with the trained text encoder of the built-in base: from zeros its cosines are .92 on average, from "" .61."""
    pipe, text_encoder = make_toy("sdxl"), emoji.pipe.text_encoder
    second = CLIPTextModelWithProjection(text_encoder.config)
    second.text_model.load_state_dict(getattr(text_encoder, "text_model", text_encoder).state_dict())
    tokenizer = emoji.pipe.tokenizer
    pipe.register_modules(text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer)
    base = Base(pipe, family_named("sdxl"), "sdxl")
    words = ["cat", "tiger", "house", "rain", "key", "fish", "guitar", "pizza", "crown", "rocket", "balloon", "car", "tree"]
    assert not base.encode([""])["prompt_embeds"].any(), "what guidance is measured from stays zeros"
    from_zeros = torch.nn.functional.normalize(base.encode(words)["prompt_embeds"].flatten(1), dim=1)
    assert cosines(from_zeros).mean() > 0.9
    assert cosines(base.directions(words)).mean() < cosines(emoji.directions(words)).mean() + 0.05
    gate = Gate(base, [named(cat, "a cat")])
    assert all(gate(word) == [0] for word in words[1:])
    assert gate("a cat") == [1]


def test_texts_are_compared_under_the_same_instruction(tmp_path: Path) -> None:
    """Sana's goes before every prompt but the empty one of guidance, and a hundred words are most of a direction."""
    base = load_toy(save_toy("sana", tmp_path / "sana"))
    assert cosines(base.directions(["a cat", "a tiger", "rain", "parachute"])).mean() < 0.8


def test_factor_climbs_from_the_threshold(emoji: Base, cat: Eraser) -> None:
    eraser = named(cat, "a cat")
    (similar,) = Gate(emoji, [eraser]).similarities("a tiger")
    for threshold in (similar / 2, similar - 0.01, similar + 0.01, 1):
        (factor,) = Gate(emoji, [eraser], threshold=threshold)("a tiger")
        assert factor == pytest.approx(max(0, (similar - threshold) / (1 - threshold)) if threshold < 1 else 0)
        assert Gate(emoji, [eraser], threshold=threshold)("a cat") == [1]
    for threshold in (0, -1, 1.01):
        with pytest.raises(EsdLoraError, match="gate threshold"):
            Gate(emoji, [eraser], threshold=threshold)


def test_unnamed_prompts_are_the_base_s_bit_for_bit(base: Base, cat: Eraser, car: Eraser) -> None:
    gate = Gate(base, [cat, car], threshold=1)
    prompts = ["a dog", "a cat", "a house", "a car and a cat"]
    found = sweep(base, prompts, [1, 0.5], erasers=[cat, car], weights=[1, -0.5], gate=gate, seeds=[3, 4], steps=2)
    plain = generate(base, prompts, seeds=[3, 4], steps=2)
    for strength, pictures in found.items():
        weights = [strength, -0.5 * strength]
        on = generate(base, prompts, erasers=[cat, car], weights=weights, seeds=[3, 4], steps=2)
        cats = generate(base, prompts, erasers=[cat], weights=weights[:1], seeds=[3, 4], steps=2)
        expected = [*plain[:2], *cats[2:4], *plain[4:6], *on[6:]]
        for picture, wanted in zip(pictures, expected, strict=True):
            assert np.array_equal(np.asarray(picture), np.asarray(wanted))


def test_gate_in_a_pipeline_without_loader(cat_dir: Path) -> None:
    eraser = Eraser.load(cat_dir)
    header = eraser.header.model_copy(update={"family": "pixart", "prefix": "transformer"})
    with pytest.raises(EsdLoraError, match="a PixArtSigmaPipeline in diffusers takes no erasers off and on again"):
        gated(make_toy("pixart"), [Eraser(eraser.pairs, header).save(cat_dir.with_name("of-pixart"))])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # two adapters are meant
def test_gate_in_plain_diffusers(base: Base, tiny_dir: Path, cat_dir: Path, car_dir: Path) -> None:
    paint = gated(base.pipe, [cat_dir, car_dir], threshold=1)
    bare = load_base(tiny_dir, device="cpu")

    def picture(call: object, prompt: str) -> np.ndarray:
        asked = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(1), "output_type": "np"}
        return call(prompt, **asked).images[0]  # type: ignore[operator]

    for prompt in ("a dog", "a cat", "a dog", "a car"):
        same = np.array_equal(picture(paint, prompt), picture(bare.pipe, prompt))
        assert same == (prompt == "a dog"), prompt
    expected = generate(bare, ["a cat"], erasers=[cat_dir], seeds=[1], steps=2)
    assert np.abs(picture(paint, "a cat") * 255 - np.asarray(expected[0], dtype=float)).max() <= 1
