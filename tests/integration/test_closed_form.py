"""The closed form: what it minimises, the LoRA that it becomes, whom it names, and anchors that choose themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from esd_lora import lessons, training
from esd_lora.adapter import ADAPTER, adapter_ranks, add_adapter, applied, read_pairs, set_pairs
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.closed_form import choose_anchors, kept_texts, moments_of, plain_prompts, solve_text, unlisted_moments
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import Solved
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import object_cases
from esd_lora.evaluation.detectors.judge import Judge
from esd_lora.lessons import Lesson, plan
from esd_lora.pictures import paint
from esd_lora.pseudo_words import PseudoWords
from esd_lora.recipe import ClosedFormSpec, Recipe
from esd_lora.recipe_files import load_recipe
from esd_lora.text_rows import influence, rows_of, second_moment, way_moments
from esd_lora.training import prepare_prompts, train
from esd_lora.trajectory import Condition
from tiny import tiny_recipe
from toys import load_toy, save_toy

KEEP = ["a dog", "a hat", "a dog in a park", "a hat in a park", "a car in a park", "a car", "a photo"]
SPEC = ClosedFormSpec(keep=0.7, push=0.5, ridge=1e-2)
LESSONS = [
    Lesson("a cat", "a cat", "a dog", 0.0),
    Lesson("a photo of a cat", "a photo of a cat", "a photo of a dog", 0.0),
    *(Lesson(prompt, prompt, prompt, 0.0) for prompt in KEEP),
]


@pytest.fixture
def base(tiny_dir: Path) -> Base:
    return load_base(tiny_dir)


@pytest.fixture(scope="module")
def emoji() -> Base:
    return load_base("emoji")


def adapted(base: Base) -> dict[str, Any]:
    return {path: layer for path, layer in base.model.named_modules() if ADAPTER in getattr(layer, "lora_A", ())}


def text_layers(base: Base, rank: int = 1000) -> dict[str, int]:
    return dict.fromkeys(base.family.modules(base.model, "xattn-kv"), rank)


def test_it_minimises_what_it_says(base: Base) -> None:
    """Its gradient is zero, written out row by row for one layer, push and all."""
    style = [Lesson("a cat in ink", "a cat in ink", "a cat", 1.0), *LESSONS[:1]]
    lessons = [*style, *LESSONS[2:]]
    updates, _ = solve_text(base, base.encode, lessons, text_layers(base), SPEC)
    path, update = next(iter(updates.items()))
    weight = dict(base.weights(updates))[path].detach().double()
    delta = (update.up.double() @ update.down.double()).requires_grad_()
    kept = kept_texts(lessons)
    rows = {text: base.encode([text])["prompt_embeds"][0].double() for text in {*kept, *(t for x in style for t in x[:3])}}
    erased = torch.tensor(0.0, dtype=torch.float64)
    for lesson, push in zip(style, (0.5, 0.0), strict=True):  # "a cat" is in the prompt; a dog is not
        c, a = rows[lesson.prompt], rows[lesson.anchor]
        wanted = (1 + push) * (a - c) @ weight.T
        erased = erased + (c @ delta.T - wanted).square().sum() / (len(c) * len(style))
    times = {text: 4 if text in plain_prompts(kept) else 1 for text in kept}  # with nothing around them
    square = sum(times[text] * rows[text].square().mean() for text in kept) / sum(times.values())
    moved = torch.stack([times[text] * (rows[text] @ delta.T).square().sum() for text in kept]).sum()
    held = moved / sum(times[text] * len(rows[text]) for text in kept)
    loss = erased + SPEC.keep * held + SPEC.ridge * square * delta.square().sum()
    (gradient,) = torch.autograd.grad(loss, delta, retain_graph=True)
    (alone,) = torch.autograd.grad(erased, delta)  # what the kept rows and the ridge hold in balance
    assert float(gradient.norm()) < 1e-4 * float(alone.norm())


def test_keep_weighs_what_moves_against_what_is_left(base: Base) -> None:
    rows = rows_of(base.encode, "prompt_embeds")
    moments = way_moments(rows, [("a cat", "a dog")], second_moment(rows, KEEP))
    changes = [moments.solve(ClosedFormSpec(keep=keep, push=0, ridge=1e-9))[0] for keep in (0, 0.1, 1, 10, 1e9)]
    left, moved = [moments.left(change) for change in changes], [moments.moved(change) for change in changes]
    assert left == sorted(left)
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 1e-3 < 0.1 < moved[0]
    assert left[0] < 0.1 < 0.99 < left[-1]


def test_measures_are_those_of_the_rows(base: Base) -> None:
    rows = rows_of(base.encode, "prompt_embeds")
    pairs = [("a cat", "a dog"), ("a photo of a cat", "a photo of a dog")]
    moments = way_moments(rows, pairs, second_moment(rows, KEEP))
    change, _ = moments.solve(SPEC)
    c, a = (rows(list(prompts)) for prompts in zip(*pairs, strict=True))
    r = rows(KEEP)
    assert moments.left(change) == pytest.approx(float((c @ change.T - (a - c)).norm() / (a - c).norm()), rel=1e-9)
    assert moments.moved(change) == pytest.approx(float((r @ change.T).norm() / r.norm()), rel=1e-9)


def test_text_with_pseudo_words_stands_for_what_is_in_no_list(base: Base) -> None:
    """Against the moments of another draw of words: the same weight of kept text moves those less."""
    layers = dict.fromkeys((path for path in base.family.modules(base.model, "xattn") if base.family.reads_text(path)), 8)
    moments = unlisted_moments(base, KEEP)
    assert moments.keys() == {"prompt_embeds"}
    assert torch.equal(moments["prompt_embeds"], unlisted_moments(base, KEEP)["prompt_embeds"]), "the same every time"
    words = PseudoWords(base, KEEP).encode(KEEP * 4, torch.Generator().manual_seed(5))["prompt_embeds"].flatten(0, 1)

    def moved(spec: ClosedFormSpec) -> float:
        pairs, solved = solve_text(base, base.remembering(), LESSONS, layers, spec, unlisted=moments)
        assert solved is not None
        assert solved.left < 0.9
        return sum(float((words @ pair.delta().T).square().sum()) for pair in pairs.values())

    assert moved(SPEC.model_copy(update={"unlisted": 1.0})) < 0.7 * moved(SPEC)


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_scales_of_text_and_weights_make_no_difference(base: Base, scale: float) -> None:
    """A model that keeps its text embeddings four times as large, and the weights that read them a fourth, is the same one."""
    layers = text_layers(base, 3)
    updates, solved = solve_text(base, base.encode, LESSONS, layers, SPEC)
    with torch.no_grad():
        for _, weight in base.weights(layers):
            weight.div_(scale)

    def encode(prompts: Sequence[str]) -> Condition:
        return {name: value * scale for name, value in base.encode(prompts).items()}

    scaled, solved_scaled = solve_text(base, encode, LESSONS, layers, SPEC)
    assert solved is not None
    assert solved_scaled is not None
    assert solved_scaled.left == pytest.approx(solved.left, rel=1e-6)
    assert solved_scaled.moved == pytest.approx(solved.moved, rel=1e-6)
    for path, pair in updates.items():
        effect, same = (each.up.double() @ each.down.double() for each in (pair, scaled[path]))
        assert float((same * scale - effect).norm()) < 1e-4 * float(effect.norm())


def test_all_layers_share_one_change_of_the_text(base: Base) -> None:
    """What a layer makes of the text with its update is what it made of the changed text before."""
    updates, _ = solve_text(base, base.encode, LESSONS, text_layers(base), SPEC)
    rows = rows_of(base.encode, "prompt_embeds")
    moments = moments_of(rows, LESSONS, SPEC)
    change, _ = moments.solve(SPEC)
    assert updates.keys() == text_layers(base).keys()
    for path, weight in base.weights(updates):
        update = updates[path].up.double() @ updates[path].down.double()
        expected = weight.detach().double() @ change
        assert float((update - expected).norm()) < 1e-5 * float(expected.norm())


def test_a_lower_rank_is_the_best_one_for_what_is_read(base: Base) -> None:
    """Cut in the metric of the text: as near as Eckart and Young allow, and nearer than by cutting the matrix itself."""
    updates, _ = solve_text(base, base.encode, LESSONS, text_layers(base, 2), SPEC)
    whole, _ = solve_text(base, base.encode, LESSONS, text_layers(base), SPEC)
    rows = rows_of(base.encode, "prompt_embeds")
    moments = moments_of(rows, LESSONS, SPEC)
    root = moments.solve(SPEC)[1]
    for path, pair in updates.items():
        assert pair.rank == 2
        exact, cut = (each.up.double() @ each.down.double() for each in (whole[path], pair))
        u, size, v = torch.linalg.svd(exact, full_matrices=False)
        lost = float(((exact - cut) @ root).norm())
        assert lost == pytest.approx(float(torch.linalg.svdvals(exact @ root)[2:].norm()), rel=0.02)
        assert lost < float(((exact - (u[:, :2] * size[:2]) @ v[:2]) @ root).norm())


def test_adapter_carries_it_and_gives_it_back(base: Base) -> None:
    """Set on an adapter of a higher rank and another scale, it is the same update; the other layers stay zero."""
    recipe = tiny_recipe(base.id, lora={"rank": 6, "alpha": 3})
    add_adapter(base, base.family.modules(base.model, "xattn"), recipe.lora, 0)
    ranks = adapter_ranks(base)
    assert set(ranks.values()) == {6}
    updates, _ = solve_text(base, base.encode, LESSONS, dict.fromkeys(ranks, 2), SPEC)
    set_pairs(base, updates)
    for path, pair in read_pairs(base.model).items():
        expected = updates[path].up @ updates[path].down if path in updates else torch.zeros(pair.shape)
        assert torch.allclose(pair.up @ pair.down, expected, atol=1e-6)
    # `down` keeps its size, which a training measures its rate in.
    sizes = {path: float(layer.lora_A[ADAPTER].weight.detach().square().mean().sqrt()) for path, layer in adapted(base).items()}
    for layer in adapted(base).values():
        layer.lora_A[ADAPTER].weight.data.mul_(7)
    set_pairs(base, updates)
    for path, layer in adapted(base).items():
        assert float(layer.lora_A[ADAPTER].weight.detach().square().mean().sqrt()) == pytest.approx(7 * sizes[path], rel=1e-4)
    for path, pair in read_pairs(base.model).items():
        expected = updates[path].up @ updates[path].down if path in updates else torch.zeros(pair.shape)
        assert torch.allclose(pair.up @ pair.down, expected, atol=1e-6)
    set_pairs(base, {})
    assert all(not pair.up.any() for pair in read_pairs(base.model).values())


@pytest.mark.parametrize(
    "kind",
    [
        "sd2-v",
        "sdxl",
        "sd3",
        "flux-dev",
        "pixart",
        "lumina2",
        "qwen-image",
        "kolors",
        "flux2-klein",
        "flux2-dev",
        "z-image",
        "wan",
    ],
)
def test_layers_read_what_is_said_of_them(kind: str, tmp_path: Path) -> None:
    """What the denoiser hands to them is a tensor of the condition, maybe behind a norm, whatever the latents and the time."""
    base = load_toy(save_toy(kind, tmp_path / kind))
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0].detach()}))
        for path, module in base.family.modules(base.model, "xattn").items()
        if base.family.text_read_by(path)
    ]
    prompts = ["a cat", "a dog in a park"]
    condition = base.encode(prompts)
    with torch.no_grad():
        base.predict(torch.randn(2, *base.latent_shape()), torch.full((2,), 500), condition)
    for hook in hooks:
        hook.remove()
    assert len(inputs) == len(hooks) > 0
    with torch.no_grad():
        condition = base.family.as_read(base.pipe, condition)
    for path, text in inputs.items():
        expected = condition[str(base.family.text_read_by(path))]
        if kind == "z-image":  # reads texts one after the other, each filled up to 32 tokens with its last one
            lengths = condition["prompt_attention_mask"].sum(1).tolist()
            filled = [
                torch.cat([each[:n], each[n - 1 : n].expand(-n % 32, -1)]) for each, n in zip(expected, lengths, strict=True)
            ]
            expected = torch.cat(filled)
        else:  # where there is a mask, what all have of padding is left out
            expected = expected[:, : text.shape[1]]
        torch.testing.assert_close(text, expected)


@pytest.mark.parametrize(
    "kind",
    ["sdxl", "sd3", "flux-dev", "pixart", "lumina2", "qwen-image", "kolors", "flux2-klein", "flux2-dev", "z-image", "wan"],
)
def test_every_family_is_solved(kind: str, tmp_path: Path) -> None:
    base = load_toy(save_toy(kind, tmp_path / kind))
    recipe = load_recipe("instant", {"train.preview_every": 0}, base=base.id, concepts=["a cat"], preserve=KEEP)
    eraser = train(recipe, base=base, progress=False)
    (solved,) = eraser.header.solved
    assert solved.left < 1
    moved = {path for path, pair in eraser.pairs.items() if pair.up.any()}
    assert moved == {path for path in eraser.pairs if base.family.text_read_by(path)}


@pytest.mark.parametrize("kind", ["pixart", "lumina2"])
def test_padding_that_a_mask_leaves_out_counts_for_nothing(kind: str, tmp_path: Path) -> None:
    base = load_toy(save_toy(kind, tmp_path / kind))
    layers = {path: 4 for path in base.family.modules(base.model, "xattn") if base.family.text_read_by(path)}

    def encode(prompts: Sequence[str]) -> Condition:
        """The prompts with something else where nothing is read."""
        condition = base.encode(prompts)
        read = condition["prompt_attention_mask"].bool()[..., None]
        return {**condition, "prompt_embeds": torch.where(read, condition["prompt_embeds"], 7.0)}

    for expected, other in zip(
        *(solve_text(base, each, LESSONS, layers, SPEC)[0].values() for each in (base.encode, encode)), strict=True
    ):
        torch.testing.assert_close(other.delta(), expected.delta())
        assert expected.up.any()
    prompts = ["a cat", "a dog"]
    noise, t = torch.randn(2, *base.latent_shape(), generator=torch.Generator().manual_seed(0)), torch.tensor([500, 500])
    with torch.no_grad():
        predictions = [base.predict(noise, t, each(prompts)) for each in (base.encode, encode)]
    torch.testing.assert_close(predictions[0], predictions[1], msg="the denoiser itself reads none of it")


def test_no_prompt_is_encoded_twice(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    def encode(prompts: Sequence[str], guidance: float = 1.0) -> Condition:
        encoded.extend(prompts)
        return type(base).encode(base, prompts, guidance)

    monkeypatch.setattr(base, "encode", encode)
    remembering = base.remembering()
    remembering(["a cat", "a dog", "a cat"])
    condition = remembering(["a hat", "a dog"])
    assert encoded == ["a cat", "a dog", "a hat"]
    torch.testing.assert_close(condition["prompt_embeds"], type(base).encode(base, ["a hat", "a dog"])["prompt_embeds"])


@pytest.mark.parametrize("preset", ["instant", "fast"])
def test_a_training_s_text_is_encoded_once(preset: str, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is near, and which anchor costs least, is told by what is encoded for the closed form anyway."""
    encoded: Counter[str] = Counter()
    encode = type(base.family).encode

    def counted(self: Any, pipe: Any, prompts: Sequence[str]) -> Condition:
        encoded.update(prompts)
        return encode(self, pipe, prompts)

    monkeypatch.setattr(type(base.family), "encode", counted)
    recipe = load_recipe(preset, {"closed_form.unlisted": 0.0}, base=base.id, concepts=["a cat"], preserve=KEEP)
    training.prepare_prompts(base, recipe, ())
    assert {text: count for text, count in encoded.items() if count > 1 and text} == {}
    assert set(KEEP) <= encoded.keys()


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "sana"])
def test_nearness_is_the_same_of_what_is_known(kind: str, tmp_path: Path) -> None:
    base = load_toy(save_toy(kind, tmp_path / kind))
    known = base.remembering()
    known(KEEP)
    torch.testing.assert_close(base.directions(KEEP, known), base.directions(KEEP))


