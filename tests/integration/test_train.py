"""Training on the toy pipeline, end to end: what is written, what is learned, what is left alone."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageChops

from esd_lora import training
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import LOG_NAME, RUN_FILES, WEIGHTS_NAME, Eraser, hash_weight
from esd_lora.errors import EsdLoraError
from esd_lora.interrupting import Interruption
from esd_lora.pictures import read_samples
from esd_lora.recipe import SCOPES, Recipe
from esd_lora.recipe_files import dump_recipe, load_recipe
from esd_lora.sampling import generate
from esd_lora.teacher import Teacher
from esd_lora.train_state import CHECKPOINT_NAME, Checkpoint, how_to_go_on
from esd_lora.training import learning_rate, train
from esd_lora.watching import Previews, StepReport
from tiny import tiny_recipe

PRESETS = ["fast", "paper"]


def assert_same_eraser(found: Eraser, expected: Eraser) -> None:
    """Bit for bit, whenever and however long it was trained."""
    assert found.pairs.keys() == expected.pairs.keys()
    for module, pair in expected.pairs.items():
        assert torch.equal(found.pairs[module].down, pair.down), module
        assert torch.equal(found.pairs[module].up, pair.up), module
    same = [
        header.model_copy(update={"created": "", "cost": {**header.cost, "seconds": 0}})
        for header in (found.header, expected.header)
    ]
    assert same[0] == same[1]


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text("utf-8").splitlines()]


def weights_of(base: Base) -> dict[str, torch.Tensor]:
    return {
        name: value.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, value in getattr(base.pipe, part).state_dict().items()
    }


def assert_as_it_came(base: Base, before: dict[str, torch.Tensor]) -> None:
    after = weights_of(base)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in base.model.parameters())


def interrupt_at(step: int) -> Callable[[StepReport], None]:
    def watch(report: StepReport) -> None:
        if report.state.step == step:
            signal.raise_signal(signal.SIGINT)

    return watch


@pytest.mark.parametrize("preset", PRESETS)
def test_run_directory(tiny_dir: Path, tmp_path: Path, preset: str) -> None:
    recipe = tiny_recipe(tiny_dir, preset, preview_every=3, checkpoint_every=2)
    eraser = train(recipe, out=tmp_path / "run", progress=False)
    names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert names == {
        WEIGHTS_NAME,
        "recipe.yaml",
        "README.md",
        "train_log.jsonl",
        "previews/step_00003.png",
        "samples/before_after.png",
        *(f"samples/{i}_{name}.png" for i in range(1, 2 + len(eraser.header.preserve)) for name in ("base", "erased")),
    }
    samples = read_samples(tmp_path / "run" / "samples")
    assert [prompt for prompt, _, _ in samples] == ["a cat", *eraser.header.preserve]
    assert eraser.header.preserve == (() if preset == "paper" else ("a dog", "a hat"))
    assert all(before is not None and erased.read_bytes() != before.read_bytes() for _, erased, before in samples)
    assert names - {"README.md"} <= {*RUN_FILES, "previews/step_00003.png"}
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert_same_eraser(Eraser.load(tmp_path / "run"), eraser)


@pytest.mark.parametrize("preset", PRESETS)
def test_log_has_a_line_a_step(tiny_dir: Path, tmp_path: Path, preset: str) -> None:
    recipe = tiny_recipe(tiny_dir, preset)
    seen: list[float] = []
    train(recipe, out=tmp_path / "run", progress=False, on_step=[lambda report: seen.append(report.state.loss)])
    log = log_of(tmp_path / "run")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert [line["loss"] for line in log] == seen
    assert all(math.isfinite(loss) and loss > 0 for loss in seen)
    assert [line["lr"] for line in log] == [learning_rate(recipe.train, step, recipe.train.lr) for step in range(4)]
    assert [line["seconds"] for line in log] == sorted(line["seconds"] for line in log)


def test_learning_rates() -> None:
    settings = {"train.steps": 10, "train.lr": 1.0, "train.lr_schedule": "cosine", "train.warmup": 0}
    cosine = load_recipe("fast", settings, concepts=["a cat"]).train
    rates = [learning_rate(cosine, step, 1.0) for step in range(11)]
    assert rates[0] == 1
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(cosine.model_copy(update={"lr_schedule": "constant"}), 7, 1.0) == 1


def test_header_says_where_the_eraser_comes_from(tiny_dir: Path, base: Base) -> None:
    concepts = [{"name": "a cat", "synonyms": ["kitten"], "anchor": "a dog"}, "a car"]
    recipe = tiny_recipe(tiny_dir, concepts=concepts, eta=2, preserve="default")
    header = train(recipe, base=base, progress=False).header
    assert (header.family, header.prefix, header.prediction_type) == ("sd", "unet", "epsilon")
    assert header.base == str(tiny_dir)
    assert header.base_hashes == {name: hash_weight(base.model.get_submodule(name).weight) for name in header.base_hashes}
    assert [(c.name, c.synonyms, c.pairs, c.eta, c.weight) for c in header.concepts] == [
        ("a cat", ("kitten",), (("a cat", "a dog"),), 2, 1),
        ("a car", (), (("a car", ""),), 2, 1),
    ]
    assert header.recipes == (recipe,)
    assert "a cat" not in header.preserve
    assert len(header.preserve) == 2, "what was walked alone"
    assert set(header.versions) == {"esd-lora", "torch", "diffusers", "peft"}
    # 2 erased trajectories of which anchors are asked for once, 2 preserved, 4 points each.
    assert header.cost["steps"] == 4
    assert header.cost["student_samples"] == 4 * (recipe.train.batch_size + recipe.train.preserve_batch)
    assert header.cost["sample_evaluations"] == 2 * (2 + 2) * 4 + 4


@pytest.mark.parametrize("preset", PRESETS)
def test_two_runs_are_equal_bit_for_bit(tiny_dir: Path, preset: str) -> None:
    recipe = tiny_recipe(tiny_dir, preset)
    first = train(recipe, progress=False)
    torch.rand(3)  # what else a program draws must not matter
    assert_same_eraser(train(recipe, progress=False), first)
    other = train(tiny_recipe(tiny_dir, preset, seed=1), progress=False)
    assert not any(torch.equal(first.pairs[module].up, other.pairs[module].up) for module in first.pairs)


def test_random_state_of_the_program_is_left_alone(tiny_dir: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(tiny_recipe(tiny_dir), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("step", [1, 3])
def test_interrupted_and_resumed_run_equals_an_unbroken_one(tiny_dir: Path, tmp_path: Path, preset: str, step: int) -> None:
    recipe = tiny_recipe(tiny_dir, preset, steps=5, **({"refresh_every": 2} if preset == "fast" else {}))
    handler = signal.getsignal(signal.SIGINT)  # a test run in the background may be told to ignore it
    unbroken = train(recipe, out=tmp_path / "unbroken", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out=tmp_path / "run", progress=False, on_step=[interrupt_at(step)])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {CHECKPOINT_NAME, "train_log.jsonl"}
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = train(recipe, out=tmp_path / "run", resume=True, progress=False)
    assert_same_eraser(resumed, unbroken)
    assert not (tmp_path / "run" / CHECKPOINT_NAME).exists()
    without_time = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in log_of(tmp_path / n)] for n in ("run", "unbroken")
    ]
    assert without_time[0] == without_time[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_interrupted_in_a_walk(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """It stops at once, within the walk, and goes on from the last step: nothing of the walk counts or is kept."""
    recipe = tiny_recipe(tiny_dir, preset, steps=5, **({"refresh_every": 2} if preset == "fast" else {}))
    unbroken = train(recipe, out=tmp_path / "unbroken", progress=False)
    predictions: list[int] = []
    as_usual = Teacher.predict

    def predict(teacher: Teacher, *args: Any, **options: Any) -> torch.Tensor:
        predictions.append(len(predictions))
        if len(predictions) == interrupted_at:
            signal.raise_signal(signal.SIGINT)
        return as_usual(teacher, *args, **options)

    monkeypatch.setattr(Teacher, "predict", predict)
    interrupted_at = -1
    train(recipe, progress=False)
    interrupted_at = len(predictions) - 1  # in the last walk: steps make none
    predictions.clear()
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out=tmp_path / "run", progress=False)
    assert len(predictions) == interrupted_at, "not one more"
    step = Checkpoint.read(tmp_path / "run", dump_recipe(recipe)).content["step"]
    assert step == 4, "the last walk is that of the fifth step"
    assert [line["step"] for line in log_of(tmp_path / "run")] == [*range(1, step + 1)], "what was not written yet is"
    resumed = train(recipe, out=tmp_path / "run", resume=True, progress=False)
    assert_same_eraser(resumed, unbroken)
    assert resumed.header.cost["sample_evaluations"] == unbroken.header.cost["sample_evaluations"]


def test_interrupted_before_the_first_step_and_after_the_last(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tiny_recipe(tiny_dir, preview_every=50), tmp_path / "run"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "prepare_prompts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out=out, progress=False)
    assert how_to_go_on(out, dump_recipe(recipe)).startswith("interrupted before its first step; nothing is lost")
    assert not out.exists() or not list(out.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(training, "paint_samples", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out=out, progress=False)
    assert how_to_go_on(out, dump_recipe(recipe)) == (
        f"interrupted; go on with the same command and --resume (checkpoint in {out})."
    )
    predictions: list[int] = []
    monkeypatch.setattr(Teacher, "fill", lambda *_, **__: predictions.append(1))
    resumed = train(recipe, out=out, resume=True, progress=False)
    assert predictions == [], "all steps were done"
    assert resumed.header.cost["steps"] == recipe.train.steps


def test_step_in_hand_is_finished_and_a_second_interruption_stops_at_once() -> None:
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Interruption() as interruption, pytest.raises(KeyboardInterrupt), interruption.at_once():
        signal.raise_signal(signal.SIGINT)
    assert not interruption.requested


def test_resume_from_a_checkpoint_made_on_the_way(tiny_dir: Path, tmp_path: Path) -> None:
    """A crash leaves a checkpoint older than the last step that was logged."""
    recipe = tiny_recipe(tiny_dir, steps=13, checkpoint_every=4)

    def crash(report: StepReport) -> None:
        if report.state.step == 11:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, out=tmp_path / "run", progress=False, on_step=[crash])
    assert [line["step"] for line in log_of(tmp_path / "run")] == [*range(1, 11)]
    resumed = train(recipe, out=tmp_path / "run", resume=True, progress=False)
    assert_same_eraser(resumed, train(recipe, progress=False))
    assert [line["step"] for line in log_of(tmp_path / "run")] == [*range(1, 14)]


class KilledError(Exception):
    """Stands for a kill where it comes."""


@pytest.mark.parametrize("place", ["save_with_card", "paint_samples", "Previews.__call__"])
@pytest.mark.parametrize("checkpoint_every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_run_killed_at_its_end_becomes_what_an_unbroken_one_is(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, checkpoint_every: int
) -> None:
    """After an early stop it does not train on, and its samples are there."""
    settings = {"probe_every": 2, "stop_at": 0.2, "preview_every": 2, "lr": 0.01, "refresh_every": 4}
    recipe = tiny_recipe(tiny_dir, steps=40, checkpoint_every=checkpoint_every, **settings)
    unbroken = train(recipe, out=tmp_path / "unbroken", progress=False)
    assert 3 < unbroken.header.cost["steps"] < 40

    def kill(*_: object, **__: object) -> None:
        raise KilledError

    def kill_late(watcher: Previews, report: StepReport) -> None:
        if report.state.step == unbroken.header.cost["steps"]:
            raise KilledError
        really(watcher, report)

    really = Previews.__call__
    with monkeypatch.context() as patch:
        if place.startswith("Previews"):
            patch.setattr(Previews, "__call__", kill_late)
        else:
            patch.setattr(f"esd_lora.training.{place}", kill)
        with pytest.raises(KilledError):
            train(recipe, out=tmp_path / "run", progress=False)
    assert_same_eraser(train(recipe, out=tmp_path / "run", resume=True, progress=False), unbroken)
    runs = [{path.relative_to(run): path for path in run.rglob("*.png")} for run in (tmp_path / "run", tmp_path / "unbroken")]
    assert runs[0].keys() == runs[1].keys() >= {Path("samples/before_after.png"), Path("samples/1_erased.png")}
    assert all(runs[0][name].read_bytes() == runs[1][name].read_bytes() for name in runs[0])


def test_old_eraser_is_there_until_the_new_one_is(tiny_dir: Path, cat_dir: Path, tmp_path: Path) -> None:
    out = shutil.copytree(cat_dir, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != LOG_NAME}

    def look(report: StepReport) -> None:
        assert {name: (out / name).read_bytes() for name in before} == before
        if report.state.step == 3:
            raise KilledError

    recipe = tiny_recipe(tiny_dir, steps=4, checkpoint_every=2)
    with pytest.raises(KilledError):
        train(recipe, out=out, force=True, progress=False, on_step=[look])
    resumed = train(recipe, out=out, resume=True, progress=False)
    assert_same_eraser(Eraser.load(out), resumed)
    assert {path.name for path in out.iterdir()} == {"notes.txt", "README.md", "recipe.yaml", LOG_NAME, WEIGHTS_NAME}


def test_interruption_without_a_directory(tiny_dir: Path, base: Base) -> None:
    before = weights_of(base)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe(tiny_dir), base=base, progress=False, on_step=[interrupt_at(1)])
    assert_as_it_came(base, before)


def test_signal_handler_of_the_program_comes_back(tiny_dir: Path) -> None:
    asked: list[int] = []

    def mine(number: int, _: object) -> None:
        asked.append(number)

    before = signal.signal(signal.SIGINT, mine)
    try:
        train(tiny_recipe(tiny_dir, steps=1), progress=False)
        assert signal.getsignal(signal.SIGINT) is mine
        with pytest.raises(KeyboardInterrupt):
            train(tiny_recipe(tiny_dir), progress=False, on_step=[interrupt_at(1)])
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    assert not asked


@pytest.fixture
def interrupted(tiny_dir: Path, tmp_path: Path) -> tuple[Recipe, Path]:
    """A run with a checkpoint."""
    recipe = tiny_recipe(tiny_dir)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out=tmp_path / "run", progress=False, on_step=[interrupt_at(1)])
    return recipe, tmp_path / "run"


def test_resume_with_another_recipe(interrupted: tuple[Recipe, Path]) -> None:
    recipe, out = interrupted
    other = recipe.model_copy(update={"eta": 2.0})
    with pytest.raises(EsdLoraError, match="another recipe"):
        train(other, out=out, resume=True, progress=False)
    assert (out / CHECKPOINT_NAME).exists()


def test_resume_without_a_checkpoint(tiny_dir: Path, cat_dir: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "nothing", cat_dir):
        with pytest.raises(EsdLoraError, match=f"no {CHECKPOINT_NAME} to resume from"):
            train(tiny_recipe(tiny_dir), out=out, resume=True, progress=False)


@pytest.mark.parametrize("damage", ["empty", "not one", "cut short", "a list", "another dict"])
def test_damaged_checkpoint(interrupted: tuple[Recipe, Path], damage: str) -> None:
    recipe, out = interrupted
    file = out / CHECKPOINT_NAME
    whole = file.read_bytes()
    if damage in ("a list", "another dict"):
        torch.save([1] if damage == "a list" else {"step": 3}, file)
    else:
        file.write_bytes({"empty": b"", "not one": b"text", "cut short": whole[: len(whole) // 2]}[damage])
    with pytest.raises(EsdLoraError, match="damaged"):
        train(recipe, out=out, resume=True, progress=False)


def test_loss_that_is_no_number(tiny_dir: Path, tmp_path: Path, base: Base) -> None:
    before = weights_of(base)
    with pytest.raises(EsdLoraError, match=r"loss became .* at step \d: lower train.lr \(now 1e\+30\)"):
        train(tiny_recipe(tiny_dir, lr=1e30), out=tmp_path / "run", base=base, progress=False)
    assert not (tmp_path / "run" / WEIGHTS_NAME).exists()
    assert_as_it_came(base, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_base_with_what_is_no_number_is_named_and_not_the_learning_rate(
    tiny_dir: Path, tmp_path: Path, base: Base, value: float
) -> None:
    layer = base.model.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    layer.weight.data[0, 0] = value
    place = r"unet\.mid_block\.attentions\.0\.transformer_blocks\.0\.attn2\.to_k"
    with pytest.raises(
        EsdLoraError, match=rf"because of base .*: {place} holds NaN or infinity; fetch the base again"
    ) as caught:
        train(tiny_recipe(tiny_dir), out=tmp_path / "run", base=base, progress=False)
    assert "lr" not in str(caught.value)
    assert not (tmp_path / "run" / WEIGHTS_NAME).exists()


def test_text_encoder_with_what_is_no_number_is_named(tiny_dir: Path, base: Base) -> None:
    encoder = base.pipe.text_encoder
    name, weight = next((n, w) for n, w in encoder.named_parameters() if n.endswith("fc1.weight"))
    weight.data[0, 0] = float("nan")
    module = name.removesuffix(".weight")
    with pytest.raises(EsdLoraError, match=f"make NaN or infinity of prompts: text_encoder.{module} holds NaN or infinity"):
        train(tiny_recipe(tiny_dir), base=base, progress=False)


def test_base_leaves_as_it_came(tiny_dir: Path, base: Base) -> None:
    before = weights_of(base)
    train(tiny_recipe(tiny_dir), base=base, progress=False)
    assert_as_it_came(base, before)


@pytest.mark.parametrize("scope", ["xattn", "xattn-kv", "full"])
def test_second_training_on_one_base_is_like_the_first(tiny_dir: Path, base: Base, scope: str) -> None:
    recipe = tiny_recipe(tiny_dir, scope=scope, steps=2)
    assert_same_eraser(train(recipe, base=base, progress=False), train(recipe, base=base, progress=False))


@pytest.mark.parametrize("fault", ["watcher", "scope", "objective", "optimizer"])
def test_base_leaves_as_it_came_from_a_failure(tiny_dir: Path, base: Base, fault: str) -> None:
    def fail(_: StepReport) -> None:
        raise RuntimeError("a watcher's own fault")

    before = weights_of(base)
    faults = {"scope": "re:nothing", "objective": "os:nothing", "optimizer": "os:nothing"}
    settings = {fault: faults[fault]} if fault in faults else {}
    recipe = tiny_recipe(tiny_dir, allow_code=["os:nothing"], **settings)
    with pytest.raises((RuntimeError, EsdLoraError), match="cannot be imported" if "os:nothing" in settings.values() else None):
        train(recipe, base=base, progress=False, on_step=[fail], allow_code=["os:nothing"])
    assert_as_it_came(base, before)


@pytest.mark.parametrize("scope", SCOPES)
def test_scope_trains_its_layers_and_no_other(tiny_dir: Path, base: Base, scope: str) -> None:
    layers = base.family.modules(base.model, scope)
    eraser = train(tiny_recipe(tiny_dir, scope=scope, steps=2), progress=False)
    assert eraser.pairs.keys() == layers.keys()
    assert eraser.header.base_hashes.keys() == layers.keys()
    assert all(pair.up.any() for pair in eraser.pairs.values())


def test_student_reaches_its_target(tiny_dir: Path) -> None:
    recipe = tiny_recipe(tiny_dir, steps=30, lr=0.03, probe_every=30, scope="full", preserve=[])
    losses: list[float] = []
    erasures: list[float | None] = []

    def watch(report: StepReport) -> None:
        losses.append(report.state.loss)
        erasures.append(report.state.erasure)

    train(recipe, progress=False, on_step=[watch])
    assert sum(losses[-5:]) < sum(losses[:5]) / 5
    assert erasures[-1] == pytest.approx(1, abs=0.3)  # 0 before training, 1 on target


def test_stops_once_enough_is_erased(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_dir, steps=40, lr=0.01, probe_every=2, stop_at=0.5, preserve=[])
    eraser = train(recipe, out=tmp_path / "run", progress=False)
    log = log_of(tmp_path / "run")
    probed = [(line["step"], line["erasure"]) for line in log if "erasure" in line]
    assert [step for step, _ in probed] == list(range(2, len(log) + 1, 2))
    assert len(probed) > 1
    assert all(erasure < 0.5 for _, erasure in probed[:-1])
    assert probed[-1][1] >= 0.5
    assert eraser.header.cost["steps"] == len(log) < 40


def test_probe_changes_nothing_that_is_learned(tiny_dir: Path) -> None:
    plain, probed = (train(tiny_recipe(tiny_dir, probe_every=every), progress=False) for every in (0, 1))
    for module, pair in plain.pairs.items():
        assert torch.equal(probed.pairs[module].up, pair.up)


def test_no_more_latents_at_once_than_a_walk_has(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's 64 points, and the pictures of previews, which a large model has no memory for."""
    denoised, decoded = [], []
    predict, decode = Base.predict, AutoencoderKL.decode
    monkeypatch.setattr(Base, "predict", lambda base, x, *rest: denoised.append(len(x)) or predict(base, x, *rest))
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, z, *a, **k: decoded.append(len(z)) or decode(vae, z, *a, **k))
    recipe = tiny_recipe(
        tiny_dir, walk_batch=2, batch_size=2, probe_every=2, preview_every=2, trajectories=3, x_t_from="student"
    )
    train(recipe, out=tmp_path / "run", progress=False)
    assert max(denoised) == 4
    assert max(decoded) == 2


