"""What a recipe can ask of a training beside the paper's loop: each does what it says, on the toy base."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.lessons import find_neighbours, plan
from esd_lora.optimizers import OPTIMIZERS, make_optimizer
from esd_lora.recipe import Neighbours, Recipe
from esd_lora.teacher import latent_shapes, refill
from esd_lora.training import learning_rate, prepare_prompts, train
from esd_lora.watching import StepReport
from tiny import tiny_recipe


def assert_close(one: Eraser, other: Eraser, **tolerance: float) -> None:
    assert one.pairs.keys() == other.pairs.keys()
    for path, pair in one.pairs.items():
        torch.testing.assert_close(pair.delta(), other.pairs[path].delta(), **tolerance)


def assert_identical(one: Eraser, other: Eraser) -> None:
    assert one.pairs.keys() == other.pairs.keys()
    for path, pair in one.pairs.items():
        assert torch.equal(pair.down, other.pairs[path].down), path
        assert torch.equal(pair.up, other.pairs[path].up), path


def test_accumulated_batches_are_one_large_batch(tiny_dir: Path) -> None:
    whole = tiny_recipe(tiny_dir, batch_size=6, preserve_batch=4, accumulate=1)
    parts = tiny_recipe(tiny_dir, batch_size=3, preserve_batch=2, accumulate=2)
    # Sums of float32 in another order, through Adam's division by small moments.
    assert_close(train(whole, progress=False), train(parts, progress=False), rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_memory_alone(tiny_dir: Path, base: Base) -> None:
    plain = train(tiny_recipe(tiny_dir), base=base, progress=False)
    saving = train(tiny_recipe(tiny_dir, gradient_checkpointing=True), base=base, progress=False)
    assert_close(plain, saving, rtol=1e-4, atol=1e-7)
    assert not base.model.is_gradient_checkpointing


def test_dropout_is_of_training_steps_alone_and_repeatable(tiny_dir: Path) -> None:
    kept: list[bool] = []

    def look(report: StepReport) -> None:
        kept.append(any(module.training for module in report.teacher.base.model.modules()))

    state = torch.get_rng_state()
    recipe = tiny_recipe(tiny_dir, lora={"rank": 4, "alpha": 4, "dropout": 0.3})
    one = train(recipe, progress=False, on_step=[look])
    assert torch.equal(torch.get_rng_state(), state)
    assert_identical(one, train(recipe, progress=False))
    assert not any(kept)
    without = train(tiny_recipe(tiny_dir, lora={"rank": 4, "alpha": 4}), progress=False)
    assert any(not torch.equal(one.pairs[path].up, pair.up) for path, pair in without.pairs.items())


def test_ranks_by_kind_of_layer_scale_alike(tiny_dir: Path) -> None:
    lora = {"rank": 4, "alpha": 2, "conv_rank": 2, "ranks": {"xattn": 6, "xattn-kv": 8}}
    seen: dict[str, float] = {}

    def look(report: StepReport) -> None:
        for path, layer in report.teacher.base.model.named_modules():
            if hasattr(layer, "scaling"):
                seen[path] = layer.scaling["esd"]

    eraser = train(tiny_recipe(tiny_dir, scope="full", lora=lora, steps=1), progress=False, on_step=[look])
    for path, pair in eraser.pairs.items():
        expected = 8 if path.endswith(("attn2.to_k", "attn2.to_v")) else 6 if ".attn2." in path else 4
        assert pair.rank == (2 if pair.down.dim() == 4 else expected), path
    assert set(seen.values()) == {0.5}
    assert {pair.rank for pair in eraser.pairs.values()} == {2, 4, 6, 8}


def test_rslora_divides_by_the_root_of_the_rank(tiny_dir: Path) -> None:
    lora = {"rank": 4, "alpha": 4}
    plain = train(tiny_recipe(tiny_dir, lora=lora, steps=1, optimizer="sgd"), progress=False)
    wide = train(tiny_recipe(tiny_dir, lora={**lora, "rslora": True}, steps=1, optimizer="sgd"), progress=False)
    # One SGD step from zero: the factor comes once with the gradient and once with the file.
    for path, pair in plain.pairs.items():
        torch.testing.assert_close(wide.pairs[path].delta(), 4 * pair.delta(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS.names() if "8bit" not in name])
def test_every_optimizer_trains(tiny_dir: Path, base: Base, name: str) -> None:
    eraser = train(tiny_recipe(tiny_dir, optimizer=name, steps=2), base=base, progress=False)
    assert all(pair.up.isfinite().all() and pair.up.any() for pair in eraser.pairs.values())


def test_optimizer_arguments() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    made = make_optimizer("adamw", [parameter], 0.1, {"weight_decay": 0.3})
    assert isinstance(made, torch.optim.AdamW)
    assert made.param_groups[0]["weight_decay"] == 0.3
    with pytest.raises(EsdLoraError, match="does not take"):
        make_optimizer("adam", [parameter], 0.1, {"momentum": 0.9})


def test_warm_up_and_schedules(tiny_dir: Path) -> None:
    spec = tiny_recipe(tiny_dir, steps=14, warmup=4, lr=1.0, lr_schedule="linear").train
    rates = [learning_rate(spec, step, spec.lr) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1 - 0.09 * i for i in range(10)])
    constant = spec.model_copy(update={"lr_schedule": "constant"})
    assert [learning_rate(constant, step, 1.0) for step in range(3, 14)] == pytest.approx([1.0] * 11)


def test_sizes_of_latents(base: Base) -> None:
    def shapes(**asked: object) -> list[tuple[int, int, int]]:
        return latent_shapes(base, tiny_recipe(base.id, **asked).train)

    scale = base.pipe.vae_scale_factor
    assert shapes() == [(4, 8, 8)]
    assert shapes(resolution=16 * scale) == [(4, 16, 16)]
    assert shapes(resolution=17 * scale) == [(4, 16, 16)]
    assert shapes(resolution=16 * scale, aspects=["1:1", "4:1", "1:4"]) == [(4, 16, 16), (4, 8, 32), (4, 32, 8)]
    assert shapes(resolution=16 * scale, aspects=["1:1", "2:2"]) == [(4, 16, 16)]


def test_aspect_buckets_take_turns(tiny_dir: Path, base: Base) -> None:
    sizes: list[tuple[int, ...]] = []
    as_usual = base.family.predict
    recipe = tiny_recipe(tiny_dir, resolution=32, aspects=["1:1", "4:1"], steps=4, trajectories=6, trajectory_steps=2)

    def record(report: StepReport) -> None:
        sizes.append(report.teacher.base.latent_shape())

    trained: list[tuple[int, ...]] = []

    def predict(pipe: object, x_t: torch.Tensor, *rest: object) -> torch.Tensor:
        if torch.is_grad_enabled():
            trained.append(tuple(x_t.shape[-2:]))
        return as_usual(pipe, x_t, *rest)

    base.family.__dict__["predict"] = predict
    try:
        train(recipe, base=base, progress=False, on_step=[record])
    finally:
        del base.family.__dict__["predict"]
    assert trained == [(16, 16), (8, 32)] * 2


def test_buckets_share_the_trajectories(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    from esd_lora.teacher import Teacher

    recipe = tiny_recipe(base.id, concepts=[f"concept {i}" for i in range(4)], preserve=[], trajectories=4)
    teacher, walked = Teacher(base, recipe, plan(recipe)), []
    monkeypatch.setattr(
        teacher, "fill", lambda lesson, _noise, _spec, shape: walked.append((shape, lesson.tolist())) or (None, [])
    )
    refill(teacher, 0, [(4, 8, 8), (4, 8, 16)])
    assert [shape for shape, _ in walked] == [(4, 8, 8), (4, 8, 16)]
    assert sorted(row for _, rows in walked for row in rows) == [0, 1, 2, 3]


def test_plateau_ends_a_training(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_dir, steps=50, lr=1e-12, probe_every=2, patience=3)
    eraser = train(recipe, out=tmp_path / "run", progress=False)
    # The first probe sets the best; three more rise by nothing.
    assert eraser.header.cost["steps"] == 8
    rising = tiny_recipe(tiny_dir, steps=12, lr=0.01, probe_every=2, patience=3, batch_size=4, preserve=[])
    assert train(rising, progress=False).header.cost["steps"] == 12


def neighbours(recipe: Recipe, base: Base, words: tuple[str, ...] | str, count: int) -> list[str]:
    """Find the neighbours of a recipe's concepts in a vocabulary."""
    asking = recipe.model_copy(update={"neighbours": Neighbours(vocabulary=words, count=count)})
    return find_neighbours(asking, base.keep, base.encode)