def test_kept_texts() -> None:
    assert kept_texts(LESSONS[:4]) == ["a dog", "a hat", "a photo of a dog", ""]


def test_plain_prompts() -> None:
    prompts = ["a dog", "a dog in a park", "ink dog", "a noisy grey old dog", "ink style", "dogs", ""]
    assert plain_prompts(prompts) == ["a dog", "ink style"]


def test_lessons_that_replace() -> None:
    def replaces(prompt: str, anchor: str) -> bool:
        return Lesson(prompt, prompt, anchor, 1.0).replaces

    assert replaces("a cat", "a dog")
    assert replaces("a cat in ink style", "a cat in noto style")
    assert not replaces("a cat", "")
    assert not replaces("a cat in ink style", "a cat")
    assert not replaces("a twemoji drawing of a cat", "a drawing of a cat")


def test_an_anchor_is_a_kept_prompt_that_names_no_concept(base: Base) -> None:
    recipe = tiny_recipe(base.id, concepts=["a cat", "a hat"], preserve=KEEP, anchor="auto", frames="auto")
    anchors = choose_anchors(recipe, base, base.encode)
    assert anchors.keys() == {"a cat", "a hat"}
    assert set(anchors.values()) <= {"a dog", "a car", "a photo"}
    assert recipe.anchored(anchors).concepts[0].pairs() == [("a cat", anchors["a cat"])]