def test_watcher_ends_the_training(tiny_dir: Path) -> None:
    eraser = train(tiny_recipe(tiny_dir), progress=False, on_step=[lambda report: report.state.step == 2])
    assert eraser.header.cost["steps"] == 2


def test_existing_output_needs_force(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_dir)
    first = train(recipe, out=tmp_path / "run", progress=False)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    other = tiny_recipe(tiny_dir, seed=1)
    with pytest.raises(EsdLoraError, match="--force"):
        train(other, out=tmp_path / "run", progress=False)
    assert_same_eraser(Eraser.load(tmp_path / "run"), first)
    second = train(other, out=tmp_path / "run", force=True, progress=False)
    assert_same_eraser(Eraser.load(tmp_path / "run"), second)
    assert len(log_of(tmp_path / "run")) == 4
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "fault", [{"scope": "nonsense"}, {"objective": "nonsense"}, {"preserve": ["a cat"]}], ids=lambda f: next(iter(f))
)
def test_fault_of_the_recipe_costs_no_earlier_eraser(tiny_dir: Path, tmp_path: Path, fault: dict[str, Any]) -> None:
    train(tiny_recipe(tiny_dir, steps=1), out=tmp_path / "run", progress=False)
    with pytest.raises(EsdLoraError):
        train(tiny_recipe(tiny_dir, **fault), out=tmp_path / "run", force=True, progress=False)
    assert (tmp_path / "run" / WEIGHTS_NAME).exists()


