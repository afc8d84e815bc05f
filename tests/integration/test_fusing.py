"""Closed-form fusion: the formula against brute force, and what has to hold of it whatever the weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.stacking import stack
from esd_lora.errors import EsdLoraError
from esd_lora.formats.exporting import export
from esd_lora.formats.importing import import_lora
from esd_lora.fusing import closed_form, moments, reading
from esd_lora.fusing.closed_form import fuse, solve
from esd_lora.fusing.harmonising import harmonise
from esd_lora.fusing.moments import TEXT, Moment, MomentCollector, PromptGroup, spread
from esd_lora.fusing.prompts import gather_members
from esd_lora.fusing.reading import groups_of
from esd_lora.fusing.states import LayerProblem
from esd_lora.recipe_files import load_fuse_spec
from random_erasers import eraser_on

QUICK = {"trajectories": 2, "keep_trajectories": 3, "steps": 2, "progress": False}
KEEP = ["a dog", "a hat", "a house in the rain"]
LAYERS = {
    "linear": nn.Linear(5, 4, dtype=torch.float64),
    "convolution": nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64),
    "strided": nn.Conv2d(2, 3, 3, stride=2, padding=1, dtype=torch.float64),
    "pixelwise": nn.Conv2d(4, 3, 1, dtype=torch.float64),
}


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Every patch that the layer reads, cut out one by one, as rows."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    assert isinstance(layer, nn.Conv2d)
    (size, _), (stride, _), (padding, _) = layer.kernel_size, layer.stride, layer.padding  # type: ignore[misc]
    wide = nn.functional.pad(x, [padding] * 4)  # type: ignore[list-item]
    ends = [range(0, n - size + 1, stride) for n in wide.shape[2:]]
    return torch.cat([wide[:, :, i : i + size, j : j + size].flatten(1) for i in ends[0] for j in ends[1]])


def brute_force(
    deltas: list[Tensor], inputs: list[Tensor], keep: Tensor, lam: float, ridge: float, even: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The objective as one least-squares problem, rows @ dW^T = answers, and its solution."""
    count, width = len(deltas), deltas[0].shape[1]
    eye = torch.eye(width, dtype=torch.float64)
    rows, answers = [], []
    for delta, x in zip(deltas, inputs, strict=True):
        for part in (x / len(x) ** 0.5, ridge**0.5 * eye):
            rows.append(part)
            answers.append(part @ delta.T)
    for part in (keep / len(keep) ** 0.5, even**0.5 * eye):
        rows.append((lam * count) ** 0.5 * part)
        answers.append(torch.zeros(len(part), len(deltas[0]), dtype=torch.float64))
    left, right = torch.cat(rows), torch.cat(answers)
    return left, right, torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("kind", LAYERS)
@given(seed=st.integers(0, 1000), lam=st.sampled_from([0.0, 0.1, 3.0]), mu=st.sampled_from([0.001, 0.1]))
def test_formula_is_the_least_squares_solution(kind: str, seed: int, lam: float, mu: float) -> None:
    layer, generator = LAYERS[kind], torch.Generator().manual_seed(seed)
    shape = layer.weight.shape
    assert isinstance(layer.weight, Tensor)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def read(number: int) -> Tensor:
        return drawn(number, 3, shape[1]) if kind == "linear" else drawn(number, shape[1], 5, 5)

    ranks = [1, 3, 2]
    tail = [1] * (len(shape) - 2)
    members = [LoraPair(drawn(rank, *shape[1:]), drawn(shape[0], rank, *tail)) for rank in ranks]
    members[1] = LoraPair(torch.zeros_like(members[1].down), members[1].up)  # as if the layer were not in it
    inputs, keep = [read(2 + i) for i in range(3)], read(4)
    moment = Moment(layer)
    for i, x in enumerate(inputs):
        moment.begin(PromptGroup(("",), 0, str(i)), 0, {"layer": members[i].down} if i != 1 else {})
        moment.add(x, 1.0)
    for sign in (1, 1, -1):  # what is taken off leaves no trace
        moment.begin(PromptGroup(("",), 0), 0, sign=sign)
        moment.add(keep[:1], 0.25)
        moment.add(keep[1:], 0.75)
    there = [members[0], members[2]]
    pair = LoraPair(torch.cat([p.down for p in there]), torch.cat([p.up for p in there], 1))
    problem = problem_of(moment, pair, [1, 2], 3)
    solved = solve(problem, lam, mu).delta().flatten(1)
    deltas, rows = [p.delta().flatten(1) for p in members], [patches(layer, x) for x in inputs]
    kept = patches(layer, keep)
    whole = sum(float(x.square().mean()) for x in rows) + 3 * lam * float(kept.square().mean())
    square = whole / (3 + 3 * lam)
    left, right, expected = brute_force(deltas, rows, kept, lam, closed_form._RIDGE * square, mu * square)
    torch.testing.assert_close(solved, expected, rtol=1e-9, atol=1e-9)

    def objective(delta: Tensor) -> float:
        return float((left @ delta.T - right).square().sum())

    summed = sum(deltas, torch.zeros_like(deltas[0]))
    assert objective(solved) <= objective(summed) + 1e-9
    left, right, _ = brute_force(deltas, rows, kept, lam, 0, 0)  # the header's figure has no ridge in it
    other = LoraPair(pair.down + 1, pair.up * 2)
    many = LoraPair(torch.cat([other.down] * 3), torch.cat([other.up] * 3, 1) / 3)  # of a higher rank than there are outputs
    values = closed_form.objective(problem, lam, [None, pair, other, many]).tolist()
    updates = (torch.zeros_like(summed), summed, other.delta().flatten(1), many.delta().flatten(1))
    assert values == pytest.approx([objective(update) for update in updates])


