"""Harmonising: a distillation that brings a stack nearer to what its members do alone, and to the base elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import esd_lora.trajectory
from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import stack
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.fusing.harmonising import harmonise
from esd_lora.fusing.interference import measure_interference

KEPT = ["a dog", "a hat", "a house"]
QUICK = {"trajectories": 2, "keep_trajectories": 3, "trajectory_steps": 3, "progress": False}


def distilled(base: Base, members: Sequence[Eraser], steps: int, seed: int = 0, **fields: Any) -> Eraser:
    return harmonise(members, base, keep=KEPT, steps=steps, seed=seed, **{"scope": "xattn", "rank": 4, **QUICK, **fields})


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
    better = distilled(base, members, steps=30)
    before, after = (measure_interference(members, base=base, whole=whole).together for whole in (plain, better))
    assert before is not None
    assert after is not None
    assert sum(after) < 0.8 * sum(before)
    (distillation,) = better.header.distillations
    assert distillation.first_loss
    assert distillation.last_loss
    assert distillation.last_loss < distillation.first_loss
    assert moved(base, [better]) < 0.8 * moved(base, [plain])


def test_layers_and_rank_are_those_of_the_recipe_and_the_header_is_the_stack_s(base: Base, cat: Eraser, car: Eraser) -> None:
    better = distilled(base, [cat, car], steps=1, scope="full", rank=2)
    (distillation,) = better.header.distillations
    assert (distillation.steps, distillation.trajectories, distillation.keep_trajectories) == (2, (2, 2), 3)
    assert (distillation.scope, distillation.rank, len(distillation.members)) == ("full", 2, 2)
    ordered = stack(sorted([cat, car], key=lambda member: hash_tensors(member.state_dict())))
    assert better.header.scope == "full"
    assert better.header.model_copy(update={"distillations": (), "scope": ordered.header.scope}) == ordered.header
    assert better.pairs.keys() == base.family.modules(base.model, "full").keys()
    assert {pair.rank for pair in better.pairs.values()} == {2}


def test_same_seed_same_bits(base: Base, cat: Eraser, car: Eraser) -> None:
    one, again, other = (distilled(base, [cat, car], steps=2, seed=seed) for seed in (1, 1, 2))
    for module, pair in one.pairs.items():
        assert all(a.equal(b) for a, b in zip(pair, again.pairs[module], strict=True))
    assert any(not pair.up.equal(other.pairs[module].up) for module, pair in one.pairs.items())


def test_batches_in_parts_are_the_same_batch(base: Base, cat: Eraser, car: Eraser, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distilled(base, [cat, car], steps=2)
    monkeypatch.setattr(esd_lora.trajectory, "_PIXELS_PER_BATCH", 5 * base.latent_shape()[1] ** 2)
    parts = distilled(base, [cat, car], steps=2)
    for module, pair in whole.pairs.items():
        update = pair.delta()
        assert float((update - parts.pairs[module].delta()).norm()) <= 0.05 * float(update.norm()), module


def test_member_that_puts_what_another_erases_is_told(base: Base, cat: Eraser, car: Eraser) -> None:
    """Erased cats become cars, and erased cars cats: as a stack, neither is gone."""
    (concept,) = cat.header.concepts
    to_car = concept.model_copy(update={"pairs": tuple((prompt, prompt.replace("cat", "car")) for prompt, _ in concept.pairs)})
    towards = Eraser(cat.pairs, cat.header.model_copy(update={"concepts": (to_car,)}))
    with pytest.warns(UserWarning, match="where 'a cat' is erased, 'a car' appears, .* --avoid 'a car'"):
        distilled(base, [towards, car], steps=1)
    of_both = concept.model_copy(update={"pairs": (("a cat in a car", "a car"),)})
    distilled(base, [Eraser(cat.pairs, cat.header.model_copy(update={"concepts": (of_both,)})), car], steps=1)
