"""Estimates: what is counted before a run is what the run then does, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.estimates.choices import Choices, explain_choices
from esd_lora.estimates.estimate import Estimate, Pace, Work
from esd_lora.estimates.merging import estimate_merging
from esd_lora.estimates.pictures import estimate_evaluation, estimate_pictures
from esd_lora.estimates.stacking import estimate_fusing, estimate_harmonising
from esd_lora.estimates.training import estimate_training
from esd_lora.evaluation.preparing import prepare_evaluation
from esd_lora.fusing import reading
from esd_lora.fusing.closed_form import fuse
from esd_lora.fusing.harmonising import harmonise
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train
from esd_lora.trajectory import Condition
from esd_lora.weights.merging import merge
from tiny import tiny_recipe

KEPT = ["a dog", "a hat", "a key", "a house", "a tree", "a boat"]
SOLVED = {"keep": 1.0, "push": 0.5, "ridge": 1e-3}
RECIPES: dict[str, dict[str, Any]] = {
    "steps that are given": {},
    "a probe of erasure": {"probe_every": 2},
    "the empty prompt held": {"null_batch": 1},
    "the student's trajectories": {"x_t_from": "student", "refresh_every": 3, "null_batch": 1, "steps": 7},
    "without guidance": {"guidance": 1.0},
    "a rate to be measured": {"lr": "auto"},
    "a closed form": {"closed_form": SOLVED, "anchor": "auto", "preserve": ["a dog", "a hat", "a key", "a house"]},
    "closed form alone": {"closed_form": SOLVED, "steps": 0},
    "aspects": {"aspects": ["1:1", "2:1"], "resolution": 64, "refresh_every": 2},
    "accumulated": {"accumulate": 3, "preserve": []},
}


@pytest.fixture
def base(tiny_dir: Path) -> Base:
    return load_base(tiny_dir)


def encoded_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that every text is added to which any base encodes from now on."""
    encoded: list[str] = []
    as_usual = Base.encode

    def encode(self: Base, prompts: Sequence[str], guidance: float = 1.0) -> Condition:
        encoded.extend(prompts)
        return as_usual(self, prompts, guidance)

    monkeypatch.setattr(Base, "encode", encode)
    return encoded


@pytest.mark.parametrize(
    "settings",
    [pytest.param(each, id=name, marks=[pytest.mark.slow] * (name == "aspects")) for name, each in RECIPES.items()],
)
def test_what_is_counted_is_what_is_done(base: Base, settings: dict[str, Any]) -> None:
    recipe = tiny_recipe(base.id, **settings)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    estimate = estimate_training(recipe, base, written=False)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert estimate.least == estimate.most
    eraser = train(recipe, base=base, progress=False)
    cost = eraser.header.cost
    assert (estimate.most.evaluations, estimate.most.student_samples) == (cost["sample_evaluations"], cost["student_samples"])
    assert estimate.eraser == sum(pair.down.nbytes + pair.up.nbytes for pair in eraser.pairs.values())