def test_unknown_base_costs_no_earlier_eraser(tiny_dir: Path, tmp_path: Path) -> None:
    train(tiny_recipe(tiny_dir, steps=1), out=tmp_path / "run", progress=False)
    with pytest.raises(EsdLoraError):
        train(tiny_recipe("nothing"), out=tmp_path / "run", force=True, progress=False)
    assert (tmp_path / "run" / WEIGHTS_NAME).exists()


def test_plain_diffusers_paints_the_same_pictures(tiny_dir: Path, cat_dir: Path) -> None:
    ours = generate(tiny_dir, ["a cat", "a dog"], erasers=[cat_dir], seeds=[3], steps=4, guidance=5.0)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_dir, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(cat_dir)
    noise = [torch.Generator().manual_seed(3) for _ in range(2)]
    theirs = pipe(["a cat", "a dog"], num_inference_steps=4, guidance_scale=5.0, generator=noise).images
    untouched = generate(tiny_dir, ["a cat", "a dog"], seeds=[3], steps=4, guidance=5.0)
    for mine, other, before in zip(ours, theirs, untouched, strict=True):
        assert ImageChops.difference(mine, other).getbbox() is None
        assert ImageChops.difference(mine, before).getbbox() is not None


@pytest.mark.parametrize("scope", ["xattn", "full"])
def test_loaded_eraser_predicts_what_the_student_did(tiny_dir: Path, tmp_path: Path, scope: str) -> None:
    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([700, 30])
    said: list[torch.Tensor] = []

    def ask(report: StepReport) -> None:
        if report.state.step == 4:
            with torch.no_grad():
                said.append(report.teacher.base.predict(x_t, t, report.teacher.encode(["a cat", "a dog"])))

    recipe = tiny_recipe(tiny_dir, scope=scope, lora={"rank": 3, "alpha": 6}, lr=0.05)
    train(recipe, out=tmp_path / "run", progress=False, on_step=[ask])
    pipe = StableDiffusionPipeline.from_pretrained(tiny_dir, use_safetensors=True)
    pipe.load_lora_weights(tmp_path / "run")
    fresh = load_base(tiny_dir)
    with torch.no_grad():
        text = fresh.encode(["a cat", "a dog"])
        found = pipe.unet(x_t, t, encoder_hidden_states=text["prompt_embeds"]).sample
        assert not torch.allclose(found, fresh.predict(x_t, t, text), atol=1e-3)
    assert torch.equal(found, said[0])