def problem_of(moment: Moment, pair: LoraPair, ranks: list[int], count: int) -> LayerProblem:
    return LayerProblem("layer", pair, torch.cat(list(moment.products.values())), ranks, "layer", moment, count, 1)


@given(seed=st.integers(0, 1000), rank=st.integers(1, 5))
def test_truncation_loses_the_least_of_what_is_read(seed: int, rank: int) -> None:
    """Against the singular values of the update times a root of the second moment, by a full SVD."""
    layer, generator = LAYERS["linear"], torch.Generator().manual_seed(seed)
    pair = LoraPair(*(torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((5, 5), (4, 5))))
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1, 1, 0.3, 0.1])
    moment = Moment(layer)
    moment.begin(PromptGroup(("",), 0, "member"), 0, {"layer": pair.down})
    moment.add(x, 1.0)
    problem = problem_of(moment, pair, [5], 1)
    full, cut = solve(problem, 0, 0), solve(problem, 0, 0, rank=rank)
    assert cut.rank == min(rank, 4) or cut.rank == rank
    square = float(x.square().mean())
    values, vectors = torch.linalg.eigh(x.T @ x / len(x) + closed_form._RIDGE * square * torch.eye(5))
    root = vectors @ values.sqrt().diag()
    lost = ((full.delta() - cut.delta()) @ root).square().sum()
    singular = torch.linalg.svdvals(full.delta() @ root)
    assert float(lost) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-5, abs=1e-9)


def on(base: Base, scope: str, *names: str, seed: int = 0, **header: object) -> Eraser:
    layers = base.family.modules(base.model, scope)
    return eraser_on(base.model, layers, *names, seed=seed, base_hashes=base.hashes(layers), **header)


@pytest.fixture(autouse=True, scope="module")
def every_patch() -> Iterator[None]:
    """Count everything that is read, so that it can be compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_ROWS", 10**9)
        yield


@pytest.mark.parametrize("most", [1, 4, 7, 10, 11])
def test_places_are_spread(most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [spread(10, most, generator).tolist() for _ in range(200)]
    for places in drawn:
        assert len(places) == min(most, 10)
        assert places == sorted(places)
    counts = torch.tensor([place for places in drawn for place in places]).bincount(minlength=10) / len(drawn)
    assert (counts - min(most, 10) / 10).abs().max() < 0.1, "every place as often"
    if most == 4:
        assert all(2.5 * i - 1 < place < 2.5 * (i + 1) for places in drawn for i, place in enumerate(places))


def test_fewer_patches_count_than_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of 3 x 3 overlap: a ninth as many are read."""
    monkeypatch.setattr(moments, "_ROWS", 90)
    drawn: list[int] = []
    monkeypatch.setattr(moments, "spread", lambda count, most, generator: drawn.append(most) or spread(count, most, generator))
    Moment(nn.Conv2d(2, 1, 3)).add(torch.randn(1, 2, 32, 32), 1.0)
    Moment(nn.Linear(2, 1)).add(torch.randn(1, 1024, 2), 1.0)
    assert drawn == [10, 90]