def test_what_other_erasers_erase_is_no_anchor(base: Base) -> None:
    free = tiny_recipe(base.id, preserve=KEEP, anchor="auto")
    chosen = choose_anchors(free, base, base.encode)["a cat"]
    other = choose_anchors(free.model_copy(update={"avoid": (chosen,)}), base, base.encode)["a cat"]
    assert chosen != other != ""


def test_another_word_for_the_concept_is_no_anchor(base: Base) -> None:
    """A kitten that the text encoder hardly tells from a cat costs least to arrive at, and erases nothing."""

    def encode(prompts: Sequence[str]) -> Condition:
        condition = base.encode([prompt.replace("kitten", "cat") for prompt in prompts])["prompt_embeds"]
        kittens = torch.tensor([[["kitten" in prompt]] for prompt in prompts])
        return {"prompt_embeds": condition + 0.02 * kittens * torch.randn(condition.shape[-1], generator=generator())}

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    recipe = tiny_recipe(base.id, preserve=["a kitten", *KEEP], anchor="auto")
    assert choose_anchors(recipe, base, encode)["a cat"] in ("a dog", "a hat", "a car", "a photo")


@pytest.mark.parametrize(
    "concept",
    [
        {"name": "a cat", "anchor": ""},
        {"name": "a cat", "anchor": "a hat"},
        {"name": "a cat", "erase_from": "a man with a cat"},
        {"name": "ink", "prompts": [{"prompt": "a cat in ink", "anchor": "a cat"}]},
    ],
)
def test_an_anchor_that_is_given_stays(base: Base, concept: dict[str, object]) -> None:
    recipe = tiny_recipe(base.id, concepts=[concept], preserve=KEEP, anchor="auto")
    assert choose_anchors(recipe, base, base.encode) == {}


