"""What must survive a restart, and that a fault in between leaves the student as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from esd_lora.adapter import add_adapter, dropout_enabled
from esd_lora.bases.base import Base
from esd_lora.seeds import Stream, stream_seed, text_seed
from esd_lora.teacher import ReplayBuffers
from esd_lora.train_state import Checkpoint, TrainState
from esd_lora.training import train
from esd_lora.trajectory import Points
from tiny import tiny_recipe


def state_of(values: list[float]) -> TrainState:
    parameters = [nn.Parameter(torch.tensor(values))]
    return TrainState(parameters, torch.optim.Adam(parameters, lr=0.1), torch.amp.GradScaler("cpu", enabled=False))


def test_walk_that_fails_leaves_the_student_its_weights() -> None:
    state = state_of([1.0, 2.0])
    with state.walking(fresh=True):
        pass
    state.parameters[0].data.add_(1)
    remembered: list[float] = []

    def fail() -> None:
        remembered.extend(state.parameters[0].tolist())
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), state.walking(fresh=False):
        fail()
    assert remembered == [1.0, 2.0]
    assert state.parameters[0].tolist() == [2.0, 3.0]


def test_step_that_fails_leaves_dropout_off(base: Base) -> None:
    lora = tiny_recipe(base.id, lora={"rank": 2, "alpha": 2, "dropout": 0.5}).lora
    add_adapter(base, base.family.modules(base.model, "xattn"), lora, 0)
    training: list[bool] = []

    def fail() -> None:
        training.append(any(module.training for module in base.model.modules()))
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), dropout_enabled(base, lora, 0):
        fail()
    assert training == [True]
    assert not any(module.training for module in base.model.modules())


def test_every_sample_of_every_batch_is_counted(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one step need not be of one size."""
    as_usual = ReplayBuffers.batches

    def uneven(buffers: ReplayBuffers, *args: object) -> list[Points]:
        (whole,) = as_usual(buffers, *args)
        return whole.split(4)

    recipe = tiny_recipe(base.id, batch_size=6, preserve=[], steps=2)
    monkeypatch.setattr(ReplayBuffers, "batches", uneven)
    assert train(recipe, base=base, progress=False).header.cost["student_samples"] == 2 * 6


def test_checkpoint_holds_all_that_a_training_goes_on_with(tmp_path: Path) -> None:
    state = state_of([1.0, 2.0])
    for _ in range(3):
        (state.parameters[0] ** 2).sum().backward()
        state.update(loss=torch.tensor(0.5), samples=7, lr=0.01)
    with state.walking(fresh=True):
        state.save(tmp_path, "a recipe", 40)
    other, checkpoint = state_of([0.0, 0.0]), Checkpoint.read(tmp_path, "a recipe")
    other.restore(checkpoint)
    assert torch.equal(other.parameters[0], state.parameters[0])
    assert torch.equal(other.walker[0], state.parameters[0])
    assert (other.step, other.loss, other.student_samples, checkpoint.evaluations) == (3, 0.5, 21, 40)
    for resumed in (state, other):
        resumed.optimizer.zero_grad()
        (resumed.parameters[0] ** 2).sum().backward()
        resumed.update(loss=torch.tensor(0.4), samples=7, lr=0.01)
    assert torch.equal(other.parameters[0], state.parameters[0])  # Adam's moments came along


def test_streams_do_not_meet() -> None:
    seeds = [stream_seed(seed, stream, counter) for seed in range(3) for stream in Stream for counter in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert text_seed("a", 1) == text_seed("a 1") != text_seed("a", 2)
