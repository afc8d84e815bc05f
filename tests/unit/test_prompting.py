"""Which prompts a stack is made by."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from esd_lora.built_in import domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.fusing.prompts import keep_list, own_prompts
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
