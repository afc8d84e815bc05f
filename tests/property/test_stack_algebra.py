"""Stacking is addition of the updates: it obeys addition's laws, for any layers, ranks and weights."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esd_lora.eraser import Eraser
from esd_lora.stacking import stack
from made import SHAPES, made_eraser, made_header

names = st.text(min_size=1).filter(lambda name: "{x}" not in name)  # a placeholder needs words to fill in
ranks = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 4), min_size=1)
erasers = st.builds(lambda ranks, seed, name: made_eraser(ranks, name, seed=seed), ranks, st.integers(0, 2**32), names)
weights = st.floats(-3, 3)


def deltas(eraser: Eraser) -> dict[str, Tensor]:
    """The update of every layer, zeros where the eraser has none."""
    zeros = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    return {**zeros, **{module: pair.delta() for module, pair in eraser.pairs.items()}}


def assert_same(found: Eraser, expected: dict[str, Tensor]) -> None:
    for module, delta in deltas(found).items():
        torch.testing.assert_close(delta, expected[module], rtol=1e-12, atol=1e-12, msg=lambda text, m=module: f"{m}: {text}")


def total(members: Sequence[Eraser], weights: Sequence[float]) -> dict[str, Tensor]:
    return {
        module: sum((w * deltas(e)[module] for e, w in zip(members, weights, strict=True)), torch.zeros(()))
        for module in SHAPES
    }


@given(erasers, erasers)
def test_update_of_a_stack_is_the_sum(a: Eraser, b: Eraser) -> None:
    assert_same(stack([a, b]), total([a, b], [1, 1]))


@given(st.lists(st.tuples(erasers, weights), min_size=1, max_size=4))
def test_weights_scale_the_members(members: list[tuple[Eraser, float]]) -> None:
    chosen, scales = [e for e, _ in members], [w for _, w in members]
    stacked = stack(chosen, scales)
    assert_same(stacked, total(chosen, scales))
    assert [concept.weight for concept in stacked.header.concepts] == scales
    assert stacked.names == [name for eraser in chosen for name in eraser.names]


@given(erasers, erasers, weights, weights)
def test_weights_of_a_stack_of_stacks_multiply(a: Eraser, b: Eraser, inner: float, outer: float) -> None:
    stacked = stack([stack([a, b], [inner, 1]), a], [outer, 1])
    assert_same(stacked, total([a, b, a], [inner * outer, outer, 1]))
    assert [concept.weight for concept in stacked.header.concepts] == [inner * outer, outer, 1]


@given(erasers, erasers, erasers)
def test_grouping_does_not_matter(a: Eraser, b: Eraser, c: Eraser) -> None:
    left, right = stack([stack([a, b]), c]), stack([a, stack([b, c])])
    assert_same(left, deltas(right))
    assert left.header.concepts == right.header.concepts


@given(erasers)
def test_minus_one_undoes(a: Eraser) -> None:
    assert_same(stack([a, a], [1, -1]), total([a], [0]))


@given(erasers)
def test_stack_of_one_is_the_eraser(a: Eraser) -> None:
    alone = stack([a])
    assert alone.header == a.header
    assert alone.pairs.keys() == a.pairs.keys()
    for module, pair in a.pairs.items():
        assert torch.equal(alone.pairs[module].down, pair.down)
        assert torch.equal(alone.pairs[module].up, pair.up)


@given(ranks, st.integers(0, 2**32))
def test_adding_the_factors_apart_is_another_model(ranks: dict[str, int], seed: int) -> None:
    """Why stacking concatenates: (up_a + up_b) @ (down_a + down_b) has the cross terms too."""
    a, b = made_eraser(ranks, seed=seed), made_eraser(ranks, seed=seed + 1)
    for module, pair in stack([a, b]).pairs.items():
        left, right = a.pairs[module], b.pairs[module]
        apart = left._replace(down=left.down + right.down, up=left.up + right.up)
        error = (apart.delta() - pair.delta()).norm() / pair.delta().norm()
        assert error > 1e-3


@given(
    ranks,
    st.integers(0, 2**32),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.lists(names, min_size=1, max_size=3),
)
def test_saved_eraser_loads_bit_for_bit(ranks: dict[str, int], seed: int, dtype: torch.dtype, names: list[str]) -> None:
    eraser = made_eraser(ranks, *names, seed=seed, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        loaded = Eraser.load(eraser.save(folder))
    assert loaded.header == eraser.header == made_header(*names)
    assert loaded.pairs.keys() == eraser.pairs.keys()
    for module, pair in eraser.pairs.items():
        for found, expected in zip(loaded.pairs[module], pair, strict=True):
            assert found.dtype == dtype
            assert torch.equal(found, expected)