def test_neighbours_are_what_erasing_would_move_furthest() -> None:
    base = load_base("emoji")
    words = ("a rocket", "a pizza", "two cats", "a fox", "a cat in ink style", "a key", "a dog", "a crown")
    recipe = tiny_recipe("emoji", concepts=["a cat"], preserve=[])
    found = neighbours(recipe, base, words, 1)
    assert found == ["a dog"]
    lessons = plan(recipe, near=found)
    assert [lesson.prompt for lesson in lessons if lesson.preserves] == found
    two = tiny_recipe("emoji", concepts=["a cat", "a rocket"], preserve=[])
    assert neighbours(two, base, words, 1)[0] == "a dog"
    assert len(neighbours(two, base, words[1:], 1)) == 2
    assert neighbours(recipe, base, words[::-1], 8)[0] == "a dog"
    assert find_neighbours(recipe, base.keep, base.encode) == []


@pytest.mark.parametrize(("scope", "by", "every"), [("xattn", "base", 90), ("noxattn", "student", 30), ("full", "base", 90)])
def test_layers_that_read_no_text_are_trained_where_the_student_goes(base: Base, scope: str, by: str, every: int) -> None:
    auto = {"x_t_from": "auto", "refresh_every": "auto", "steps": 90}
    spec = prepare_prompts(base, tiny_recipe(base.id, scope=scope, **auto), ()).teacher.spec
    assert (spec.x_t_from, spec.walk_every) == (by, every)
    given = tiny_recipe(base.id, scope=scope, x_t_from="base", refresh_every=7)
    assert prepare_prompts(base, given, ()).teacher.spec == given.train


