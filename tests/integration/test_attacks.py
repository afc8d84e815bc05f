"""Attacks on erased models: they leave the base as it was, say the same twice, and bring back what they can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor, nn

from esd_lora import load_recipe, noising, train
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.erasers.stacking import Strength
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks import words
from esd_lora.evaluation.attacks.victim import Victim, captioned_latents
from esd_lora.evaluation.attacks.words import (
    readable_words,
    replace_names,
    search_prefix,
    spare_words,
    spare_words_meaning,
    tables_of,
)
from esd_lora.evaluation.cases import Case, object_cases
from esd_lora.evaluation.detectors.judge import Judge
from esd_lora.evaluation.registries import ATTACKS
from esd_lora.evaluation.variants import Variant, bare, erased
from esd_lora.latents import to_latents, to_pictures
from esd_lora.noising import noise_latents
from esd_lora.seeds import text_seed
from esd_lora.trajectory import pick
from random_erasers import eraser_on
from toys import load_toy, save_toy

_BATCH = noising.BATCH

CAT = ErasedConcept(name="a cat", synonyms=("kitten",), pairs=(), eta=1.0)
CASES = [Case(f"t-{i}", "target", prompt, i, "cat") for i, prompt in enumerate(("a cat", "a cat, noto style", "two kittens"))]
QUICK: Mapping[str, dict[str, Any]] = {
    "token-noise": {"tokens": 2},
    "negative-weight": {"weight": -0.5},
    "fine-tune": {"pictures": 2, "steps": 2, "rank": 1},
    "textual-inversion": {"pictures": 2, "steps": 2},
    "prompt-optimisation": {"pictures": 2, "steps": 2, "tokens": 2, "candidates": 2},
    "latent-start": {"strength": 0.5},
}
STEPS, GUIDANCE = 3, 4.0


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noising, "BATCH", 4)
    monkeypatch.setattr(words, "SEARCHED", 4)


def load(name: str, folder: Path) -> Base:
    return load_base("emoji", device="cpu") if name == "emoji" else load_toy(save_toy(name, folder / name))


@pytest.fixture(scope="module")
def emoji() -> Base:
    return load_base("emoji", device="cpu")


@pytest.fixture(scope="module", params=["sd", "sdxl", "emoji"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load(request.param, tmp_path_factory.mktemp("toys"))


def victim_of(base: Base, eraser: Eraser | None = None, cases: Sequence[Case] = CASES, strength: float = 0.1) -> Victim:
    """A base with a random update, which changes every picture and claims to be an eraser of cats."""
    if eraser is None:
        layers = base.family.modules(base.model, "xattn")
        own = {"family": base.family.name, "prediction_type": base.prediction_type, "prefix": base.family.denoiser}
        eraser = eraser_on(base.model, layers, "a cat", seed=3, rank=1, base_hashes=base.hashes(layers), **own)
    at = [Strength(strength)]
    return Victim(base, erased(base, [eraser], at, STEPS, GUIDANCE), [CAT], cases, STEPS, GUIDANCE, [eraser], at)


def attack(victim: Victim, name: str, **settings: Any) -> Variant:
    return ATTACKS.get(name)(victim, **{**QUICK[name], **settings})


def painted(variant: Variant, cases: Sequence[Case] = CASES) -> np.ndarray:
    with variant.on() as paint:
        return pixels(paint(cases))


def pixels(pictures: Sequence[Image]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=float) for picture in pictures])


@contextmanager
def same_after(base: Base) -> Iterator[None]:
    """Sees that every weight is as before, bit for bit, and that no adapter, hook or gradient is left."""
    parts = {name: part for name, part in base.pipe.components.items() if isinstance(part, nn.Module)}
    before = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    yield
    base.require_bare()
    for name, part in parts.items():
        after = part.state_dict()
        assert after.keys() == before[name].keys()
        assert all(torch.equal(value, before[name][key]) for key, value in after.items()), name
        # Transformers leaves hooks of its own on other layers.
        assert not any(module._forward_hooks for module in part.modules() if isinstance(module, nn.Embedding)), name
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in part.parameters())


@pytest.mark.parametrize("name", QUICK)
def test_attack_says_the_same_twice_and_leaves_the_base(name: str, each: Base) -> None:
    victim = victim_of(each)
    variant = attack(victim, name)
    with same_after(each):
        found = painted(variant)
        again = painted(attack(victim, name))
        assert np.array_equal(found, again)
        part = painted(variant, CASES[1:])
        assert np.abs(found[1:] - part).max() <= 1, "whatever else is in the batch, but for rounding"
        assert variant.name == f"attack-{name}"
        assert QUICK[name].items() <= variant.record.items()
        assert variant.record["victim"] == victim.erased.record
    if each.id == "emoji":
        assert np.abs(found - painted(victim.erased)).max() > 1, "it changes something"


@pytest.mark.parametrize("name", QUICK)
def test_attack_that_is_broken_off_leaves_the_base(name: str, each: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = attack(victim_of(each), name)
    with same_after(each):
        with pytest.raises(ZeroDivisionError), variant.on():
            _ = 1 / 0
        if name not in ("token-noise", "negative-weight"):  # these prepare nothing
            predict, calls = Base.predict, [0]

            def failing(self: Base, *args: Any) -> Tensor:
                calls[0] += 1
                if calls[0] == 2:
                    raise KeyboardInterrupt
                return predict(self, *args)

            monkeypatch.setattr(Base, "predict", failing)
            with pytest.raises(KeyboardInterrupt):
                painted(variant)


def test_other_seeds_other_attacks(emoji: Base) -> None:
    victim = victim_of(emoji)
    for name in ("token-noise", "textual-inversion", "latent-start"):
        assert not np.array_equal(painted(attack(victim, name)), painted(attack(victim, name, seed=1))), name


def test_eraser_at_minus_one_is_the_base(each: Base) -> None:
    victim = victim_of(each)
    before = painted(bare(each, STEPS, GUIDANCE))
    assert np.abs(painted(attack(victim, "negative-weight", weight=-1.0)) - before).max() <= 1
    assert np.abs(painted(attack(victim, "negative-weight", weight=-2.0)) - before).max() > 1


@pytest.mark.parametrize("kind", ["emoji", "sd2-v", "sdxl", "sd3"])
def test_target_is_what_leads_back_to_the_picture(kind: str, tmp_path: Path) -> None:
    base = load(kind, tmp_path)
    latents = torch.randn(3, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
    points = noise_latents(base, latents, STEPS, 8, torch.Generator().manual_seed(1))
    scheduler: Any = base.family.scheduler(base.pipe, STEPS, base.latent_shape())
    assert set(points.t.tolist()) <= set(scheduler.timesteps.tolist())
    assert sorted(points.lesson.tolist()[:6]) != points.lesson.tolist()[:6]
    assert {lesson: points.lesson.tolist().count(lesson) for lesson in range(3)}.keys() == {0, 1, 2}
    for i, (x_t, t, lesson, target) in enumerate(zip(*points[:4], strict=True)):
        if base.prediction_type == "flow":
            x_0 = x_t - t / 1000 * target
        else:
            x_0 = scheduler.step(target[None], int(t), x_t[None]).pred_original_sample[0]
        assert torch.allclose(x_0, latents[lesson], atol=1e-3), i
    early = noise_latents(base, latents, STEPS, 8, torch.Generator().manual_seed(1), share=0.3)
    assert early.t.unique().tolist() == [scheduler.timesteps.max().item()]


@pytest.mark.parametrize("kind", ["emoji", "sdxl", "sd3"])
def test_latents_are_the_pipeline_s(kind: str, tmp_path: Path) -> None:
    base = load(kind, tmp_path)
    if kind == "sdxl":
        base.pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 1.0, 0.5, 3.0])
    side = base.latent_shape()[-1] * base.pipe.vae_scale_factor
    settings: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": 2, "guidance_scale": 2.0}
    latents, found = (
        base.pipe("a cat", generator=torch.Generator().manual_seed(5), output_type=kind, **settings).images
        for kind in ("latent", "pil")
    )
    assert np.abs(pixels(to_pictures(base, latents)) - pixels(found)).max() <= 1
    vae = base.pipe.vae
    x = torch.from_numpy(pixels(found) / 127.5 - 1).permute(0, 3, 1, 2).float()
    mean = vae.encode(x).latent_dist.mode()
    # Through the decoder's own constants the other way round: what it is given is what was encoded.
    given: list[Tensor] = []
    hook = vae.decoder.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    to_pictures(base, to_latents(base, found))
    hook.remove()
    expected = mean if vae.post_quant_conv is None else vae.post_quant_conv(mean)
    assert torch.allclose(given[0], expected, atol=1e-4)


def test_half_precision_vae_is_put_back(emoji: Base) -> None:
    before = {key: value.clone() for key, value in emoji.pipe.vae.state_dict().items()}
    pictures = to_pictures(emoji, torch.zeros(1, *emoji.latent_shape()))
    exact = to_latents(emoji, pictures)
    try:
        emoji.pipe.vae.to(torch.bfloat16)
        half = to_latents(emoji, pictures)
        assert emoji.pipe.vae.dtype == torch.bfloat16
        assert half.dtype == torch.float32
        assert torch.allclose(half, exact, atol=0.2)
    finally:
        emoji.pipe.vae.to(torch.float32)
        emoji.pipe.vae.load_state_dict(before)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("name", ["fine-tune", "textual-inversion"])
def test_what_learns_lowers_its_loss(name: str, kind: str, tmp_path: Path) -> None:
    """On noise that it did not learn on."""
    base = load(kind, tmp_path)
    victim = victim_of(base)
    latents, captions = captioned_latents(victim, 2, [], 0)
    points = noise_latents(base, latents, victim.steps, 32, torch.Generator().manual_seed(99))
    named = [(CAT, spare_words(victim, 1))]
    prompts = captions if name == "fine-tune" else [replace_names(caption, named) for caption in captions]

    def loss(prompts: Sequence[str]) -> float:
        with torch.no_grad():
            prediction = base.predict(points.x_t, points.t, pick(base.encode(prompts), points.lesson))
        return (prediction - points.target).square().mean().item()

    with victim.erased.on():
        before = loss(captions)
    variant = attack(victim, name, steps=12, **({"rank": 4, "lr": 3e-3} if name == "fine-tune" else {}))
    with variant.on():
        assert loss(prompts) < before


def test_prefix_is_of_real_words_and_lowers_the_loss(each: Base) -> None:
    victim = victim_of(each)
    latents, captions = captioned_latents(victim, 2, [], 0)
    settings = {"tokens": 3, "candidates": 4, "seed": 0}
    with same_after(each), victim.erased.on():
        found, losses = search_prefix(victim, latents, captions, steps=5, **settings)
        start, _ = search_prefix(victim, latents, captions, steps=5, **{**settings, "candidates": 1, "seed": 1})
    assert len(found) == 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert start != found
    assert set(found) <= set(readable_words(each))
    for name in ("tokenizer", "tokenizer_2"):
        if tokenizer := getattr(each.pipe, name, None):
            ids = tokenizer(" ".join(found), add_special_tokens=False).input_ids
            assert len(ids) == 3
            assert tokenizer.decode(ids).split() == found


def test_words_are_given_another_meaning_in_every_encoder(each: Base) -> None:
    tables = tables_of(each, ["q", "z"])
    assert len(tables) == (2 if each.family.name == "sdxl" else 1)
    own = [table.embeddings(["b", "c"]).requires_grad_() for table in tables]
    with spare_words_meaning(tables, own):
        found = each.encode(["a q z", "z on a q"])
        condition = each.encode_with_gradient(["a q z"])
        torch.stack([value.sum() for value in condition.values()]).sum().backward()
    plain = each.encode(["a b c", "c on a b"])
    assert all(torch.allclose(found[name], plain[name], atol=1e-5) for name in plain)
    assert all(vectors.grad is not None and vectors.grad.abs().amin(1).min() > 0 for vectors in own)


def test_readable_words(each: Base) -> None:
    found = readable_words(each)
    assert all(word.isascii() and word.isalpha() and word == word.lower() for word in found)
    assert len(found) == len(set(found))
    assert {"a", "q"} <= set(found)
    if each.id == "emoji":
        assert {"cat", "umbrella"} <= set(found)
        assert not {"ca", "mbr", "startoftext"} & set(found)
    assert not set(spare_words(victim_of(each), 3)) & {"a", "two", "cat", "noto", "style"}
    with pytest.raises(EsdLoraError, match="needs 999999 words"):
        spare_words(victim_of(each), 999_999)


def test_noise_around_a_prompt(emoji: Base) -> None:
    passed: list[Case] = []

    def noting(cases: Sequence[Case]) -> list[Image]:
        passed.extend(cases)
        return []

    @contextmanager
    def on() -> Iterator[Any]:
        yield noting

    victim = victim_of(emoji)._replace(erased=Variant("erased", {}, on))
    with attack(victim, "token-noise", tokens=3).on() as paint:
        paint(CASES)
    for case, before in zip(passed, CASES, strict=True):
        assert case._replace(prompt=before.prompt) == before
        first, second, *middle, last = case.prompt.split(" ")
        assert " ".join(middle) == before.prompt
        assert {first, second, last} <= set(readable_words(emoji)) - {"cat"}
    assert len({case.prompt.split(" ")[0] for case in passed}) > 1


def test_words_in_the_place_of_the_concept() -> None:
    named = [(CAT, ("foo", "bar"))]
    assert replace_names("a cat and two Kittens, catalogue", named) == "a foo bar and two foo bar, catalogue"
    assert replace_names("an animal", named) == "foo bar an animal"
    dog = ErasedConcept(name="dog", synonyms=("hot dog",), pairs=(), eta=1.0)
    assert replace_names("a hot dog beside a cat", [*named, (dog, ("baz",))]) == "a baz beside a foo bar"
    assert replace_names("a tree", [*named, (dog, ("baz",))]) == "foo bar baz a tree"


def test_start_keeps_as_much_as_its_strength_lets_it(each: Base) -> None:
    victim = victim_of(each)
    base = painted(bare(each, STEPS, GUIDANCE))
    with bare(each, STEPS, GUIDANCE).on() as paint:
        start = pixels(to_pictures(each, to_latents(each, paint(CASES))))
    assert np.abs(start - painted(attack(victim, "latent-start", strength=0.01))).max() <= 1, "no step is gone again"
    if each.id == "emoji":
        assert np.abs(start - base).mean() < 10, "but for the VAE it is the base's own picture"
        apart = [np.abs(start - painted(attack(victim, "latent-start", strength=s))).mean() for s in (0.34, 0.67, 1.0)]
        assert apart == sorted(apart)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("token-noise", {"tokens": 0}, "tokens of an attack is 0"),
        ("negative-weight", {"weight": 1.0}, "Give one below 0"),
        ("fine-tune", {"steps": 0}, "steps of an attack is 0"),
        ("fine-tune", {"rank": 0}, "rank of an attack is 0"),
        ("textual-inversion", {"vectors": 0}, "vectors of an attack is 0"),
        ("prompt-optimisation", {"pictures": 0}, "pictures of an attack is 0"),
        ("prompt-optimisation", {"candidates": -1}, "candidates of an attack is -1"),
        ("latent-start", {"strength": 0.0}, "strength of an attack is 0"),
        ("latent-start", {"strength": 1.5}, "strength of an attack is 1.5"),
    ],
)
def test_settings_are_checked(name: str, settings: dict[str, Any], message: str, emoji: Base) -> None:
    with pytest.raises(EsdLoraError, match=message):
        attack(victim_of(emoji), name, **settings)


def test_negative_weight_needs_an_eraser(emoji: Base) -> None:
    with pytest.raises(EsdLoraError, match="no eraser is given"):
        attack(victim_of(emoji)._replace(erasers=[], weights=[]), "negative-weight")


@pytest.mark.parametrize("name", ["fine-tune", "textual-inversion", "prompt-optimisation", "latent-start"])
def test_pictures_of_the_attacker_s_own(name: str, emoji: Base, tmp_path: Path) -> None:
    victim = victim_of(emoji)
    with pytest.raises(EsdLoraError, match="there is no folder"):
        attack(victim, name, folder=tmp_path / "none")
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(EsdLoraError, match="holds no picture"):
        attack(victim, name, folder=tmp_path)
    with bare(emoji, STEPS, GUIDANCE).on() as paint:
        paint([CASES[0]._replace(seed=77)])[0].resize((96, 70)).save(tmp_path / "cat.png")
    variant = attack(victim, name, folder=tmp_path)
    assert list(variant.record["files"]) == ["cat.png"]
    assert painted(variant, CASES[:1]).shape == (1, 64, 64, 3)
    with pytest.raises(EsdLoraError, match="can show one concept, and 2 were erased"):
        attack(victim._replace(concepts=[CAT, CAT]), name, folder=tmp_path)
    (tmp_path / "cat.png").write_bytes(b"not a picture")
    with same_after(emoji), pytest.raises(EsdLoraError, match="cannot be read as a picture"):
        painted(attack(victim, name, folder=tmp_path), CASES[:1])


def test_what_is_learnt_from(emoji: Base) -> None:
    """The base's pictures for prompts from all over the list, with other seeds."""
    cases = [Case(f"t-{i}", "target", f"a cat on a {color} background", 7) for i, color in enumerate(("red", "blue", "pink"))]
    victim = victim_of(emoji, cases=cases)
    latents, captions = captioned_latents(victim, 2, [], 0)
    assert captions == [cases[0].prompt, cases[1].prompt]
    seeds = [text_seed("picture", 0, i, 7) for i in range(2)]
    expected = painted(bare(emoji, STEPS, GUIDANCE), [case._replace(seed=s) for case, s in zip(cases, seeds, strict=False)])
    assert np.abs(pixels(to_pictures(emoji, latents)) - expected).mean() < 10
    assert len(captioned_latents(victim, 5, [], 0)[1]) == 5