def test_no_place_lies_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number just below 1 is rounded up to it once another is added."""
    monkeypatch.setattr(moments.torch, "rand", lambda count, **_: torch.full((count,), 1 - 2**-24))
    assert spread(1000, 128, torch.Generator()).max() == 999


def test_second_moment_of_a_picture_is_of_its_whole_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 x 64 tokens whose neighbours are alike: a fixed distance of 32 reads two columns. Off by .195, and by .053."""
    monkeypatch.setattr(moments, "_ROWS", 128)
    generator, side, channels = torch.Generator().manual_seed(0), 64, 16
    frequency = torch.fft.fftfreq(side)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().clamp_min(1 / side)
    white = torch.randn(16, channels, side, side, generator=generator)
    pictures = torch.fft.ifft2(torch.fft.fft2(white) / radius**1.5).real
    tokens = torch.einsum("nchw,cd->nhwd", pictures / pictures.std(), torch.randn(channels, channels, generator=generator))
    x = tokens.flatten(1, 2)

    def second(rows: Tensor) -> Tensor:
        return torch.einsum("nti,ntj->ij", rows, rows) / (rows.shape[0] * rows.shape[1])

    def read(moment: Moment, sign: int = 1) -> Moment:
        moment.begin(PromptGroup(("",), 0), seed=3, sign=sign)
        for picture in x:
            moment.add(picture[None], 1 / len(x))
        return moment

    moment = read(Moment(nn.Linear(channels, 1)))
    exact = second(x)
    at_a_distance, spread_out = (float((found - exact).norm() / exact.norm()) for found in (second(x[:, ::32]), moment.kept))
    assert at_a_distance > 0.15
    assert spread_out < 0.5 * at_a_distance
    assert float(read(moment, sign=-1).kept.abs().max()) < 1e-12, "the same places are read again"


@pytest.fixture
def members(base: Base) -> list[Eraser]:
    """Of different scopes and ranks, convolutions among their layers."""
    scopes = {"a cat": "xattn", "a car": "full", "a bee": "xattn-kv", "a key": "noxattn"}
    return [on(base, scope, name, seed=i) for i, (name, scope) in enumerate(scopes.items())]


def deltas(eraser: Eraser) -> Mapping[str, Tensor]:
    return {module: pair.delta() for module, pair in eraser.pairs.items()}