def test_vocabulary_of_neighbours(tiny_dir: Path, tmp_path: Path, base: Base) -> None:
    file = tmp_path / "words.txt"
    file.write_text("# animals\na dog\n\na cat\ntwo cats\na dig\n")
    recipe = tiny_recipe(tiny_dir)
    assert sorted(neighbours(recipe, base, str(file), 9)) == ["a dig", "a dog"]
    with pytest.raises(EsdLoraError, match="cannot be read"):
        neighbours(recipe, base, str(tmp_path / "none.txt"), 9)
    with pytest.raises(EsdLoraError, match="longer one"):
        neighbours(recipe, base, ("a cat",), 9)
    recipe = tiny_recipe(tiny_dir, preserve=["a hat"]).model_copy(
        update={"neighbours": Neighbours(vocabulary=("a dog", "a car"), count=1)}
    )
    header = train(recipe, progress=False).header
    assert len(header.preserve) == 2
    assert header.preserve[0] == "a hat"


def test_erased_from_another_prompt_keeps_that_prompt_as_anchor(tiny_dir: Path) -> None:
    recipe = tiny_recipe(tiny_dir, concepts=[{"name": "hat", "erase_from": "a cowboy"}], preserve=[])
    (lesson,) = plan(recipe)
    assert (lesson.prompt, lesson.concept, lesson.anchor) == ("a cowboy", "hat", "a cowboy")
    explicit = tiny_recipe(tiny_dir, concepts=[{"name": "hat", "erase_from": "a cowboy", "anchor": ""}], preserve=[])
    assert plan(explicit)[0].anchor == ""
    filled = tiny_recipe(tiny_dir, concepts=[{"name": "hat", "erase_from": "a {x}", "fill": ["man", "cat"]}], preserve=[])
    assert [lesson.prompt for lesson in plan(filled)] == ["a man", "a cat"]