@pytest.mark.parametrize("kind", ["sd2-v", "sd3", "flux-dev", "flux2-klein", "z-image"])
def test_other_predictions_are_fine_tuned_too(kind: str, tmp_path: Path) -> None:
    base = load(kind, tmp_path)
    with same_after(base):
        assert painted(attack(victim_of(base), "fine-tune"), CASES[:1]).shape == (1, 64, 64, 3)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux-dev", "flux2-klein", "z-image"])
def test_latents_are_decoded_as_the_pipeline_decodes_them(kind: str, tmp_path: Path) -> None:
    """Shifted and scaled, by a number or by place in a patch; packed where the pipeline packs them."""
    base = load(kind, tmp_path)
    latents = torch.randn(1, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
    at_the_end = latents
    if kind == "flux-dev":
        at_the_end = base.pipe._pack_latents(latents, *latents.shape)
    elif kind == "flux2-klein":
        at_the_end = base.pipe._pack_latents(base.pipe._patchify_latents(latents))
    decoded, decode = list[Tensor](), base.pipe.vae.decode

    def record(x: Tensor, *args: object, **kwargs: object) -> object:
        decoded.append(x)
        return decode(x, *args, **kwargs)

    base.pipe.vae.decode = record
    width, height = base.picture_size()
    call_kwargs = {"width": width, "height": height, **base.family.call_kwargs(base.pipe)}
    base.pipe(prompt="a cat", num_inference_steps=1, callback_on_step_end=lambda *_: {"latents": at_the_end}, **call_kwargs)
    to_pictures(base, latents)
    torch.testing.assert_close(decoded[1], decoded[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["flux-dev", "sd3", "sana", "wan"])
def test_attacks_that_a_family_cannot_serve(kind: str, tmp_path: Path) -> None:
    victim = victim_of(load(kind, tmp_path))
    for name in ("textual-inversion", "prompt-optimisation", "latent-start"):
        with pytest.raises(EsdLoraError, match="made for Stable Diffusion and SDXL"):
            attack(victim, name)
    if kind in ("sana", "wan"):
        with pytest.raises(EsdLoraError, match="drawn from CLIP's"):
            attack(victim, "token-noise")
        with pytest.raises(EsdLoraError, match=r"has a VAE of kind Autoencoder(DC|KLWan)"):
            attack(victim, "fine-tune")
    else:
        assert len(painted(attack(victim, "token-noise"), CASES[:1])) == 1


@pytest.mark.slow
def test_an_erased_cat_is_brought_back(emoji: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noising, "BATCH", _BATCH)
    concepts = [{"name": "cat", "prompts": ["a cat"], "anchor": "a house"}]
    recipe = load_recipe("instant", {"train.preview_every": 0}, concepts=concepts)
    eraser = train(recipe, base=emoji, progress=False)
    cases = [case._replace(id=f"t-{i}", role="target", label="cat") for i, case in enumerate(object_cases("cat", {"a cat"}, 6))]
    victim = victim_of(emoji, eraser, cases, strength=1.0)._replace(concepts=eraser.header.concepts, steps=8)
    victim = victim._replace(erased=erased(emoji, [eraser], victim.weights, 8, GUIDANCE))
    judge = Judge("emoji")

    def cats(variant: Variant) -> int:
        with variant.on() as paint:
            return sum(verdict.object == "cat" for verdict in judge(paint(cases)))

    assert cats(bare(emoji, 8, GUIDANCE)) == 6
    assert cats(victim.erased) <= 1
    assert cats(attack(victim, "negative-weight", weight=-1.0)) == 6
    assert cats(attack(victim, "fine-tune", pictures=4, steps=16, rank=4, lr=3e-3)) >= 4
    assert cats(attack(victim, "latent-start", strength=0.4)) >= 4
    assert cats(attack(victim, "latent-start", strength=1.0)) <= 2