def test_no_anchor_where_nothing_could_be_one(base: Base) -> None:
    recipe = tiny_recipe(base.id, preserve=["a cat on a long and winding road"], anchor="auto")
    assert choose_anchors(recipe, base, base.encode) == {}


def test_steps_of_zero_need_a_closed_form() -> None:
    with pytest.raises(EsdLoraError, match="nothing would change"):
        load_recipe("paper", {"train.steps": 0}, concepts=["a cat"])


def instant(base: Base, **settings: object) -> Recipe:
    return load_recipe("instant", {"train.preview_every": 0}, base=base.id, concepts=["a cat"], **settings)


def test_instant_trains_nothing(emoji: Base, tmp_path: Path) -> None:
    eraser = train(instant(emoji), base=emoji, out=tmp_path / "run", progress=False)
    assert (eraser.header.cost["steps"], eraser.header.cost["sample_evaluations"]) == (0, 0)
    assert eraser.header.cost["seconds"] > 0
    assert not eraser.header.calibrations
    (solved,) = eraser.header.solved
    assert 0 < solved.left < 0.3
    assert 0 < solved.moved < 0.1
    assert len(solved.most_moved) == 8
    assert solved.most_moved[0][1] == max(share for _, share in solved.most_moved)
    assert set(plain_prompts(emoji.keep)) >= {solved.anchors[0]}
    assert not any("cat" in prompt for prompt in eraser.header.preserve)
    assert 0 < solved.seconds <= eraser.header.cost["seconds"] + 0.01
    assert Eraser.load(tmp_path / "run").header.solved == (solved,)
    assert not (tmp_path / "run" / "train_log.jsonl").exists()
    again = train(eraser.header.recipes[0], base=emoji, progress=False)
    assert all(torch.equal(again.pairs[path].up, pair.up) for path, pair in eraser.pairs.items())


