"""Which prompts a stack is made by."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from esd_lora.built_in import domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.fusing.prompts import choose_walked, keep_list, own_prompts
from esd_lora.wording import frames_of
from random_erasers import build_header


def member(name: str, *prompts: str, **header: object) -> Eraser:
    concept = ErasedConcept(name=name, synonyms=("moggy",), pairs=tuple((prompt, "") for prompt in prompts), eta=1.0)
    return Eraser({}, build_header(name, **{"concepts": (concept,), "preserve": (), **header}))


def test_what_names_a_member_is_dropped_and_asked_of_it() -> None:
    cat = member("cat", "a cat", preserve=("a cow",))
    kept, dropped = keep_list([cat], ["two cats", "a moggy", "a dog", "a catalogue"])
    assert (kept, dropped) == (["a catalogue", "a cow", "a dog"], ["a moggy", "two cats"])
    assert own_prompts(cat, kept, dropped) == ["a cat", "a moggy", "two cats"]


def test_frames_of_the_list_are_put_around_a_member() -> None:
    cat = member("cat", "a cat")
    kept, dropped = keep_list([cat], ["a dog", "a dog in a park", "an owl"])
    assert own_prompts(cat, kept, dropped) == ["a cat", "a cat in a park"]


def test_who_else_is_in_the_stack_does_not_matter_to_a_member() -> None:
    cat, car = member("cat", "a cat", "my cat"), member("car", "a car")
    listed = ["a bus", "a bus in rain", "a car", "a car at night", "a dog", "a dog in a park", "two cats"]
    alone, beside = keep_list([cat], listed), keep_list([cat, car], listed)
    assert alone != beside
    assert own_prompts(cat, *alone) == own_prompts(cat, *beside)


@given(prompts=st.lists(st.text(min_size=1), min_size=1, unique=True), most=st.integers(1, 9))
def test_one_kept_prompt_less_changes_one_that_is_walked(prompts: list[str], most: int) -> None:
    whole, fewer = choose_walked(prompts, most), choose_walked(prompts[1:], most)
    assert len(whole) == min(most, len(prompts))
    assert choose_walked(prompts[::-1], most) == whole
    assert whole - fewer <= {prompts[0]}
    assert len(fewer - whole) == (prompts[0] in whole and len(prompts) > most)


def test_concept_is_named_among_prompts_as_it_is_in_each() -> None:
    concept = ErasedConcept(name="a cat", synonyms=("the moggy",), pairs=(), eta=None)
    prompts = ["a cat", "two CATS", "catalogue", "a moggy's hat", "dog", ""]
    assert (
        concept.named_among(prompts)
        == [prompt for prompt in prompts if concept.named_in(prompt)]
        == [prompts[i] for i in (0, 1, 3)]
    )


def test_a_member_of_many_prompts_is_asked_on_those_alone() -> None:
    style = member("ink", "a cat in ink style", "a dog in ink style", "an owl in ink style")
    assert own_prompts(style, ["a dog", "a dog in a park", "a dog in rain"], []) == [
        "a cat in ink style",
        "a dog in ink style",
        "an owl in ink style",
    ]


def test_a_frame_stands_around_what_others_stand_in_too() -> None:
    """Not "a bus in {}", which would ask for "a bus in a cat"."""
    listed = ["a bus", "a dog", "a drawing", "ink style", "a bus in ink style", "a dog in ink style", "a drawing of a bus"]
    listed += ["a drawing of a dog"]
    assert list(frames_of(listed)) == ["{} in ink style", "a drawing of {}"]


def test_the_first_of_a_prompt_is_its_subject() -> None:
    assert frames_of(["a sofa", "a dog", "a dog on a sofa"]) == {"{} on a sofa": 1}
    assert frames_of(["a car", "a cart"]) == {}  # whole words alone


def test_frames_of_the_built_in_list_hold_no_other_object() -> None:
    known = domain("emoji")
    assert len(frames := frames_of(known["keep"])) > 20
    assert not [frame for frame in frames if any(f" {name}" in frame for name in known["objects"])]
    assert all(frame.count("{}") == 1 for frame in frames)


WORDS = st.lists(
    st.sampled_from(["a dog", "a cat", "in rain", "ink", "a dog, ink", "a cat in rain", "a dog in rain"]), unique=True
)


@given(prompts=WORDS)
def test_a_frame_filled_with_its_own_is_in_the_list(prompts: list[str]) -> None:
    frames = frames_of(prompts)
    assert len(set(frames)) == len(frames) < max(len(prompts), 1)
    for frame in frames:
        assert any(frame.replace("{}", part) in prompts for part in prompts)
