"""More than one rank: the same eraser, pictures and numbers as one process, one writer, and one end for all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esd_lora import sampling
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser
from esd_lora.evaluation import variants
from esd_lora.evaluation.evaluating import evaluate
from esd_lora.pictures import film, paint
from esd_lora.prediction_cache import FILE_NAME
from esd_lora.ranks import count, rank
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import dump_recipe
from esd_lora.train_state import Checkpoint
from esd_lora.training import train
from esd_lora.watching import StepReport
from rank_processes import run_ranks
from tiny import tiny_recipe

SUITE = """description: Likeness of toy pictures.
prompts:
  all:
    role: general
    templates: ["a {class}", "{class}", "one {class}"]
    fill: {class: [cat, dog, hat, car, bee, owl, key, cup, bed, pen, sun]}
detectors: {ssim: {}}
steps: 2
"""


def train_on(base: Path, recipe: Recipe, out: Path, dtype: str = "float32", **options: Any) -> None:
    train(recipe, base=load_base(base, device="cpu", dtype=dtype), out=out, progress=False, **options)


def trained(number: int, base: Path, recipe: Recipe, out: Path, **options: Any) -> Eraser:
    """Return the eraser that so many ranks train."""
    results_of(number, out.parent / "printed", _train_in_rank, base, recipe, out, options)
    return Eraser.load(out)


def results_of(number: int, folder: Path, work: Callable[..., int], *arguments: object) -> list[int]:
    """Return what a function returns in each of so many ranks, once all have ended well."""
    ended = run_ranks(number, folder, work, *arguments)
    assert [each.code for each in ended] == [0] * number, ended
    return [each.result for each in ended]


def _train_in_rank(base: Path, recipe: Recipe, out: Path, options: dict[str, Any]) -> int:
    rows: list[int] = []
    predict = Base.predict

    def counted(self: Base, x_t: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(len(x_t))
        return predict(self, x_t, *others)

    Base.predict = counted
    train_on(base, recipe, out, **options)
    return sum(rows)


def read_log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text("utf-8").splitlines()]


def assert_equal(one: Eraser, other: Eraser) -> None:
    """Compare weights to 1e-5, and what training them took to the last latent."""
    assert one.pairs.keys() == other.pairs.keys()
    for path, pair in one.pairs.items():
        torch.testing.assert_close(pair.down, other.pairs[path].down, rtol=0, atol=1e-5)
        torch.testing.assert_close(pair.up, other.pairs[path].up, rtol=0, atol=1e-5)
    costs = [{key: value for key, value in each.header.cost.items() if key != "seconds"} for each in (one, other)]
    assert costs[0] == costs[1]


def test_ranks_train_what_one_process_trains(tiny_dir: Path, tmp_path: Path) -> None:
    settings = {"accumulate": 2, "batch_size": 3, "null_batch": 1, "refresh_every": 2, "probe_every": 2, "x_t_from": "student"}
    recipe = tiny_recipe(tiny_dir, **settings)
    one, *several = (trained(number, tiny_dir, recipe, tmp_path / f"{number}") for number in (1, 2, 3))
    alone = read_log(tmp_path / "1")
    for number, eraser in enumerate(several, 2):
        assert_equal(one, eraser)
        for left, right in zip(alone, read_log(tmp_path / f"{number}"), strict=True):
            assert right.keys() == left.keys()
            assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
        assert right["erasure"] == pytest.approx(left["erasure"], rel=1e-3)


def test_ranks_share_what_goes_through_the_denoiser(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_dir, trajectories=4, preserve_trajectories=4, batch_size=4, probe_every=2)
    work = (tmp_path / "printed", _train_in_rank, tiny_dir, recipe)
    alone, *_ = results_of(1, *work, tmp_path / "1", {})
    assert results_of(2, *work, tmp_path / "2", {}) == [alone // 2, alone // 2]


def test_fewer_latents_than_ranks(tiny_dir: Path, tmp_path: Path) -> None:
    """The paper's loop: one trajectory, one point; the guided pair is shared, and one rank has nothing to train on."""
    recipe = tiny_recipe(tiny_dir, "paper", preserve=[])
    assert_equal(*(trained(n, tiny_dir, recipe, tmp_path / f"{n}") for n in (1, 3)))


def test_rank_without_latents_takes_the_same_scaled_steps(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_dir, "paper", preserve=[])
    eraser = trained(3, tiny_dir, recipe, tmp_path / "out", dtype="float16")
    assert all(pair.up.isfinite().all() for pair in eraser.pairs.values())
    assert any(pair.up.any() for pair in eraser.pairs.values())


