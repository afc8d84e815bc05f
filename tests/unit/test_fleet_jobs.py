"""What a request comes to: its recipe, its suite, its key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esd_lora.erasers.header import ErasedConcept, EraserHeader
from esd_lora.errors import EsdLoraError
from esd_lora.fleet.jobs import base_digest, is_stale
from esd_lora.fleet.running import Shard
from esd_lora.lessons import pools
from fleet_requests import plan_of, request


def test_an_object_is_erased_by_its_names_in_frames() -> None:
    cat = request(1, "a cat", synonyms=("a kitten",), keep=("a dog",))
    recipe = plan_of([cat]).recipe(cat)
    cats, kittens = pools(recipe, ["a dog", "a dog in a park", "a fox", "a fox in a park"])
    assert (cats[0][0], next(prompt for prompt, _, _ in cats if "park" in prompt)) == ("a cat", "a cat in a park")
    assert (kittens[0][0], next(prompt for prompt, _, _ in kittens if "park" in prompt)) == ("a kitten", "a kitten in a park")
    assert all(concept.named_in("two kittens and a cat") for concept in recipe.concepts)
    assert recipe.guard == ("a dog",)


def test_a_style_is_erased_from_what_the_base_keeps() -> None:
    style = request(1, "twemoji", kind="style")
    recipe = plan_of([style]).recipe(style)
    (concept,) = recipe.concepts
    lessons = concept.lessons()
    assert recipe.objective == "contrast"
    assert ("a frog in twemoji style", "a frog") in [(prompt, anchor) for _, prompt, anchor in lessons]
    assert not any("twemoji" in anchor or anchor == "" for _, _, anchor in lessons)


def test_no_anchor_is_the_empty_prompt_and_settings_of_a_request_win() -> None:
    cat = request(1, "a cat", anchor="none", settings={"train.steps": 7, "lora.rank": 2})
    plan = plan_of([cat], overrides={"train.steps": 9, "scope": "xattn-kv"})
    recipe = plan.recipe(cat)
    assert (recipe.concepts[0].anchor, recipe.train.steps, recipe.lora.rank, recipe.scope) == ("", 7, 2, "xattn-kv")


def test_a_fault_of_a_recipe_is_the_requests_own() -> None:
    cat = request(1, "a cat", settings={"train.probe_every": 0})
    with pytest.raises(EsdLoraError, match=r"set train\.probe_every"):
        plan_of([cat]).job(cat)


def test_what_others_erase_is_avoided_where_a_kept_prompt_could_name_it() -> None:
    listed = [
        request(1, "a cat"),
        request(2, "a dog"),
        request(3, "Aloysius Quill", kind="person"),
        request(4, "a fox", status="withdrawn"),
    ]
    plan = plan_of(listed)
    assert plan.avoid == ("a cat", "a dog")  # of the others none can be an anchor, and no file should name them
    assert plan.recipe(listed[0]).avoid == ("a dog",)


def test_a_key_tells_what_matters_from_what_does_not() -> None:
    cat, dog = request(1, "a cat"), request(2, "a dog")
    key = plan_of([cat]).job(cat).key
    assert plan_of([cat, dog]).job(cat).key == key
    assert plan_of([cat]).job(request(1, "a cat", reference="ticket 7", status="done")).key == key
    others = [
        plan_of([cat], overrides={"train.seed": 1}).job(cat).key,
        plan_of([cat], limit=5).job(cat).key,
        plan_of([cat], suites={"object": ""}).job(cat).key,
        plan_of([cat], recipe=("instant",)).job(cat).key,
        plan_of([cat], dtype="bfloat16").job(cat).key,
        plan_of([cat], second=("thorough",), not_enough_if=("erased.accuracy>0.05",)).job(cat).key,
        plan_of([cat]).job(request(1, "a cat", keep=("a dog",))).key,
        plan_of([cat]).job(request(1, "a cat", settings={"train.seed": 2})).key,
    ]
    assert len({key, *others}) == 1 + len(others)


@pytest.mark.parametrize(("avoid", "stale"), [((), False), (("a fox",), False), (("a dog",), True)])
def test_an_eraser_is_stale_once_its_anchor_is_to_go(avoid: tuple[str, ...], stale: bool) -> None:
    concept = ErasedConcept(name="a cat", pairs=(("a cat", "a dog"), ("a photo of a cat", "a photo of a dog")), eta=0.0)
    header = EraserHeader.model_construct(concepts=(concept,))
    assert is_stale(header, avoid) is stale


def test_what_a_style_is_drawn_from_may_go_without_making_it_stale() -> None:
    concept = ErasedConcept(name="ink", pairs=(("a dog in ink style", "a dog"),), eta=1.0)
    assert not is_stale(EraserHeader.model_construct(concepts=(concept,)), ("a dog",))


def test_a_base_is_told_by_its_contents(tmp_path: Path) -> None:
    file, folder = tmp_path / "base.safetensors", tmp_path / "base"
    folder.mkdir()
    for place in (file, folder / "weights"):
        place.write_bytes(b"one")
        first = base_digest(str(place.parent if place.parent == folder else place))
        place.write_bytes(b"two")
        assert base_digest(str(place.parent if place.parent == folder else place)) != first
    with pytest.raises(EsdLoraError, match="Check --base"):
        base_digest("no such base!")


@given(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True), unique=True), st.integers(1, 9))
def test_shards_part_a_list(ids: list[str], count: int) -> None:
    parts = [{name for name in ids if Shard(number, count).holds(name)} for number in range(count)]
    assert sorted(name for part in parts for name in part) == sorted(ids)


@pytest.mark.parametrize("text", ["", "1", "1/1", "4/4", "-1/4", "a/b", "1/4/5"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(EsdLoraError, match="NUMBER/COUNT"):
        Shard.read(text)
    assert Shard.read("3/4") == (3, 4)
