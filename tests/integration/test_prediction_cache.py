"""The teacher's cache: nothing is walked twice, nothing stale or damaged is believed, and two processes may share it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from esd_lora import prediction_cache
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.prediction_cache import FILE_NAME, PredictionCache, network_key, prediction_key
from esd_lora.training import train
from tiny import tiny_recipe

ONE = torch.tensor([1.5, -2.0])


@pytest.fixture
def base(tiny_dir: Path) -> Base:
    return load_base(tiny_dir)


def run(base: Base, folder: Path | None, **settings: object) -> Eraser:
    recipe = tiny_recipe(base.id, **{"probe_every": 2, "null_batch": 1, **settings})
    return train(recipe, base=base, progress=False, teacher_cache=folder)


def work(eraser: Eraser) -> float:
    return eraser.header.cost["sample_evaluations"]


def same(one: Eraser, other: Eraser) -> bool:
    return all(torch.equal(a, b) for path in one.pairs for a, b in zip(one.pairs[path], other.pairs[path], strict=True))


def test_second_run_with_other_numbers_does_not_walk(base: Base, tmp_path: Path) -> None:
    plain = run(base, None)
    first = run(base, tmp_path)
    assert same(plain, first)
    assert work(first) == work(plain)
    again = run(base, tmp_path)
    assert same(plain, again)
    readings = 4 // 2 * 8 * 8  # of the probe: predictions of the student, which no cache knows
    assert work(again) == readings
    for settings in ({"eta": 1.0}, {"lr": 1e-3}, {"scope": "noxattn", "x_t_from": "base"}, {"lora": {"rank": 2, "alpha": 2}}):
        assert work(run(base, tmp_path, **settings)) == readings, settings
        assert same(run(base, tmp_path, **settings), run(base, None, **settings)), settings


@pytest.mark.parametrize("settings", [{"seed": 1}, {"guidance": 2.0}, {"trajectory_steps": 3}, {"concepts": ["a hat"]}])
def test_other_trajectories_are_walked(base: Base, tmp_path: Path, settings: dict[str, object]) -> None:
    run(base, tmp_path, preserve=["a dog"])
    assert work(run(base, tmp_path, preserve=["a dog"], **settings)) > work(run(base, tmp_path, preserve=["a dog"]))


def test_other_weights_are_another_base(base: Base, tmp_path: Path) -> None:
    first = work(run(base, tmp_path))
    with torch.no_grad():
        base.model.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert work(run(base, tmp_path)) == first


def test_a_student_s_own_trajectories_are_walked_every_time(base: Base, tmp_path: Path) -> None:
    settings = {"x_t_from": "student", "refresh_every": 2, "lr": 0.05}
    run(base, tmp_path, **settings)
    assert same(run(base, tmp_path, **settings), run(base, None, **settings))


def entries(folder: Path) -> int:
    with sqlite3.connect(folder / FILE_NAME) as database:
        return database.execute("SELECT COUNT(*) FROM entries").fetchone()[0]


def never() -> torch.Tensor:
    raise AssertionError("it was there")


def test_damaged_entry_is_made_again(tmp_path: Path) -> None:
    cache = PredictionCache(tmp_path)
    cache.find(b"key", lambda: ONE)
    assert torch.equal(cache.find(b"key", never), ONE)
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        content = bytearray(database.execute("SELECT content FROM contents").fetchone()[0])
        content[-1] ^= 1
        database.execute("UPDATE contents SET content = ?", (bytes(content),))
    assert torch.equal(cache.find(b"key", lambda: ONE + 1), ONE + 1)
    assert torch.equal(cache.find(b"key", never), ONE + 1)
    assert (cache.hits, cache.misses) == (2, 2)


@pytest.mark.parametrize("damage", [lambda _: b"no database at all" * 100, lambda whole: whole[:5000] + b"\xff" * 3000])
def test_damaged_file_is_begun_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache = PredictionCache(tmp_path)
    for number in range(20):
        cache.find(bytes([number]) * 32, lambda: ONE)
    file = tmp_path / FILE_NAME
    file.write_bytes(damage(file.read_bytes()))
    numbers = [bytes([number]) * 32 for number in range(20)]
    with pytest.warns(UserWarning, match="is damaged, and begun anew"):
        predictions = [cache.find(number, lambda: ONE) for number in numbers]
    assert all(torch.equal(each, ONE) for each in predictions)
    cache.find(numbers[-1], lambda: ONE)
    assert torch.equal(PredictionCache(tmp_path).find(numbers[-1], never), ONE)


def test_least_recently_used_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(prediction_cache.time, "time", lambda: float(next(clock)))
    large = torch.zeros(1000)
    cache = PredictionCache(tmp_path, most=3 * 4200)
    for key in (b"a", b"b", b"c"):
        cache.find(key, lambda: large)
    cache.find(b"a", never)
    cache.find(b"d", lambda: large)
    assert entries(tmp_path) == 3
    for key in (b"a", b"c", b"d"):
        cache.find(key, never)
    with pytest.raises(AssertionError, match="it was there"):
        cache.find(b"b", never)
    cache.find(b"too large", lambda: torch.zeros(10_000))
    assert entries(tmp_path) == 3


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from esd_lora.prediction_cache import PredictionCache\n"
        "cache = PredictionCache(sys.argv[1])\n"
        "for i in range(60):\n"
        "    value = torch.full((50,), float(i))\n"
        "    assert torch.equal(cache.find(b'%d' % i, lambda: value), value)\n"
        "print(cache.hits + cache.misses)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["60\n", "60\n"]
    assert [process.returncode for process in both] == [0, 0]
    assert entries(tmp_path) == 60


def test_cache_that_cannot_be_written_to_is_left_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PredictionCache(tmp_path)
    full = sqlite3.OperationalError("database or disk is full")
    monkeypatch.setattr(cache, "_write", lambda *_: (_ for _ in ()).throw(full))
    with pytest.warns(UserWarning, match="left aside: database or disk is full"):
        assert torch.equal(cache.find(b"key", lambda: ONE), ONE)
    assert torch.equal(cache.find(b"other", lambda: ONE), ONE), "and said once"
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(EsdLoraError, match=r"cannot be used .* Choose another folder"):
        PredictionCache(file)


def test_keys_tell_inputs_apart() -> None:
    network = network_key([("a", ONE)], {"heads": 2})
    keys = [
        prediction_key(network, {"x_t": ONE}),
        prediction_key(network, {"t": ONE}),
        prediction_key(network, {"x_t": ONE + 1}),
        prediction_key(network, {"x_t": ONE.half()}),
        prediction_key(network, {"x_t": ONE[None]}),
        prediction_key(network_key([("b", ONE)], {"heads": 2}), {"x_t": ONE}),
        prediction_key(network_key([("a", ONE)], {"heads": 4}), {"x_t": ONE}),
    ]
    assert len(set(keys)) == len(keys)
    assert prediction_key(network, {"x_t": ONE, "t": ONE}) == prediction_key(network, {"t": ONE, "x_t": ONE.clone()})


def test_on_the_command_line(tiny_dir: Path, tmp_path: Path) -> None:
    given = ["train", "fast", "--concept", "a cat", "--base", str(tiny_dir), "--teacher-cache", str(tmp_path / "cache")]
    given += [part for each in ("steps=2", "lr=0.001", "trajectories=1", "preview_every=0") for part in ("-s", f"train.{each}")]
    for number in range(2):
        result = CliRunner().invoke(main, [*given, "-o", str(tmp_path / f"out{number}")])
        assert result.exit_code == 0, result.output
    assert "0 batches found" not in result.stderr
    assert "batches found" in result.stderr