def test_what_is_measured_is_measured_once(tiny_dir: Path, tmp_path: Path) -> None:
    """Rate, eta, weight and the closed form before them: every rank decides the same, as one process does."""
    auto = {"lr": "auto", "preserve_weight": "auto", "probe_every": 2}
    own = {"eta": "auto", "anchor": "auto", "frames": "auto", "closed_form": {"keep": 1.0, "push": 0.5, "ridge": 1e-3}}
    recipe = tiny_recipe(tiny_dir, **auto, **own)
    one, two = (trained(n, tiny_dir, recipe, tmp_path / f"{n}") for n in (1, 2))
    first, second = (each.header.calibrations[0] for each in (one, two))
    assert second.lr == pytest.approx(first.lr, rel=1e-4)
    assert [step for step, _ in second.etas] == [step for step, _ in first.etas]
    assert one.header.cost["steps"] == two.header.cost["steps"] > 0
    assert len(first.readings) > 1
    for left, right in zip(first.readings, second.readings, strict=True):
        assert right.model_dump() == pytest.approx(left.model_dump(), rel=1e-3, abs=1e-5)


def interrupt(report: StepReport) -> None:
    """Press Ctrl-C, as only the last rank sees it."""
    if report.state.step == 2 and rank() == count() - 1:
        os.kill(os.getpid(), signal.SIGINT)