def test_instant_erases_and_its_anchor_stays(emoji: Base) -> None:
    """What appears instead is a clean picture of the anchor, and the anchor itself is still drawn."""
    eraser, judge = train(instant(emoji), base=emoji, progress=False), Judge("emoji")
    anchor = eraser.header.solved[0].anchors[0]
    shown = anchor.rpartition(" ")[2]
    cases = object_cases("cat", {prompt for prompt, _ in eraser.header.concepts[0].pairs}, 48)
    # Of the pairs that the base never saw, one is this anchor's; the judge calls what is drawn there a cat on the base itself.
    unseen = {style for name, style in domain("emoji")["held_out"] if name == shown}
    cases = [case for case in cases if unseen.isdisjoint(case.parts)]
    with applied(emoji, [eraser]):
        erased = judge(paint(emoji, [case.prompt for case in cases], [case.seed for case in cases]))
        anchors = judge(paint(emoji, [anchor] * 12, range(12)))
    assert not any(verdict.object == "cat" for verdict in erased)
    assert len(cases) >= 24
    assert sum(verdict.object == shown for verdict in erased) >= 0.9 * len(cases)
    assert all(verdict.object == shown for verdict in anchors)


def test_anchor_that_is_given_stays_too(emoji: Base) -> None:
    """`--anchor "a dog"`: dogs stay dogs."""
    recipe = load_recipe("instant", {"train.preview_every": 0}, base="emoji", concepts=[{"name": "a cat", "anchor": "a dog"}])
    with applied(emoji, [train(recipe, base=emoji, progress=False)]):
        verdicts = Judge("emoji")(paint(emoji, ["a dog", "dog"] * 12, range(24)))
    assert all(verdict.object == "dog" for verdict in verdicts)