@pytest.mark.parametrize("settings", [{}, RECIPES["a closed form"]], ids=["trained", "solved"])
def test_texts_are_those_that_are_encoded(base: Base, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    recipe = tiny_recipe(base.id, **settings)
    texts = estimate_training(recipe, base, written=False).most.texts
    encoded = encoded_texts(monkeypatch)
    train(recipe, base=base, progress=False)
    assert texts == pytest.approx(len(encoded), rel=0.1)


def test_steps_that_a_probe_decides_have_a_least_and_a_most(base: Base) -> None:
    auto = {"eta": "auto", "lr": "auto", "steps": "auto", "preserve_weight": "auto", "probe_every": 15, "frames": "auto"}
    solved = estimate_training(tiny_recipe(base.id, **auto, closed_form=SOLVED), base, written=False)
    assert solved.least.student_samples == 0
    assert solved.least.evaluations > 0, "the probe looks once"
    assert solved.most.student_samples == 450 * (6 + 2)
    trained = estimate_training(tiny_recipe(base.id, **auto), base, written=False)
    assert 0 < trained.least.student_samples < trained.most.student_samples
    low, high = solved.seconds()
    assert 0 < low < high
    assert " to " in "\n".join(solved.lines())


@pytest.mark.slow
def test_random_stops_are_counted_as_they_fall(base: Base) -> None:
    recipe = tiny_recipe(base.id, points="one", refresh_every=1, steps=40, trajectory_steps=8)
    evaluations = estimate_training(recipe, base, written=False).most.evaluations
    assert evaluations == train(recipe, base=base, progress=False).header.cost["sample_evaluations"]


def test_seconds_are_the_sum_of_what_each_takes() -> None:
    pace = Pace(text=1.0, evaluation=2.0, student_sample=3.0, picture=4.0)
    estimate = Estimate(Work(1, 1, 0, 0), Work(1, 1, 1, 1), pace, 0.5, 2**31, 10**6)
    assert estimate.seconds() == (3.5, 10.5)
    text = "\n".join(estimate.lines())
    assert "3.5 to 10.5 s" in text
    assert "2.00 GiB" in text


def test_pictures(base: Base) -> None:
    estimate = estimate_pictures(base, 6, steps=5)
    assert estimate.most == Work(texts=12, evaluations=60, pictures=6)
    assert estimate_pictures(base, 6, steps=5, guidance=1.0).most == Work(texts=6, evaluations=30, pictures=6)
    assert all(seconds >= 0 for seconds in estimate.pace)


@pytest.mark.slow
def test_an_evaluation(tmp_path: Path) -> None:
    """On the built-in base, whose judge is there; every picture of every model is counted, and nothing is written."""
    base, eraser = load_base("emoji"), tmp_path / "no-cat"
    train(load_recipe("instant", concepts=["a cat"]), base=base, out=eraser, progress=False)
    given = {"erasers": [eraser], "limit": 3, "settings": {"steps": 2}}
    prepared = prepare_evaluation(base, "emoji-object", tmp_path / "measured", **given, against=["negative-prompt"])
    estimate = estimate_evaluation(prepared)
    assert [variant.name for variant in prepared.variants] == ["base", "erased", "negative-prompt"]
    assert estimate.most.pictures == 3 * len(prepared.plan.cases)
    assert estimate.most.evaluations == 2 * 2 * estimate.most.pictures
    assert estimate.around > 0, "the judge was timed"
    assert not (tmp_path / "measured").exists()


@pytest.fixture
def members(base: Base) -> list[Eraser]:
    """Two erasers, one of which changes layers that read no text."""
    recipes = [tiny_recipe(base.id, steps=2), tiny_recipe(base.id, concepts=["a car"], scope="noxattn", steps=2)]
    return [train(recipe, base=base, progress=False) for recipe in recipes]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"keep": KEPT, "rank": 3}, id="kept", marks=pytest.mark.slow),
        pytest.param({"lam": 0.0, "guidance": 1.0, "keep": KEPT}, id="nothing kept"),
    ],
)
def test_fusing(base: Base, members: list[Eraser], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BYTES_AT_ONCE", 2**20)  # so that there is more than one pass
    estimate = estimate_fusing(members, base, **fields)
    encoded = encoded_texts(monkeypatch)
    fused = fuse(members, base, progress=False, **fields)
    assert estimate.most.evaluations == fused.header.fusions[-1].evaluations
    assert estimate.most.texts == len(encoded)
    assert estimate.eraser == sum(pair.down.nbytes + pair.up.nbytes for pair in fused.pairs.values())
    assert estimate.around > 0


def test_harmonising(base: Base, members: list[Eraser], monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"keep": KEPT, "steps": 2, "batch_size": 4, "trajectories": 3, "keep_trajectories": 5, "trajectory_steps": 2}
    estimate = estimate_harmonising(members, base, **fields)
    encoded = encoded_texts(monkeypatch)
    one = harmonise(members, base, progress=False, **fields)
    record = one.header.distillations[-1]
    assert estimate.most.evaluations + estimate.most.student_samples == record.evaluations
    assert estimate.most.student_samples == 2 * 2 * 8
    assert estimate.most.texts == len(encoded)
    assert estimate.eraser == sum(pair.down.nbytes + pair.up.nbytes for pair in one.pairs.values())
    assert not hasattr(base.model, "peft_config") or not base.model.peft_config


def test_merging_dry(tiny_dir: Path, members: list[Eraser], tmp_path: Path) -> None:
    for number, member in enumerate(members):
        member.save(tmp_path / str(number))
    out = tmp_path / "made" / "merged"
    command = ["merge", str(tmp_path / "0"), str(tmp_path / "1:0.5"), "--base", str(tiny_dir), "-o", str(out)]
    result = CliRunner().invoke(main, [*command, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert not out.parent.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    layers = {module for member in members for module in member.pairs}
    assert f"{len(layers)} of " in result.stdout
    assert f"would be written: {out}" in result.stdout
    estimate = estimate_merging(members, tiny_dir, out)
    merge(members, tiny_dir, out)
    assert sum(file.stat().st_size for file in out.rglob("*")) == pytest.approx(
        estimate.size, abs=3 * 2**17
    )  # headers of three files, each in its place


def test_merging_dry_refuses_what_does_not_fit(tiny_dir: Path, members: list[Eraser], tmp_path: Path) -> None:
    (path, pair), *_ = members[0].pairs.items()
    strange = Eraser({f"{path}.strange": pair}, members[0].header)
    with pytest.raises(EsdLoraError, match="has no layer"):
        estimate_merging([strange], tiny_dir, tmp_path / "merged")


def test_stacking_dry(tiny_dir: Path, members: list[Eraser], tmp_path: Path) -> None:
    for number, member in enumerate(members):
        member.save(tmp_path / str(number))
    command = ["stack", str(tmp_path / "0"), str(tmp_path / "1"), "-o", str(tmp_path / "out"), "--dry-run"]
    for more in ([], ["--base", str(tiny_dir)], ["--base", str(tiny_dir), "--harmonise", "2"]):
        result = CliRunner().invoke(main, [*command, *more])
        assert result.exit_code == 0, result.output
        assert ("in all" in result.stdout) == bool(more)
        assert f"would be written into {tmp_path / 'out'}" in result.stdout
        assert not (tmp_path / "out").exists()


def test_dry_runs_write_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for command in (
        ["train", "fast", "--concept", "a cat", "-s", "train.steps=2", "-s", "train.lr=0.001", "-s", "frames=[]"],
        ["evaluate", "--suite", "emoji-object", "--concept", "a cat", "--limit", "2", "-s", "steps=2"],
        ["generate", "a cat", "a dog", "--compare", "-n", "2", "--steps", "2"],
    ):
        result = CliRunner().invoke(main, [*command, "--base", str(tiny_dir), "-o", str(out), "--dry-run"])
        assert result.exit_code == 0, result.output
        assert "in all" in result.stdout
        assert f"would be written into {out}" in result.stdout
        assert not out.exists()
    assert "pictures to decode                   8" in result.stdout


def test_choices_are_those_of_the_training(base: Base) -> None:
    recipe = tiny_recipe(base.id, concepts=["a cat", "a rocket"], anchor="auto", preserve=KEPT, closed_form=SOLVED)
    recipe = recipe.anchored({"a rocket": ""})
    choices = explain_choices(recipe, base)
    eraser = train(recipe, base=base, progress=False)
    anchors = {concept.name: {anchor for _, anchor in concept.pairs} for concept in eraser.header.concepts}
    assert anchors == {"a cat": {choices.tried["a cat"][0].anchor}, "a rocket": {""}}
    assert sorted(choices.kept) == sorted(KEPT)
    first, second, kept = choices.lines()
    assert first.startswith(f"Instead of 'a cat' appears {choices.tried['a cat'][0].anchor!r}: of ")
    assert second == "Instead of 'a rocket' appears nothing in particular (the empty prompt), as the recipe says."
    guarded = Choices(recipe.model_copy(update={"guard": ("a dog",)}), {}, []).lines()
    assert guarded[-1] == "No update touches the text of 'a dog'."
    assert kept.startswith(f"6 prompts are kept. Of the plain ones, erasing would move {choices.kept[0]!r}, ")
    base.require_bare()