def assert_same(one: Eraser, other: Eraser, tolerance: float = 1e-6) -> None:
    first, second = deltas(one), deltas(other)
    assert first.keys() == second.keys()
    for module, delta in first.items():
        assert float((delta - second[module]).norm()) <= tolerance * float(delta.norm()) + 1e-9, module


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_moments_are_of_what_the_layers_read(base: Base, guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against inputs collected while the same latents are denoised one by one."""
    modules = ["mid_block.attentions.0.transformer_blocks.0.attn2.to_q", "mid_block.resnets.0.conv1"]
    layers = dict(base.model.named_modules())
    moments = {module: Moment(layers[module], [module]) for module in modules}
    calls: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    predict = Base.predict
    monkeypatch.setattr(Base, "predict", lambda self, *call: calls.append(call) or predict(self, *call))
    member = on(base, "full", "a dog")
    collector = MomentCollector(base, {"dog": member}, steps=2, guidance=guidance, seed=5)
    collector.collect(PromptGroup(("a dog", "a hat"), 3, "dog"), moments)
    collector.collect(PromptGroup(("a house",), 0), moments)  # text alone, which these layers do not read
    assert collector.evaluations == 3 * 2 * (2 if guidance != 1 else 1)

    seen: dict[str, list[Tensor]] = {module: [] for module in modules}
    hooks = [
        layers[module].register_forward_pre_hook(
            lambda layer, args, module=module: seen[module].append(patches(layer, args[0].detach()))
        )
        for module in modules
    ]
    for x_t, t, condition in list(calls):
        for i in range(len(t) // 2 if guidance != 1 else 0, len(t)):
            with torch.no_grad():
                base.predict(x_t[i : i + 1], t[i : i + 1], {name: value[i : i + 1] for name, value in condition.items()})
    for hook in hooks:
        hook.remove()
    for module, rows in seen.items():
        x = torch.cat(rows).double()
        second = x.T @ x / len(x)
        torch.testing.assert_close(moments[module].members, second, rtol=1e-4, atol=1e-4)
        down = member.pairs[module].down.flatten(1).double()
        torch.testing.assert_close(moments[module].products[module, "dog"], down @ second, rtol=1e-4, atol=1e-4)
        assert not moments[module].kept.any()


def test_text_layers_get_the_moment_of_what_they_are_called_with(base: Base) -> None:
    """Keys and values at once: collected while the denoiser runs, over more prompts than are encoded at once."""
    layers = dict(base.model.named_modules())
    modules = [f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{part}" for part in "kv"]
    moment = Moment(layers[modules[0]], modules)
    prompts = tuple(f"{number} dogs" for number in range(19))
    member = on(base, "xattn-kv", "a dog")
    collector = MomentCollector(base, {"dog": member}, steps=2, guidance=3.0, seed=5)
    collector.collect(PromptGroup(prompts, 3, "dog"), {TEXT: moment})
    assert collector.evaluations == 0

    rows: list[Tensor] = []
    hook = layers[modules[0]].register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        base.predict(torch.randn(19, *base.latent_shape()), torch.full((19,), 500), base.encode(prompts))
    hook.remove()
    x = torch.cat(rows).double()
    second = x.T @ x / len(x)
    torch.testing.assert_close(moment.members, second, rtol=1e-4, atol=1e-4)
    for module in modules:
        expected = member.pairs[module].down.double() @ second
        torch.testing.assert_close(moment.products[module, "dog"], expected, rtol=1e-4, atol=1e-4)


def test_what_is_read_under_a_group_does_not_depend_on_others(base: Base) -> None:
    """To the last bit: beside other groups, after them, and for fewer layers."""
    layers = dict(base.model.named_modules())
    modules = ["mid_block.attentions.0.transformer_blocks.0.attn2.to_q", "mid_block.resnets.0.conv1"]
    groups = [PromptGroup(("a dog", "a hat"), 2, "dog"), PromptGroup(("a hat",), 1), PromptGroup(("a house",), 1)]

    def read(group: PromptGroup, names: list[str], *before: PromptGroup) -> dict[str, Moment]:
        collector = MomentCollector(base, {}, steps=2, guidance=3.0, seed=5)
        moments = {name: Moment(layers[name], [name]) for name in names}
        for other in before:
            collector.collect(other, {name: Moment(layers[name]) for name in modules})
        collector.collect(group, moments)
        return moments

    for group in groups:
        alone, beside = read(group, modules[:1]), read(group, modules, *(other for other in groups if other != group))
        for kind in ("members", "kept"):
            assert torch.equal(getattr(alone[modules[0]], kind), getattr(beside[modules[0]], kind)), group


def test_moments_are_the_same_in_one_group_and_in_many(
    base: Base, members: list[Eraser], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fuse(members, base, keep=KEEP, **QUICK)
    monkeypatch.setattr(reading, "_BYTES_AT_ONCE", 10**6)
    widths = [pair.down[0].numel() for pair in whole.pairs.values()]
    assert 16 * sum(width**2 for width in widths) > 4 * 10**6
    assert_same(whole, fuse(members, base, keep=KEEP, **QUICK), 1e-12)


def test_layers_too_wide_are_summed_and_named(base: Base, members: list[Eraser], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "WIDEST", 100)
    with pytest.warns(UserWarning, match="wider than"):
        fused = fuse(members, base, keep=KEEP, **QUICK)
    plain = deltas(stack(members))
    wide = [module for module, pair in fused.pairs.items() if pair.down[0].numel() > 100]
    assert wide
    (fusion,) = fused.header.fusions
    assert sorted(fusion.summed) == sorted(wide)
    for module, delta in deltas(fused).items():
        assert torch.allclose(delta, plain[module], atol=1e-6) == (module in wide), module


def test_order_of_members_does_not_matter(base: Base, members: list[Eraser]) -> None:
    first, *others = (fuse(list(order), base, keep=KEEP, **QUICK) for order in list(permutations(members))[::7])
    assert others
    for other in others:
        assert_same(first, other, 1e-6)
        assert other.header.concepts == first.header.concepts


def test_one_member_with_nothing_to_keep_comes_back(base: Base, members: list[Eraser]) -> None:
    for member in members:
        assert_same(member, fuse([member], base, lam=0, **QUICK), 1e-3)


def test_equal_members_share_the_work(base: Base, members: list[Eraser]) -> None:
    member = members[0]
    assert_same(member, fuse([member, member, member], base, lam=0, **QUICK), 1e-3)


def test_member_of_weight_0_is_dropped(base: Base, members: list[Eraser]) -> None:
    without = fuse(members[:2], base, keep=KEEP, **QUICK)
    assert_same(without, fuse(members[:3], base, weights=[1, 1, 0], keep=KEEP, **QUICK))
    with pytest.raises(EsdLoraError, match="nothing to fuse"):
        fuse(members[:1], base, weights=[0], keep=KEEP, **QUICK)


def test_weights_are_of_the_updates(base: Base, members: list[Eraser]) -> None:
    """With everything else fixed the solution is linear in the members' updates."""
    one, two, sum_ = (fuse(members[:2], base, weights=w, keep=KEEP, **QUICK) for w in ([1, 1e-9], [1e-9, 1], [1, 1]))
    for module, delta in deltas(sum_).items():
        torch.testing.assert_close(delta, one.pairs[module].delta() + two.pairs[module].delta(), rtol=1e-3, atol=1e-4)


def test_what_is_kept_weighs_by_lam(base: Base, members: list[Eraser]) -> None:
    norms = [
        sum(p.norm() for p in fuse(members[:2], base, keep=KEEP, lam=lam, **QUICK).pairs.values()) for lam in (0.01, 1, 100)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[2] < 0.2 * norms[0]


def test_kept_prompts_weigh_lam_for_every_member(base: Base) -> None:
    """Against brute force, from moments gathered one group at a time: what is kept weighs lam N, as there are N members."""
    lam, mu = 0.5, 0.05
    members = [on(base, "xattn-kv", name, seed=i) for i, name in enumerate(["a cat", "a car", "a bee"])]
    fused = fuse(members, base, keep=KEEP, lam=lam, mu=mu, **QUICK)
    gathered = gather_members(members, base, None, KEEP)
    groups = groups_of(gathered, load_fuse_spec("fuse", **{k: v for k, v in QUICK.items() if k != "progress"}))
    collector = MomentCollector(base, {}, steps=QUICK["steps"], guidance=load_fuse_spec().guidance, seed=0)
    layers = dict(base.model.named_modules())
    for module in list(members[0].pairs)[:4]:
        moment, seconds = Moment(layers[module]), []
        for group in groups[:3]:
            seconds.append(Moment(layers[module]))
            collector.collect(group, {TEXT: seconds[-1]})
        for group in groups[3:]:
            collector.collect(group, {TEXT: moment})
        roots = []  # of every group's second moment G: rows x with x^T x / len(x) = G
        for second in [*(each.members for each in seconds), moment.kept / len(gathered.kept)]:
            values, vectors = torch.linalg.eigh(second)
            roots.append(len(values) ** 0.5 * values.clamp_min(0).sqrt()[:, None] * vectors.T)
        *inputs, kept = roots
        squares = [float(x.square().mean()) for x in roots]
        square = (sum(squares[:3]) + 3 * lam * squares[3]) / (3 + 3 * lam)
        updates = [member.pairs[module].delta().double() for member in gathered.erasers]
        ridge, even = closed_form._RIDGE * square, mu * square
        _, _, expected = brute_force(updates, inputs, kept, lam, ridge, even)
        torch.testing.assert_close(fused.pairs[module].delta().double(), expected, rtol=1e-3, atol=1e-4)
        _, _, once = brute_force(updates, inputs, kept, lam / 3, ridge, even)
        assert float((once - expected).norm()) > 0.05 * float(expected.norm()), "lam alone is another update"


def test_prompts_that_name_a_member_are_not_kept(base: Base, members: list[Eraser]) -> None:
    fused = fuse(members[:2], base, keep=[*KEEP, "two cats", "a CAR at night", "a catalogue"], **QUICK)
    (fusion,) = fused.header.fusions
    assert fusion.dropped == ("a CAR at night", "two cats")
    assert fusion.kept == len({*KEEP, "a catalogue"})
    with pytest.raises(EsdLoraError, match="no prompt to keep is left"):
        fuse(members[:2], base, keep=["a cat"], **QUICK)


def test_keep_list_of_the_package_is_the_default(base: Base, members: list[Eraser]) -> None:
    fused = fuse(members[2:3], base, **QUICK)
    (fusion,) = fused.header.fusions
    assert fusion.kept > 300
    assert fusion.kept_walked == fusion.keep_trajectories < fusion.kept
    assert f"{fusion.kept} kept prompts, {fusion.kept_walked} of them walked" in fusion.describe()
    (careless,) = fuse(members[2:3], base, lam=0, **QUICK).header.fusions
    assert (careless.kept, careless.kept_walked) == (0, 0)
    assert "a bee" in fusion.dropped


def test_header_says_how_it_was_made(base: Base, members: list[Eraser], tmp_path: Path) -> None:
    fused = fuse(members, base, keep=KEEP, lam=0.2, mu=0.02, **QUICK)
    (fusion,) = Eraser.load(fused.save(tmp_path / "fused")).header.fusions
    assert (fusion.lam, fusion.mu, fusion.steps, fusion.seed) == (0.2, 0.02, 2, 0)
    assert len(set(fusion.members)) == 4
    assert fusion.evaluations == 2 * 2 * (4 * 2 + 3)  # steps, guidance, members' trajectories and kept ones
    assert fusion.dropped == ()
    assert fused.header.distillations == ()
    assert fusion.objective is not None
    assert fusion.objective_summed is not None
    assert 0 < fusion.objective < min(1, fusion.objective_summed)
    assert {concept.name for concept in fused.header.concepts} == {"a cat", "a car", "a bee", "a key"}


def test_text_alone_needs_no_denoising(base: Base) -> None:
    members = [on(base, "xattn-kv", name, seed=i) for i, name in enumerate(["a cat", "a car"])]
    fused = fuse(members, base, keep=KEEP, **QUICK)
    (fusion,) = fused.header.fusions
    assert fusion.evaluations == 0


def test_fused_file_is_an_eraser_like_any(base: Base, members: list[Eraser], tmp_path: Path) -> None:
    fused = fuse(members, base, keep=KEEP, rank=3, **QUICK)
    assert max(pair.rank for pair in fused.pairs.values()) == 3
    kohya = export(fused, tmp_path / "fused.safetensors", layout="kohya")
    assert_same(fused, import_lora(kohya))
    pipe = base.pipe
    pipe.load_lora_weights(fused.save(tmp_path / "fused"))
    adapted = dict(pipe.unet.named_modules())
    for module, pair in fused.pairs.items():
        layer = adapted[module]
        (name,) = layer.active_adapters
        torch.testing.assert_close(layer.get_delta_weight(name), pair.delta(), rtol=1e-4, atol=1e-5)


def test_ranks_that_cannot_be(base: Base, members: list[Eraser]) -> None:
    with pytest.raises(EsdLoraError, match=r"energy 1\.5"):
        fuse(members, base, keep=KEEP, energy=1.5, **QUICK)
    with pytest.raises(EsdLoraError, match="rank 0"):
        fuse(members, base, keep=KEEP, rank=0, **QUICK)


def test_energy_is_of_what_is_read(base: Base, members: list[Eraser]) -> None:
    full, cut = (fuse(members, base, keep=KEEP, energy=energy, **QUICK) for energy in (None, 0.9))
    assert sum(p.rank for p in cut.pairs.values()) < sum(p.rank for p in full.pairs.values())


def test_members_of_another_base_are_refused(base: Base, members: list[Eraser]) -> None:
    other = Eraser(members[1].pairs, members[1].header.model_copy(update={"family": "sdxl"}))
    with pytest.raises(EsdLoraError, match="family"):
        fuse([other], base, keep=KEEP, **QUICK)


def test_base_leaves_as_it_came(tiny_dir: Path, members: list[Eraser]) -> None:
    base = load_base(tiny_dir, device="cpu")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    fuse(members, base, keep=KEEP, **QUICK)
    harmonise(members, base, keep=KEEP, steps=2, trajectories=2, keep_trajectories=3, progress=False)
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert not any(layer._forward_pre_hooks for layer in base.model.modules())
