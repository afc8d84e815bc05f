"""Attacks on erased models: they leave the base as it was, say the same twice, and bring back what they can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from transformers import CLIPTokenizer

from esd_lora.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks import ATTACKS, Victim, learning, words
from esd_lora.evaluation.attacks.learning import to_latents, to_pictures
from esd_lora.evaluation.attacks.words import best_prefix, readable_words, renamed
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.variants import bare, erased
from esd_lora.families import Base, load_base
from esd_lora.header import ErasedConcept
from esd_lora.stacking import Strength
from made import eraser_on
from toys import load_toy, save_toy

CAT = ErasedConcept(name="a cat", synonyms=("kitten",), pairs=(), eta=1.0)
ASKED = [Asked(f"t-{i}", "target", prompt, i, "cat") for i, prompt in enumerate(("a cat", "a cat, noto style", "two kittens"))]
QUICK: dict[str, dict[str, Any]] = {
    "token-noise": {"tokens": 2},
    "negative-weight": {},
    "fine-tune": {"pictures": 2, "steps": 2, "rank": 1},
    "textual-inversion": {"pictures": 2, "steps": 2},
    "prompt-optimisation": {"pictures": 2, "steps": 2, "tokens": 2},
    "latent-start": {"strength": 0.5},
}


@pytest.fixture(scope="module")
def emoji() -> Base:
    return load_base("emoji", device="cpu")


@pytest.fixture(scope="module")
def cat_eraser(emoji: Base) -> Eraser:
    """An update that changes every picture, and claims to be an eraser of cats."""
    layers = [name for name in emoji.family.modules(emoji.model, "xattn") if name.endswith("attn2.to_v")]
    return eraser_on(emoji.model, layers, "a cat", seed=3, rank=1)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "BATCH", 4)
    monkeypatch.setattr(words, "BATCH", 4)
    monkeypatch.setattr(words, "SEARCHED", 4)


def victim_of(base: Base, eraser: Eraser, asked: Sequence[Asked] = ASKED) -> Victim:
    weights = [Strength(0.1)]
    hit = erased(base, [eraser], weights, 3, 4.0)
    return Victim(base, hit, [CAT], asked, 3, 4.0, [eraser], weights)


def arrays(pictures: Sequence[Image]) -> list[np.ndarray]:
    return [np.asarray(picture, dtype=float) for picture in pictures]


def painted(victim: Victim, name: str, some: Sequence[Asked] = ASKED, **settings: Any) -> list[np.ndarray]:
    with ATTACKS.get(name)(victim, **{**QUICK[name], **settings}).on() as paint:
        return arrays(paint(some))


def state(base: Base) -> dict[str, torch.Tensor]:
    parts = {"denoiser": base.model, "text": base.pipe.text_encoder, "vae": base.pipe.vae}
    return {f"{part}.{k}": v.clone() for part, module in parts.items() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.filterwarnings("ignore:eraser of .* does not say which weights:UserWarning")
def test_attack_says_the_same_twice_and_leaves_the_base(name: str, emoji: Base, cat_eraser: Eraser) -> None:
    victim, before = victim_of(emoji, cat_eraser), state(emoji)
    found = painted(victim, name)
    again = painted(victim, name, ASKED[1:])
    for one, other in zip(found[1:], again, strict=True):
        assert np.abs(one - other).max() <= 1, "whatever else is in the batch, but for rounding"
    with victim.erased.on() as paint:
        plain = arrays(paint(ASKED))
    assert any(np.abs(a - b).max() > 1 for a, b in zip(found, plain, strict=True)), "it changes something"
    variant = ATTACKS.get(name)(victim, **QUICK[name])
    assert variant.name == f"attack-{name}"
    assert QUICK[name].items() <= variant.record.items()

    def interrupted() -> None:
        with variant.on():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    after = state(emoji)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    emoji.require_bare()


@pytest.mark.filterwarnings("ignore:eraser of .* does not say which weights:UserWarning")
def test_eraser_at_minus_one_is_the_base(emoji: Base, cat_eraser: Eraser) -> None:
    victim = victim_of(emoji, cat_eraser)
    with bare(emoji, 3, 4.0).on() as paint:
        before = arrays(paint(ASKED))
    for one, other in zip(painted(victim, "negative-weight"), before, strict=True):
        assert np.abs(one - other).max() <= 1
    amplified = painted(victim, "negative-weight", weight=-2.0)
    assert any(np.abs(a - b).max() > 5 for a, b in zip(amplified, before, strict=True))


@pytest.mark.filterwarnings("ignore:eraser of .* does not say which weights:UserWarning")
@pytest.mark.parametrize(
    ("name", "learn_in", "settings"),
    [
        ("fine-tune", "esd_lora.evaluation.attacks.weights", {"steps": 30, "rank": 4, "lr": 2e-3}),
        ("textual-inversion", "esd_lora.evaluation.attacks.words", {"steps": 30}),
        ("prompt-optimisation", "esd_lora.evaluation.attacks.words", {"steps": 20, "tokens": 3}),
    ],
)
def test_what_learns_lowers_its_loss(
    name: str, learn_in: str, settings: dict[str, Any], emoji: Base, cat_eraser: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []

    def noted(base: Base, parameters: Any, points: Any, told: Any, **asked: Any) -> list[float]:
        losses.extend(learning.learn(base, parameters, lambda _: points(0), told, **asked))  # the same pictures at every step
        return losses

    monkeypatch.setattr(f"{learn_in}.learn", noted)
    painted(victim_of(emoji, cat_eraser), name, **settings)
    assert len(losses) == settings["steps"]
    if name == "prompt-optimisation":
        assert len({round(loss, 4) for loss in losses}) > 2, "several prefixes were compared; the first may be the best"
    else:
        assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:eraser of .* does not say which weights:UserWarning")
def test_found_prefix_is_of_real_words(emoji: Base, cat_eraser: Eraser) -> None:
    victim = victim_of(emoji, cat_eraser)
    tokenizer = emoji.pipe.tokenizer
    assert isinstance(tokenizer, CLIPTokenizer)
    latents = torch.randn(2, *emoji.latent_shape(), generator=torch.Generator().manual_seed(0))
    found = best_prefix(victim, latents, ["a cat", "a cat"], tokens=3, steps=2, lr=0.5, seed=0)
    assert len(found) == 3
    assert set(found) <= set(readable_words(emoji))
    assert len(tokenizer(" ".join(found), add_special_tokens=False).input_ids) == 3


@pytest.mark.filterwarnings("ignore:eraser of .* does not say which weights:UserWarning")
def test_start_keeps_as_much_as_its_strength_lets_it(emoji: Base, cat_eraser: Eraser) -> None:
    victim = victim_of(emoji, cat_eraser)
    with bare(emoji, 3, 4.0).on() as paint:
        before = arrays(to_pictures(emoji, to_latents(emoji, paint(ASKED))))
    little, much = painted(victim, "latent-start", strength=0.01), painted(victim, "latent-start", strength=1.0)
    for start, near, far in zip(before, little, much, strict=True):
        assert np.abs(start - near).max() <= 1, "no step is gone again"
        assert np.abs(start - far).mean() > np.abs(start - near).mean() + 1


def test_words_in_the_place_of_the_concept() -> None:
    named = [(CAT, ("foo", "bar"))]
    assert renamed("a cat and two Kittens, catalogue", named) == "a foo bar and two foo bar, catalogue"
    assert renamed("an animal", named) == "foo bar an animal"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("token-noise", {"tokens": 0}, "tokens of an attack is 0"),
        ("negative-weight", {"weight": 1.0}, "Give one below 0"),
        ("fine-tune", {"steps": 0}, "steps of an attack is 0"),
        ("textual-inversion", {"vectors": 0}, "vectors of an attack is 0"),
        ("prompt-optimisation", {"pictures": 0}, "pictures of an attack is 0"),
        ("latent-start", {"strength": 0.0}, "strength of an attack is 0"),
        ("latent-start", {"strength": 1.5}, "strength of an attack is 1.5"),
    ],
)
def test_settings_are_checked(name: str, settings: dict[str, Any], message: str, emoji: Base, cat_eraser: Eraser) -> None:
    with pytest.raises(EsdLoraError, match=message):
        ATTACKS.get(name)(victim_of(emoji, cat_eraser), **settings)


@pytest.mark.parametrize("name", ["fine-tune", "textual-inversion", "prompt-optimisation", "latent-start"])
@pytest.mark.filterwarnings("ignore:eraser of .* does not say which weights:UserWarning")
def test_pictures_of_the_attacker_s_own(name: str, emoji: Base, cat_eraser: Eraser, tmp_path: Path) -> None:
    victim = victim_of(emoji, cat_eraser)
    with pytest.raises(EsdLoraError, match="there is no folder"):
        ATTACKS.get(name)(victim, folder=tmp_path / "none")
    with pytest.raises(EsdLoraError, match="holds no picture"):
        ATTACKS.get(name)(victim, folder=tmp_path)
    with bare(emoji, 3, 4.0).on() as paint:
        paint([ASKED[0]._replace(seed=77)])[0].save(tmp_path / "cat.png")
    variant = ATTACKS.get(name)(victim, folder=tmp_path, **QUICK[name])
    assert list(variant.record["files"]) == ["cat.png"]
    with variant.on() as painter:
        assert len(painter(ASKED[:1])) == 1
    with pytest.raises(EsdLoraError, match="can show one concept, and 2 were erased"):
        ATTACKS.get(name)(victim._replace(concepts=[CAT, CAT]), folder=tmp_path)


@pytest.mark.parametrize("kind", ["sdxl", "sd2-v"])
@pytest.mark.filterwarnings("ignore:eraser of .* does not say which weights:UserWarning")
def test_attacks_on_other_families(kind: str, tmp_path: Path) -> None:
    """Two text encoders, an Euler scheduler and v-prediction; the toy's tokens are single letters."""
    base = load_toy(save_toy(kind, tmp_path / "toy"))
    layers = list(base.family.modules(base.model, "xattn-kv"))[:2]
    hit = eraser_on(base.model, layers, "a cat", seed=1, rank=1, family=base.family.name, prediction_type=base.prediction_type)
    victim = victim_of(base, hit)
    for name in QUICK:
        for picture in painted(victim, name, ASKED[:1]):
            assert picture.shape == (64, 64, 3)
    base.require_bare()


@pytest.mark.filterwarnings("ignore:eraser of .* does not say which weights:UserWarning")
def test_attacks_that_a_family_cannot_serve(tmp_path: Path) -> None:
    base = load_toy(save_toy("flux-schnell", tmp_path / "toy"))
    layers = list(base.family.modules(base.model, "xattn"))[:2]
    victim = victim_of(
        base, eraser_on(base.model, layers, "a cat", family="flux", prediction_type="flow", prefix="transformer")
    )
    for name in ("textual-inversion", "prompt-optimisation", "latent-start"):
        with pytest.raises(EsdLoraError, match="made for Stable Diffusion and SDXL"):
            ATTACKS.get(name)(victim)