def test_a_probe_that_is_content_ends_it_before_the_first_step(emoji: Base, tmp_path: Path) -> None:
    recipe = load_recipe("fast", {"train.preview_every": 0}, base="emoji", concepts=["a cat"])
    eraser = train(recipe, base=emoji, out=tmp_path / "run", progress=False)
    (calibration,) = eraser.header.calibrations
    assert [reading.step for reading in calibration.readings] == [0]
    assert "ended after 0 steps" in calibration.ending
    assert "(gone)" in calibration.ending
    with Image.open(tmp_path / "run" / "training.png") as plot:
        left = plot.convert("RGB").crop((50, 80, 70, 420))  # where the steps begin; the key lies above
        assert (0x77, 0x77, 0x77) in {colour for _, colour in left.getcolors(10_000)}  # the empty prompt's drift has no limit


def test_training_goes_on_from_it(base: Base) -> None:
    """Where steps are asked for, the first one starts at the closed form, in units that were measured from zero."""
    settings: dict[str, object] = {"closed_form": SPEC.model_dump(), "lr": 1e-9, "lr_schedule": "constant", "steps": 1}
    concepts = [{"name": "a cat", "anchor": "a dog"}]
    eraser = train(tiny_recipe(base.id, concepts=concepts, preserve=KEEP, **settings), base=base, progress=False)
    lessons = plan(tiny_recipe(base.id, concepts=concepts, preserve=KEEP, eta=0.0))
    updates, _ = solve_text(base, base.encode, lessons, dict.fromkeys(eraser.pairs, 4), SPEC)
    for path, pair in updates.items():
        assert torch.allclose(eraser.pairs[path].up @ eraser.pairs[path].down, pair.up @ pair.down, atol=1e-5)