def test_base_that_carries_an_adapter_is_refused_and_keeps_it(tiny_dir: Path, cat_dir: Path, cat: Eraser) -> None:
    base = load_base(tiny_dir)
    base.pipe.load_lora_weights(str(cat_dir), adapter_name="somebody")
    with pytest.raises(EsdLoraError, match="already carries adapter 'somebody'"):
        train(tiny_recipe(tiny_dir), base=base, progress=False)
    with pytest.raises(EsdLoraError, match="already carries adapter 'somebody'"):
        generate(base, ["a cat"], erasers=[cat])
    assert list(base.model.peft_config) == ["somebody"]


def test_generate_leaves_the_base_as_it_came(base: Base, cat: Eraser) -> None:
    before = weights_of(base)
    plain = generate(base, ["a cat"], steps=3)[0]
    changed = generate(base, ["a cat"], erasers=[cat], steps=3)[0]
    half = generate(base, ["a cat"], erasers=[cat], weights=[0.5], steps=3)[0]
    assert len({picture.tobytes() for picture in (plain, changed, half)}) == 3
    assert generate(base, ["a cat"], erasers=[cat], weights=[0.0], steps=3)[0] == plain
    assert generate(base, ["a cat"], steps=3)[0] == plain
    assert_as_it_came(base, before)


