"""Harmonising: a distillation that brings a stack nearer to what its members do alone, and to the base elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import esd_lora.trajectory
from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import stack
from esd_lora.fusing.harmonising import harmonise
from esd_lora.fusing.interference import measure_interference

KEPT = ["a dog", "a hat", "a house"]
QUICK = {"trajectories": 2, "keep_trajectories": 3, "trajectory_steps": 3, "progress": False}


def distilled(base: Base, members: Sequence[Eraser], steps: int, seed: int = 0) -> Eraser:
    return harmonise(stack(members), members, base, keep=KEPT, steps=steps, seed=seed, **QUICK)


def moved(base: Base, erasers: Sequence[Eraser]) -> float:
    """How far kept prompts' predictions are from the base's."""
    condition = base.encode(KEPT)
    x_t = torch.randn(len(KEPT), *base.latent_shape(), generator=torch.Generator().manual_seed(9))
    t = torch.full((len(KEPT),), 500)
    with torch.no_grad():
        before = base.predict(x_t, t, condition)
        with applied(base, erasers):
            return float((base.predict(x_t, t, condition) - before).norm())


def test_stack_comes_nearer_to_its_members_and_to_the_base(base: Base, cat: Eraser, car: Eraser) -> None:
    members, plain = [cat, car], stack([cat, car])
    better = distilled(base, members, steps=60)
    before, after = (measure_interference(members, base=base, whole=whole).together for whole in (plain, better))
    assert before is not None
    assert after is not None
    assert sum(after) < 0.8 * sum(before)
    (distillation,) = better.header.distillations
    assert distillation.first_loss
    assert distillation.last_loss
    assert distillation.last_loss < distillation.first_loss
    assert moved(base, [better]) < 0.8 * moved(base, [plain])


def test_file_stays_as_large_and_says_the_same(base: Base, cat: Eraser, car: Eraser) -> None:
    plain, better = stack([cat, car]), distilled(base, [cat, car], steps=2)
    (distillation,) = better.header.distillations
    assert (distillation.steps, distillation.trajectories, distillation.keep_trajectories) == (2, (2, 2), 3)
    assert better.header.model_copy(update={"distillations": ()}) == plain.header
    assert {m: (p.rank, p.shape) for m, p in better.pairs.items()} == {m: (p.rank, p.shape) for m, p in plain.pairs.items()}


def test_same_seed_same_bits(base: Base, cat: Eraser, car: Eraser) -> None:
    one, again, other = (distilled(base, [cat, car], steps=3, seed=seed) for seed in (1, 1, 2))
    for module, pair in one.pairs.items():
        assert all(a.equal(b) for a, b in zip(pair, again.pairs[module], strict=True))
    assert any(not pair.up.equal(other.pairs[module].up) for module, pair in one.pairs.items())


def test_no_steps_change_nothing(base: Base, cat: Eraser, car: Eraser) -> None:
    plain, same = stack([cat, car]), distilled(base, [cat, car], steps=0)
    for module, pair in plain.pairs.items():
        torch.testing.assert_close(same.pairs[module].delta(), pair.delta())


def test_batches_in_parts_are_the_same_batch(base: Base, cat: Eraser, car: Eraser, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distilled(base, [cat, car], steps=3)
    monkeypatch.setattr(esd_lora.trajectory, "_PIXELS_PER_BATCH", 5 * base.latent_shape()[1] ** 2)
    parts = distilled(base, [cat, car], steps=3)
    start = stack([cat, car])
    for module, pair in whole.pairs.items():
        moved = pair.delta() - start.pairs[module].delta()
        assert float((pair.delta() - parts.pairs[module].delta()).norm()) <= 0.05 * float(moved.norm()), module
