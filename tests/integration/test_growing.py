"""Stacks that grow and shrink: what adding and removing members makes, against the stack that is fused of them anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import STATE_NAME, Eraser
from esd_lora.erasers.tensor_files import file_content, hash_tensors, read_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.fusing import closed_form
from esd_lora.fusing.closed_form import fuse
from esd_lora.fusing.growing import change_members
from random_erasers import eraser_on

QUICK = {"trajectories": 2, "keep_trajectories": 3, "steps": 2}
KEEP = ["a dog", "a hat", "a house in the rain", "two cats", "a car at night", "a bee, asleep", "a house", "a tree", "a boat"]
SCOPES = {"a cat": "xattn", "a car": "full", "a bee": "xattn-kv", "a key": "noxattn"}


def on(base: Base, scope: str, name: str, seed: int, **header: object) -> Eraser:
    layers = base.family.modules(base.model, scope)
    return eraser_on(base.model, layers, name, seed=seed, base_hashes=base.hashes(layers), **header)


@pytest.fixture
def members(base: Base) -> dict[str, Eraser]:
    """Return members of different scopes and ranks, convolutions among their layers; one preserves what stands in no list."""
    preserve = {"a bee": ("a cow", "a cat on a cow")}
    return {
        name: on(base, scope, name, seed, preserve=preserve.get(name, ())) for seed, (name, scope) in enumerate(SCOPES.items())
    }


def fused(members: Sequence[Eraser], base: Base, **options: object) -> Eraser:
    return fuse(members, base, **{"keep": KEEP, "progress": False, **QUICK, **options})


def assert_same(one: Eraser, other: Eraser, tolerance: float = 1e-6) -> None:
    """Updates to a relative 1e-6 of every layer, headers to the letter, but for what the work took."""
    assert one.pairs.keys() == other.pairs.keys()
    for module, pair in one.pairs.items():
        delta = pair.delta()
        assert float((delta - other.pairs[module].delta()).norm()) <= tolerance * float(delta.norm()), module
    headers = []
    for eraser in (one, other):
        *earlier, last = eraser.header.fusions
        same = last.model_copy(update={"seconds": 0.0, "evaluations": 0})
        headers.append(eraser.header.model_copy(update={"fusions": (*earlier, same)}).to_json())
    assert headers[0] == headers[1]


def assert_same_state(one: Path, other: Path) -> None:
    first, second = (read_tensors(path)[0] for path in (one, other))
    assert first.keys() == second.keys()
    assert torch.equal(first.pop("record"), second.pop("record"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", SCOPES)
def test_stack_grows_and_shrinks_by_one_member(base: Base, members: dict[str, Eraser], name: str, tmp_path: Path) -> None:
    """Layers that no other member has, prompts that another preserved or names, come and go with it."""
    everyone, others = list(members.values()), [member for other, member in members.items() if other != name]
    whole, rest = (fused(some, base, state=tmp_path / file) for some, file in ((everyone, "whole"), (others, "rest")))
    grown = change_members(tmp_path / "rest", base, add=[members[name]], state=tmp_path / "grown", progress=False)
    assert_same(whole, grown)
    assert_same_state(tmp_path / "whole", tmp_path / "grown")
    shrunk = change_members(tmp_path / "whole", base, remove=[name], state=tmp_path / "shrunk", progress=False)
    assert_same(rest, shrunk)
    assert_same_state(tmp_path / "rest", tmp_path / "shrunk")


def test_members_join_and_leave_at_once(base: Base, members: dict[str, Eraser], tmp_path: Path) -> None:
    """A new version of a member takes the place of the old one, whose concept has the same name."""
    cat, car, bee, key = members.values()
    newer = on(base, "xattn", "a cat", 7)
    fused([cat, car, bee], base, state=tmp_path / "state")
    changed = change_members(
        tmp_path / "state", base, add=[newer, key], weights=[1, 0.5], remove=["a cat", "a bee"], progress=False
    )
    assert_same(fused([newer, car, key], base, weights=[1, 1, 0.5]), changed)


def test_one_by_one_is_all_at_once(base: Base, members: dict[str, Eraser], tmp_path: Path) -> None:
    first, *others = members.values()
    stack, state = fused([first], base, state=tmp_path / "0"), tmp_path / "0"
    for number, member in enumerate(others, 1):
        stack = change_members(state, base, add=[member], state=tmp_path / str(number), progress=False)
        state = tmp_path / str(number)
    assert_same(fused(list(members.values()), base), stack)
    both = change_members(state, base, remove=["car", "a key"], state=tmp_path / "two", progress=False)
    assert_same(fused([members["a cat"], members["a bee"]], base), both)
    back = change_members(tmp_path / "two", base, add=[members["a key"], members["a car"]], progress=False)
    assert_same(stack, back)


def test_one_member_more_is_read_alone(base: Base, tmp_path: Path) -> None:
    """Its own trajectories, those of kept prompts that name it, and those that take their places; nothing of the others."""
    cats = [on(base, "xattn", f"a cat{number}", number) for number in range(4)]
    keep = [f"a dog{number}" for number in range(8)]
    before = fused(cats, base, keep=keep, keep_trajectories=8, state=tmp_path / "state")
    dog = on(base, "xattn", "a dog3", 9)
    after = change_members(tmp_path / "state", base, add=[dog], progress=False)
    guided, steps, trajectories = 2, QUICK["steps"], QUICK["trajectories"]
    assert before.header.fusions[-1].evaluations == guided * steps * (4 * trajectories + 8)
    assert after.header.fusions[-1].evaluations == guided * steps * (trajectories + 1)
    assert after.header.fusions[-1].dropped == ("a dog3",)
    assert_same(fused([*cats, dog], base, keep=keep, keep_trajectories=8), after)


@pytest.mark.parametrize("cut", [{"rank": 2}, {"energy": 0.9}])
def test_cut_does_not_add_up(base: Base, members: dict[str, Eraser], cut: Mapping[str, float], tmp_path: Path) -> None:
    """Ranks are cut where the stack is solved, from what is whole in its state."""
    first, *others = members.values()
    fused([first], base, state=tmp_path / "state", **cut)
    for member in others:
        stack = change_members(tmp_path / "state", base, add=[member], state=tmp_path / "state", progress=False)
    anew = fused(list(members.values()), base, **cut)
    for module, pair in anew.pairs.items():
        assert pair.rank == stack.pairs[module].rank
    assert_same(anew, stack)
    whole = change_members(tmp_path / "state", base, add=[members["a bee"]], energy=1.0, progress=False)
    assert whole.header.fusions[-1].rank is None
    assert sum(pair.rank for pair in whole.pairs.values()) > sum(pair.rank for pair in stack.pairs.values())


def test_nothing_kept_nothing_read_for_it(base: Base, members: dict[str, Eraser], tmp_path: Path) -> None:
    cat, car, *_ = members.values()
    fused([cat], base, lam=0, state=tmp_path / "state")
    assert_same(fused([cat, car], base, lam=0), change_members(tmp_path / "state", base, add=[car], progress=False))


def test_strengths_are_folded_in(base: Base, members: dict[str, Eraser], tmp_path: Path) -> None:
    cat, car, bee, _ = members.values()
    fused([cat, bee], base, weights=[0.5, 2], state=tmp_path / "state")
    grown = change_members(tmp_path / "state", base, add=[car], weights=[-0.25], state=tmp_path / "grown", progress=False)
    assert_same(fused([cat, car, bee], base, weights=[0.5, -0.25, 2]), grown)
    assert_same(
        fused([car, bee], base, weights=[-0.25, 2]), change_members(tmp_path / "grown", base, remove=["a cat"], progress=False)
    )
    with pytest.raises(EsdLoraError, match="2 weights and 1"):
        change_members(tmp_path / "state", base, add=[car], weights=[1, 2], progress=False)


def test_guarded_prompts_stay_guarded(tmp_path: Path) -> None:
    """On the built-in base, whose text has room beside them."""
    base = load_base("emoji", device="cpu", vae=False)
    cat, car = (
        on(base, "xattn-kv", name, seed, guard=guard)
        for seed, (name, guard) in enumerate({"a cat": ("a dog", "a key"), "a car": ("a dog",)}.items())
    )
    fused([cat], base, state=tmp_path / "state")
    grown = change_members(tmp_path / "state", base, add=[car], progress=False)
    assert grown.header.guard == ("a dog",)
    assert_same(fused([cat, car], base), grown)
    rows = base.encode(["a dog"])["prompt_embeds"][0]
    assert all(float((rows @ pair.delta().T).norm()) < 1e-5 * float(pair.delta().norm()) for pair in grown.pairs.values())


def test_layers_too_wide_come_along(
    base: Base, members: dict[str, Eraser], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(closed_form, "WIDEST", 100)
    cat, car, _, key = members.values()
    with pytest.warns(UserWarning, match="wider than"):
        fused([cat, car], base, state=tmp_path / "state")
    with pytest.warns(UserWarning, match="wider than"):
        grown = change_members(tmp_path / "state", base, add=[key], state=tmp_path / "grown", progress=False)
    with pytest.warns(UserWarning, match="wider than"):
        assert_same(fused([cat, car, key], base), grown)
    assert grown.header.fusions[-1].summed
    assert not any(f"{path}.product" in read_tensors(tmp_path / "grown")[0] for path in grown.header.fusions[-1].summed)


def test_copies_go_one_by_one(base: Base, members: dict[str, Eraser], tmp_path: Path) -> None:
    cat, car, *_ = members.values()
    fused([cat, car, cat], base, state=tmp_path / "state")
    thrice = change_members(tmp_path / "state", base, add=[cat], state=tmp_path / "thrice", progress=False)
    assert_same(fused([cat, cat, car, cat], base), thrice)
    assert_same(fused([cat, car], base), change_members(tmp_path / "thrice", base, remove=["a cat", "cat"], progress=False))


def test_members_are_named_by_concept_or_hash(base: Base, members: dict[str, Eraser], tmp_path: Path) -> None:
    cat, car, bee, _ = members.values()
    other = on(base, "xattn-kv", "a cat", seed=8)
    fused([cat, car, bee, other], base, state=tmp_path / "state")

    def removed(*names: str) -> set[str]:
        return {*change_members(tmp_path / "state", base, remove=names, progress=False).header.fusions[-1].members}

    named = {"cat": cat, "car": car, "bee": bee, "other": other}
    hashes = {name: hash_tensors(eraser.state_dict()) for name, eraser in named.items()}
    everyone = {*hashes.values()}
    assert removed("Car") == removed("a car") == everyone - {hashes["car"]}
    assert removed(hashes["other"][:8].upper(), "bee") == everyone - {hashes["other"], hashes["bee"]}
    for name, message in (
        ("cat", f"fits several members of the stack: {min(hashes['cat'], hashes['other'])[:12]}"),
        ("a bea", "no member 'a bea' .did you mean 'a bee'"),
        (hashes["cat"][:5], "no member"),
    ):
        with pytest.raises(EsdLoraError, match=message):
            removed(name)
    with pytest.raises(EsdLoraError, match="nothing be left"):
        removed("a car", "a bee", hashes["cat"], hashes["other"])


def test_what_is_no_state_is_refused(base: Base, members: dict[str, Eraser], tmp_path: Path) -> None:
    cat, car, *_ = members.values()
    stack = tmp_path / "stack"
    fused([cat], base).save(stack)
    with pytest.raises(EsdLoraError, match=r"no stack.state.safetensors at .* fused with --keep-state"):
        change_members(stack, base, add=[car])
    file = stack / STATE_NAME
    fused([cat], base, state=file)
    change_members(stack, base, add=[car], progress=False)
    whole, _ = read_tensors(file)
    path = next(iter(cat.pairs))

    def refusal(changes: Mapping[str, Tensor | None]) -> str:
        tensors = {name: tensor for name, tensor in {**whole, **changes}.items() if tensor is not None}
        file.unlink()
        file.write_bytes(file_content(tensors, {}))
        with pytest.raises(EsdLoraError) as refused:
            change_members(stack, base, add=[car], progress=False)
        return str(refused.value)

    text = bytes(whole["record"].numpy())
    newer = torch.frombuffer(bytearray(text.replace(b'"format":1', b'"format":9', 1)), dtype=torch.uint8)
    assert "has format 9, this version reads 1" in refusal({"record": newer})
    assert "is no state of a stack" in refusal({"record": None})
    assert "is no state of a stack" in refusal({"record": newer[:-9]})
    assert f"layer {path} is not that of 1 members" in refusal({f"{path}.down": None})
    assert f"layer {path} is not that of 1 members" in refusal({f"{path}.product": None})
    assert f"what was read for layer {path}" in refusal({f"{path}.product": whole[f"{path}.product"][:, :-1].contiguous()})
    assert "Fuse the stack anew" in refusal({f"{path}.down": whole[f"{path}.down"][:-1].contiguous()})


def test_another_base_is_refused(base: Base, members: dict[str, Eraser], tiny_dir: Path, tmp_path: Path) -> None:
    cat, car, *_ = members.values()
    fused([cat], base, state=tmp_path / "state")
    precise = load_base(tiny_dir, device="cpu", dtype=torch.float64)
    with pytest.raises(EsdLoraError, match="is loaded in float64, and the stack was fused on one in float32"):
        change_members(tmp_path / "state", precise, add=[car])
    other = Eraser(car.pairs, car.header.model_copy(update={"family": "sdxl"}))
    with pytest.raises(EsdLoraError, match="family"):
        change_members(tmp_path / "state", base, add=[other])