def test_generated_pictures_come_prompt_by_prompt(base: Base, cat: Eraser) -> None:
    together = generate(base, ["a cat", "a dog"], seeds=[0, 7], erasers=[cat], steps=2)
    apart = [generate(base, [p], seeds=[s], erasers=[cat], steps=2)[0] for p in ("a cat", "a dog") for s in (0, 7)]
    assert len(together) == 4
    for picture, alone in zip(together, apart, strict=True):
        # A batch of four is summed in another order than one of one.
        assert max(high for _, high in ImageChops.difference(picture, alone).getextrema()) <= 1


def test_samples_show_base_above_and_student_below(tiny_dir: Path, tmp_path: Path) -> None:
    train(tiny_recipe(tiny_dir, lr=0.05, preview_every=2), out=tmp_path, progress=False)
    sheets = []
    for name in ("previews/step_00002.png", "samples/before_after.png"):
        with Image.open(tmp_path / name) as sheet:
            sheets.append(sheet.copy())
    (width, height), middle = sheets[0].size, sheets[0].height // 2 + 20
    upper, lower = ([sheet.crop(box) for sheet in sheets] for box in ((0, 0, width, middle - 20), (0, middle, width, height)))
    assert ImageChops.difference(*upper).getbbox() is None
    assert ImageChops.difference(*lower).getbbox() is not None


def test_new_run_leaves_no_samples_of_an_old_one(tiny_dir: Path, tmp_path: Path) -> None:
    train(tiny_recipe(tiny_dir, steps=1, preview_every=1), out=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "samples" / "before_after.png").exists()
    train(tiny_recipe(tiny_dir, steps=1, seed=1), out=tmp_path / "run", force=True, progress=False)
    assert not (tmp_path / "run" / "samples" / "before_after.png").exists()