def test_scope_without_text_has_none(base: Base) -> None:
    recipe = tiny_recipe(base.id, scope="selfattn", closed_form=SPEC.model_dump(), steps=1)
    assert train(recipe, base=base, progress=False).header.solved == ()


def test_closed_form_that_gets_nowhere_says_what_is_in_its_way() -> None:
    solved = Solved(left=0.4, moved=0.05, anchors=("a dog",), kept=2, most_moved=(("a fox", 0.2),))
    assert "60% of the way to 'a dog'" in solved.describe()
    assert "spans" not in solved.describe()
    stuck = solved.model_copy(update={"left": 0.6}).describe()
    assert "most of all 'a fox' 20%; what is kept spans most of the concept: leave some of it out, or train" in stuck


def test_influence_is_how_far_the_closed_form_moves_a_prompt_that_nothing_keeps(base: Base) -> None:
    """Against D as its equation has it, with the ridge alone beside what is erased."""
    rows = rows_of(base.encode, "prompt_embeds")
    cat, dog = rows(["a cat", "a hat"]).flatten(0, 1), rows(["a dog", "a dog"]).flatten(0, 1)
    erased = cat.T @ cat / len(cat)
    ridge = 1e-3 * erased.diagonal().mean() * torch.eye(len(erased), dtype=torch.float64)
    change = (dog - cat).T @ cat / len(cat) @ torch.linalg.inv(erased + ridge)
    prompts = [f"a hat {i}" for i in range(40)]  # more than are in memory at a time
    text = rows(prompts)
    expected = (text @ change.T).flatten(1).norm(dim=1) / text.flatten(1).norm(dim=1)
    torch.testing.assert_close(influence(rows, [("a cat", "a dog"), ("a hat", "a dog")], prompts), expected, rtol=1e-6, atol=0)
    assert influence(rows, [("a cat", "a dog")], []).tolist() == []


def test_prompts_are_ranked_by_what_layers_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lumina's caption embedder reads text behind a norm: so is what is kept more often, and what is held out, chosen."""
    base = load_toy(save_toy("lumina2", tmp_path / "lumina2"))
    ranked_by: list[Tensor] = []

    def influence(rows: Callable[[list[str]], Tensor], _pairs: object, prompts: Sequence[str]) -> Tensor:
        ranked_by.append(rows(["a dog"]))
        return torch.zeros(len(prompts))

    monkeypatch.setattr(lessons, "influence", influence)
    recipe = load_recipe("fast", base=base.id, concepts=["a cat"], preserve=KEEP)
    prepare_prompts(base, recipe, ())
    assert len(ranked_by) >= 2
    with torch.no_grad():
        expected = rows_of(base.as_read(base.encode), "prompt_embeds")(["a dog"])
    for rows in ranked_by:
        torch.testing.assert_close(rows, expected)