def _train_until_interrupted(base: Path, recipe: Recipe, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_on(base, recipe, out, on_step=[interrupt])


def test_resumes_with_another_number_of_ranks(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_dir, steps=6, refresh_every=3)
    unbroken, out = trained(1, tiny_dir, recipe, tmp_path / "unbroken"), tmp_path / "out"
    ended = run_ranks(2, tmp_path / "printed", _train_until_interrupted, tiny_dir, recipe, out)
    assert [each.code for each in ended] == [0, 0], ended
    assert len(read_log(out)) == 3  # pressed in a watcher, after the second step; seen after the third
    for number in (1, 3):
        again = shutil.copytree(out, tmp_path / f"{number}")
        assert_equal(unbroken, trained(number, tiny_dir, recipe, again, resume=True))


def _stop_on_the_last_rank(report: StepReport) -> bool:
    return rank() == count() - 1 and report.state.step == 2


def test_watcher_that_ends_one_rank_ends_all(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_dir, steps=5)
    assert trained(2, tiny_dir, recipe, tmp_path / "out", on_step=[_stop_on_the_last_rank]).header.cost["steps"] == 2


def _die(report: StepReport) -> None:
    if rank() == 1 and report.state.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def _train_from_the_shell(recipe: Path, out: Path) -> None:
    from esd_lora import training, watching

    def watchers_for(*arguments: Any) -> Any:
        return [*watching.watchers_for(*arguments), _die]

    training.watchers_for = watchers_for
    main(["train", str(recipe), "--device", "cpu", "-o", str(out)])


def test_rank_that_is_killed_ends_the_others_with_the_cause(tiny_dir: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(dump_recipe(tiny_recipe(tiny_dir, steps=50, checkpoint_every=2)), encoding="utf-8")
    other, killed = run_ranks(2, tmp_path / "printed", _train_from_the_shell, file, out)
    assert killed.code == -signal.SIGKILL
    assert other.code == 1
    assert "error (rank 0): another of the 2 ranks has ended, so this one ends too" in other.text
    assert "Traceback" not in other.text
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "train_log.jsonl"]
    resumed = trained(1, tiny_dir, tiny_recipe(tiny_dir, steps=50, checkpoint_every=2), out, resume=True)
    assert resumed.header.cost["steps"] == 50


def test_cache_of_predictions_is_filled_once_and_found_by_all(tiny_dir: Path, tmp_path: Path) -> None:
    recipe, cache = tiny_recipe(tiny_dir, x_t_from="base", refresh_every=10), tmp_path / "cache"
    made = trained(2, tiny_dir, recipe, tmp_path / "made", teacher_cache=cache)
    size = (cache / FILE_NAME).stat().st_size
    for number in (1, 2):
        same = trained(number, tiny_dir, recipe, tmp_path / f"found by {number}", teacher_cache=cache)
        assert same.header.cost["sample_evaluations"] == 0 < made.header.cost["sample_evaluations"]
        for path, pair in made.pairs.items():
            torch.testing.assert_close(pair.up, same.pairs[path].up, rtol=0, atol=1e-5)
    assert (cache / FILE_NAME).stat().st_size == size


_SCRIPT = """
import os, signal, sys
from pathlib import Path
from esd_lora.bases.loading import load_base
from esd_lora.cli.printing import reporting_faults
from esd_lora.ranks import rank
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

def end(report):
    if report.state.step == 3 and rank() == 1:
        os.kill(*{"killed": (os.getpid(), signal.SIGKILL), "interrupted": (os.getppid(), signal.SIGINT)}[sys.argv[1]])

recipe = load_recipe(sys.argv[2])
with reporting_faults():
    train(recipe, base=load_base(recipe.base, device="cpu"), out=Path(sys.argv[3]), on_step=[end])
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["killed", "interrupted"])
def test_torchrun_ends_with_a_rank_and_leaves_a_checkpoint(tiny_dir: Path, tmp_path: Path, way: str) -> None:
    script, file, out = tmp_path / "script.py", tmp_path / "recipe.yaml", tmp_path / "out"
    script.write_text(_SCRIPT, encoding="utf-8")
    recipe = tiny_recipe(tiny_dir, steps=100_000, refresh_every=100_000, checkpoint_every=2 if way == "killed" else 0)
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *map(str, (script, way, file, out))]
    done = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode != 0
    assert ("Signal 9 (SIGKILL) received" if way == "killed" else "error (rank 1): interrupted.") in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "train_log.jsonl"]
    assert Checkpoint.read(out, dump_recipe(recipe)).content["step"] >= (2 if way == "killed" else 3)


_LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "-m"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", _LAUNCHERS.values(), ids=_LAUNCHERS)
def test_launchers_train_and_evaluate(tiny_dir: Path, tmp_path: Path, launcher: list[str]) -> None:
    file, suite = tmp_path / "recipe.yaml", tmp_path / "suite.yaml"
    recipe = tiny_recipe(tiny_dir, checkpoint_every=2, preview_every=2)
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    suite.write_text(SUITE, encoding="utf-8")
    one = trained(1, tiny_dir, recipe, tmp_path / "one")
    out, measured = tmp_path / "out", tmp_path / "measured"
    for arguments in (
        ["train", file, "--track", "tensorboard", "--kohya", "-o", out],
        ["evaluate", out, "--base", tiny_dir, "--suite", suite, "--attach", "-o", measured],
    ):
        command = [sys.executable, "-m", *launcher, "esd_lora", *map(str, arguments), "--device", "cpu"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert_equal(one, Eraser.load(out))
    assert Eraser.load(out).header.evaluation
    assert (out / "previews/step_00002.png").exists()
    assert len(list((out / "kohya").iterdir())) == 1
    assert list((out / "tracking").rglob("events.*"))
    assert (measured / "report.html").exists()


def _generate(base: Path, eraser: Path, out: Path) -> int:
    pictures: list[int] = []

    def counted(base: Base, prompts: Any, *others: Any, **options: Any) -> Any:
        pictures.append(len(prompts))
        return film(base, prompts, *others, **options)

    sampling.film = counted
    prompts = [f"a {word}" for word in ("cat", "dog", "hat", "car", "bee", "owl", "key", "cup", "bed", "pen")]
    options: dict[str, Any] = {"compare": True, "strengths": (0.0, 0.5), "seeds": range(4), "steps": 2}
    sampling.write_pictures(load_base(base, device="cpu"), prompts, out, erasers=[eraser], **options)
    return sum(pictures)


def _evaluate(base: Path, eraser: Path, suite: Path, out: Path) -> int:
    pictures: list[int] = []

    def counted(base: Base, prompts: Any, *others: Any, **options: Any) -> Any:
        pictures.append(len(prompts))
        return paint(base, prompts, *others, **options)

    variants.paint = counted
    report = evaluate(load_base(base, device="cpu"), suite, out, erasers=[eraser], progress=False)
    assert "erased" in report.variants  # on every rank
    return sum(pictures)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_are_those_of_one_process(tiny_dir: Path, cat_dir: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        painted = results_of(number, tmp_path / "printed", _generate, tiny_dir, cat_dir, tmp_path / f"{number}")
        assert painted == {1: [120], 2: [60, 60], 3: [40, 40, 40]}[number]
    one = contents(tmp_path / "1")
    assert len(one) == 42
    assert one == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_evaluation_is_that_of_one_process(tiny_dir: Path, cat_dir: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE, encoding="utf-8")
    for number in (1, 2):
        painted = results_of(number, tmp_path / "printed", _evaluate, tiny_dir, cat_dir, suite, tmp_path / f"{number}")
        assert painted == {1: [66], 2: [32, 34]}[number]
    one, two = (contents(tmp_path / f"{number}") for number in (1, 2))
    assert sum(name.startswith("images/") for name in one) == 66
    assert one == two


def _from_the_shell(*arguments: str) -> None:
    main(list(arguments))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["merge", "no-cat", "-o", "out"], "merge is the work of one process, and 2 were started"),
        (["generate", "a cat", "-o", "out", "--dry-run"], "--dry-run counts and times one process"),
        (
            ["generate", "a cat", "-o", "out", "--force", "--device", "cuda:1"],
            "device 'cuda:1' is one, and 2 ranks were started",
        ),
    ],
)
def test_what_ranks_cannot_do_is_refused(tmp_path: Path, arguments: list[str], reason: str) -> None:
    for number, ended in enumerate(run_ranks(2, tmp_path / "printed", _from_the_shell, *arguments)):
        assert ended.code == 1
        assert f"error (rank {number}): {reason}" in ended.text
        assert "Traceback" not in ended.text
