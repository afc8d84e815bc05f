"""Stacking is addition of the updates: it obeys addition's laws, for any layers, ranks and weights."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import Strength, compress, stack
from random_erasers import SHAPES, build_header, random_eraser

names = st.text(min_size=1).filter(lambda name: name.strip() and "{x}" not in name)  # a placeholder needs words to fill in
ranks = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 4), min_size=1)
erasers = st.builds(lambda ranks, seed, name: random_eraser(ranks, name, seed=seed), ranks, st.integers(0, 2**32), names)
weights = st.floats(-3, 3)


def deltas(eraser: Eraser) -> dict[str, Tensor]:
    """The update of every layer, zeros where the eraser has none."""
    zeros = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    return {**zeros, **{module: pair.delta() for module, pair in eraser.pairs.items()}}


def assert_same(result: Eraser, expected: dict[str, Tensor]) -> None:
    for module, delta in deltas(result).items():
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


singles = st.builds(
    lambda ranks, seed, name: random_eraser(ranks, name, seed=seed, dtype=torch.float32), ranks, st.integers(0, 2**32), names
)


@given(singles, singles)
def test_order_does_not_matter(a: Eraser, b: Eraser) -> None:
    """And in float32 the sum is exact to 1e-6 of its terms."""
    for module in SHAPES:
        first, second = (
            (stack(order).pairs[module].delta() if module in stack(order).pairs else torch.zeros(()))
            for order in ([a, b], [b, a])
        )
        terms = [e.pairs[module].delta().double() for e in (a, b) if module in e.pairs]
        if terms:
            size = sum(term.norm() for term in terms)
            assert (first - second).norm() <= 1e-6 * size
            assert (first.double() - sum(terms)).norm() <= 1e-6 * size


@given(singles)
def test_stack_with_its_opposite_is_nothing(a: Eraser) -> None:
    for module, pair in stack([a, a], [1, -1]).pairs.items():
        assert pair.delta().norm() <= 1e-6 * a.pairs[module].delta().norm()


@given(erasers, erasers, st.integers(1, 5))
def test_compressing_to_a_rank_cuts_the_least(a: Eraser, b: Eraser, rank: int) -> None:
    """Eckart and Young: what is lost is the tail of the singular values, which a full SVD of the update gives."""
    stacked = stack([a, b])
    smaller, errors, overall = compress(stacked, rank=rank)
    lost = whole = 0.0
    for module, pair in stacked.pairs.items():
        values = torch.linalg.svdvals(pair.delta().flatten(1))
        tail, total = float(values[rank:].square().sum()), float(values.square().sum())
        distance = (smaller.pairs[module].delta() - pair.delta()).norm()
        assert smaller.pairs[module].rank <= rank
        assert abs(float(distance) - tail**0.5) <= 1e-9 * total**0.5
        assert abs(errors[module] - (tail / total) ** 0.5) <= 1e-7
        lost, whole = lost + tail, whole + total
    assert abs(overall - (lost / whole) ** 0.5) <= 1e-7
    assert smaller.header.truncation == overall


@given(singles, singles, st.floats(0.05, 1))
def test_compressing_to_an_energy_honours_it(a: Eraser, b: Eraser, energy: float) -> None:
    """Each layer is within the bound, and at one rank less it would not be."""
    stacked = stack([a, b])
    smaller, errors, _ = compress(stacked, energy=energy)
    bound = (1 - energy) ** 0.5
    for module, pair in stacked.pairs.items():
        result = smaller.pairs[module]
        distance = float((result.delta() - pair.delta()).norm() / pair.delta().norm())
        assert distance <= bound + 1e-5
        assert abs(distance - errors[module]) <= 1e-5
        assert (result.down.dtype, result.up.dtype) == (torch.float32, torch.float32)
        if result.rank > 1 and energy < 0.999:
            less = compress(Eraser({module: pair}, stacked.header), rank=result.rank - 1).overall
            assert less > bound - 1e-5


@given(erasers)
def test_compressing_what_is_low_rank_already_loses_nothing(a: Eraser) -> None:
    twice = compress(stack([a, a], [0.25, 0.75]), rank=4)
    assert_same(twice.eraser, total([a], [1]))
    assert twice.overall < 1e-7


@given(erasers, st.dictionaries(st.sampled_from(["mid", "mid.attn2.to_k", "conv"]), weights, min_size=1), weights)
def test_strength_by_block(a: Eraser, blocks: dict[str, float], weight: float) -> None:
    """The longest block that fits a layer holds, on top of the weight."""
    blocks = {block: x for block, x in blocks.items() if any(f"{m}.".startswith(f"{block}.") for m in a.pairs)}
    stacked = stack([a], [Strength(weight, blocks)])
    for module, pair in a.pairs.items():
        fitting = [block for block in blocks if f"{module}.".startswith(f"{block}.")]
        factor = weight * (blocks[max(fitting, key=len)] if fitting else 1)
        torch.testing.assert_close(stacked.pairs[module].delta(), factor * pair.delta(), rtol=1e-12, atol=1e-12)
    assert recorded_strengths(stacked) == {module: Strength(weight, blocks).at(module) for module in a.pairs}


def recorded_strengths(eraser: Eraser) -> dict[str, float]:
    """Strength of the first concept at every layer, as the header says."""
    concept = eraser.header.concepts[0]
    return {module: Strength(concept.weight, concept.blocks).at(module) for module in eraser.pairs}


blocks = st.dictionaries(st.sampled_from(["mid", "mid_block", "mid.attn2", "mid.attn2.to_k"]), weights)


@given(st.integers(0, 2**32), blocks, weights, blocks, weights)
def test_strengths_by_block_of_a_stack_of_stacks_multiply(
    seed: int, inner: dict[str, float], first: float, outer: dict[str, float], second: float
) -> None:
    a = random_eraser({"mid.attn2.to_k": 1, "mid.attn2.to_v": 2, "conv": 1}, seed=seed)
    stacked = stack([stack([a], [Strength(first, inner)])], [Strength(second, outer)])
    for module, factor in recorded_strengths(stacked).items():
        torch.testing.assert_close(stacked.pairs[module].delta(), factor * a.pairs[module].delta(), rtol=1e-9, atol=1e-12)


@given(ranks, st.integers(0, 2**32))
def test_norms_and_products_by_the_factors(ranks: dict[str, int], seed: int) -> None:
    a, b = random_eraser(ranks, seed=seed), random_eraser(ranks, seed=seed + 1)
    for module in ranks:
        first, other = a.pairs[module], b.pairs[module]
        assert abs(first.norm() - float(first.delta().norm())) <= 1e-9 * first.norm()
        assert abs(first.inner(other) - float((first.delta() * other.delta()).sum())) <= 1e-9 * first.norm() * other.norm()


@given(ranks, st.integers(0, 2**32))
def test_adding_the_factors_apart_is_another_model(ranks: dict[str, int], seed: int) -> None:
    """Why stacking concatenates: (up_a + up_b) @ (down_a + down_b) has the cross terms too."""
    a, b = random_eraser(ranks, seed=seed), random_eraser(ranks, seed=seed + 1)
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
    eraser = random_eraser(ranks, *names, seed=seed, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        loaded = Eraser.load(eraser.save(folder))
    assert loaded.header == eraser.header == build_header(*names)
    assert loaded.pairs.keys() == eraser.pairs.keys()
    for module, pair in eraser.pairs.items():
        for result, expected in zip(loaded.pairs[module], pair, strict=True):
            assert result.dtype == dtype
            assert torch.equal(result, expected)