def test_progress_is_tracked(tiny_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_recipe(tiny_dir, probe_every=2), out=tmp_path / "run", progress=False, track=["tensorboard"])
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text("utf-8").splitlines()]
    events = EventAccumulator(str(tmp_path / "run" / "tracking" / "esd-lora")).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    assert [event.value for event in losses] == pytest.approx([line["loss"] for line in log])
    assert events.Scalars("erasure")


KILLED = f"""
import sys, torch
torch.set_num_threads({torch.get_num_threads()})  # sums are in another order with another number of them
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train
train(load_recipe(sys.argv[1]), out=sys.argv[2], progress=False, device="cpu")
"""


@pytest.mark.parametrize("x_t_from", ["base", pytest.param("student", marks=pytest.mark.slow)])
def test_killed_training_resumes_to_the_same_bits(tiny_dir: Path, tmp_path: Path, x_t_from: str) -> None:
    """SIGKILL at a random step, twice; the checkpoints are wherever they are."""
    from esd_lora.recipe_files import dump_recipe

    lora = {"rank": 2, "alpha": 2, "dropout": 0.2}
    settings = {"steps": 60, "checkpoint_every": 3, "refresh_every": 8, "points": "all", "x_t_from": x_t_from}
    recipe = tiny_recipe(tiny_dir, lora=lora, probe_every=5, aspects=["1:1", "2:1"], resolution=16, **settings)
    file, out, log = tmp_path / "recipe.yaml", tmp_path / "run", tmp_path / "run" / "train_log.jsonl"
    file.write_text(dump_recipe(recipe), "utf-8")
    unbroken = train(recipe, out=tmp_path / "unbroken", progress=False)

    kill_at = random.Random(x_t_from).randrange(4, 50)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(file), str(out)]) as process:
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= kill_at):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert (out / "checkpoint.pt").is_file()
    assert not (out / "pytorch_lora_weights.safetensors").exists()

    class KilledError(Exception):
        pass

    def die(report: StepReport) -> None:  # a second time, in mid-resume
        if report.state.step == 55:
            raise KilledError

    with pytest.raises(KilledError):
        train(recipe, out=out, resume=True, progress=False, on_step=[die])
    resumed = train(recipe, out=out, resume=True, progress=False)
    assert_identical(resumed, unbroken)
    told = ("step", "loss", "lr", "erasure")
    texts = [(tmp_path / run / "train_log.jsonl").read_text("utf-8") for run in ("run", "unbroken")]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [[line.get(key) for key in told] for line in logs[0]] == [[line.get(key) for key in told] for line in logs[1]]


class Waits(TorchDispatchMode):
    """Counts how often the host asks the device for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_steps_do_not_wait_for_the_device(tiny_dir: Path, tmp_path: Path) -> None:
    """Losses are read every tenth step and at the end, and the log holds a line for every step. (Adam counts on the host.)"""
    waits, seen = Waits(), []
    recipe = tiny_recipe(tiny_dir, steps=23, null_batch=1, accumulate=2, optimizer="sgd")
    with waits:
        train(recipe, out=tmp_path / "run", progress=False, on_step=[lambda _: seen.append(waits.count)])
    waited = [step for step, (before, after) in enumerate(itertools.pairwise(seen), 1) if after > before]
    assert waited == [], "but for the losses, which are read as one tensor"
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in log] == list(range(1, 24))
    assert all(line["loss"] > 0 for line in log)
