"""What is taught, and that the teacher is the untouched base and asks no question twice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from esd_lora.adapter import add_adapter
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.built_in import keep_prompts
from esd_lora.closed_form import choose_guarded
from esd_lora.errors import EsdLoraError
from esd_lora.lessons import Lesson, plan, share_turns
from esd_lora.recipe import Concept, Recipe
from esd_lora.teacher import Teacher, preserved_walks, refill, walked_so_far
from esd_lora.trajectory import Condition, Points
from tiny import tiny_recipe

STEPS = 4
TEMPLATE = {"name": "ink", "prompts": [{"prompt": "{x} in ink", "anchor": "{x}"}], "fill": ["a cat", "a car"]}


def teacher_of(base: Base, recipe: Recipe, noise: float = 0.0) -> Teacher:
    """A teacher on a base that carries a LoRA with weights of size `noise`."""
    parameters = add_adapter(base, base.family.modules(base.model, "xattn"), recipe.lora, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return Teacher(base, recipe, plan(recipe))


def cost_of_filling(base: Base, recipe: Recipe) -> int:
    """Evaluations of one trajectory for every lesson."""
    teacher = teacher_of(base, recipe)
    teacher.fill(torch.arange(len(teacher.lessons)), torch.Generator().manual_seed(2))
    return teacher.evaluations


def test_plan_is_pools_in_order_then_preserved() -> None:
    recipe = tiny_recipe(
        "b", concepts=[TEMPLATE, {"name": "hat", "erase_from": "cowboy", "anchor": "head"}], eta=2, preserve=["a dog"]
    )
    assert plan(recipe) == [
        Lesson("a cat in ink", "a cat in ink", "a cat", 2),
        Lesson("a car in ink", "a car in ink", "a car", 2),
        Lesson("cowboy", "hat", "head", 2),
        Lesson("a dog", "a dog", "a dog", 0),
    ]
    assert [lesson.preserves for lesson in plan(recipe)] == [False, False, False, True]


@pytest.mark.parametrize("preserve", ["default", ["a dog", "two cars", "a hat"]])
def test_what_other_erasers_erase_is_not_preserved(preserve: str | list[str]) -> None:
    recipe = tiny_recipe("b", preserve=preserve).model_copy(update={"avoid": ("a car", "hat")})
    lessons = plan(recipe, keep=["a dog", "a car in the rain", "hats"], near=["a fast car"])
    assert [lesson.prompt for lesson in lessons if lesson.preserves] == ["a dog"]


def test_lesson_without_push_still_erases_towards_its_anchor() -> None:
    (lesson,) = plan(tiny_recipe("b", eta=0, preserve=[]))
    assert not lesson.preserves


def test_default_keep_list_drops_what_names_a_concept() -> None:
    keep = ["a cat", "two CATS", "a tomcat", "a kitten", "a dog", "catfish soup"]
    recipe = tiny_recipe("b", concepts=[{"name": "a cat", "synonyms": ["kitten"]}], preserve="default")
    assert [lesson.prompt for lesson in plan(recipe, keep) if lesson.preserves] == ["a tomcat", "a dog", "catfish soup"]


def test_keep_list_is_used_only_when_asked_for() -> None:
    assert not any(lesson.preserves for lesson in plan(tiny_recipe("b", preserve=[]), ["a dog"]))


def test_package_s_keep_list_holds_prompts() -> None:
    keep = keep_prompts("owner/model")
    assert len(keep) == len(set(keep)) > 80
    assert all(prompt == prompt.strip() and prompt and not prompt.startswith("#") for prompt in keep)


@pytest.mark.parametrize("prompt", ["a cat on a mat", "Cats", "my kitten"])
def test_own_preserve_list_must_not_name_a_concept(prompt: str) -> None:
    recipe = tiny_recipe("b", concepts=["a hat", {"name": "a cat", "synonyms": ["kitten"]}], preserve=["a dog", prompt])
    with pytest.raises(EsdLoraError, match="preserve") as caught:
        plan(recipe)
    assert repr(prompt) in str(caught.value)
    assert "a cat" in str(caught.value)


def test_naming_goes_by_whole_words() -> None:
    concept = Concept(name="the art", synonyms=("C++",))
    assert all(concept.named_in(text) for text in ("art", "modern Art, oil", "arts", "some c++ code"))
    assert not any(concept.named_in(text) for text in ("a cartoon", "a party", "artist", "c+"))


def test_guidance_has_said_all_that_a_null_anchor_needs(base: Base) -> None:
    recipe = tiny_recipe(base.id, concepts=["a cat", "a car", "ink"], preserve=[], trajectory_steps=STEPS)
    assert cost_of_filling(base, recipe) == 2 * 3 * STEPS


def test_anchor_costs_one_evaluation_a_point(base: Base) -> None:
    recipe = tiny_recipe(base.id, concepts=["a cat", TEMPLATE], preserve=[], trajectory_steps=STEPS)
    assert cost_of_filling(base, recipe) == (2 * 3 + 2) * STEPS


def test_prompt_to_erase_from_costs_one_evaluation_a_point(base: Base) -> None:
    recipe = tiny_recipe(base.id, concepts=[{"name": "hat", "erase_from": "cowboy"}], preserve=[], trajectory_steps=STEPS)
    assert cost_of_filling(base, recipe) == 3 * STEPS


def test_preserved_prompt_costs_nothing_beside_its_walk(base: Base) -> None:
    recipe = tiny_recipe(base.id, preserve=["a dog", "a hat"], trajectory_steps=STEPS)
    assert cost_of_filling(base, recipe) == 2 * 3 * STEPS


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_walk_that_is_not_guided_asks_for_no_empty_prompt(base: Base, eta: float) -> None:
    recipe = tiny_recipe(base.id, preserve=["a dog"], eta=eta, trajectory_steps=STEPS, guidance=1.0)
    assert cost_of_filling(base, recipe) == (1 + 1 + 1) * STEPS  # the empty prompt only where the target has it


def test_student_s_walk_tells_the_teacher_nothing(base: Base) -> None:
    recipe = tiny_recipe(base.id, preserve=["a dog"], trajectory_steps=STEPS, x_t_from="student")
    assert cost_of_filling(base, recipe) == (2 * 2 + 2 + 1) * STEPS


def test_one_point_a_trajectory(base: Base) -> None:
    recipe = tiny_recipe(base.id, "paper", preserve=[], trajectory_steps=STEPS)
    teacher = teacher_of(base, recipe)
    for seed in range(4):
        before, generator = teacher.evaluations, torch.Generator().manual_seed(seed)
        buffer = teacher.fill(torch.zeros(1, dtype=torch.long), generator).taught
        assert len(buffer) == 1
        grid = base.family.scheduler(base.pipe, STEPS, base.latent_shape()).timesteps.tolist()
        stop = grid.index(buffer.points.t.item())
        assert teacher.evaluations - before == 2 * stop + 2


def test_number_of_trajectories_walked_side_by_side_changes_nothing(base: Base) -> None:
    fills = []
    for batch in (32, 2):
        recipe = tiny_recipe(base.id, preserve=["a dog"], trajectory_steps=2, walk_batch=batch)
        teacher, lesson = teacher_of(load_base(base.id), recipe), torch.tensor([0, 1, 0, 1, 1])
        points = teacher.fill(lesson, torch.Generator().manual_seed(0)).taught.points
        order = (points.lesson * 1000 + points.t).sort(stable=True).indices  # trajectories of a lesson stay in their order
        fills.append([tensor[order] for tensor in points])
    for found, expected in zip(*fills, strict=True):
        torch.testing.assert_close(found, expected)


def test_teacher_is_the_base_whatever_the_adapter_holds(base: Base) -> None:
    recipe = tiny_recipe(base.id, concepts=["a cat", TEMPLATE], trajectory_steps=STEPS)
    noise, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        plain = base.predict(noise, t, base.encode(["a cat"]))
    teacher = teacher_of(base, recipe, noise=0.5)
    told = base.encode(["a cat"])
    changed = teacher.predict(noise, t, told)
    assert not torch.allclose(changed, plain, atol=1e-3)
    with teacher.adapter_disabled():
        assert torch.equal(teacher.predict(noise, t, told), plain)
    assert torch.equal(teacher.predict(noise, t, told), changed)
    with pytest.raises(RuntimeError, match="inside"), teacher.adapter_disabled():
        raise RuntimeError("inside")
    assert torch.equal(teacher.predict(noise, t, told), changed)
    assert {name for name, p in base.model.named_parameters() if p.requires_grad} == {
        name for name, _ in base.model.named_parameters() if "lora_" in name
    }


def filled(base: Base, recipe: Recipe, noise: float) -> Points:
    """What a teacher puts into the buffer beside an adapter with weights of size `noise`."""
    teacher = teacher_of(load_base(base.id), recipe, noise)
    return teacher.fill(torch.arange(len(teacher.lessons)), torch.Generator().manual_seed(0)).taught.points


def test_base_s_points_do_not_depend_on_the_adapter(base: Base) -> None:
    recipe = tiny_recipe(base.id, concepts=["a cat", TEMPLATE], trajectory_steps=STEPS)
    for found, expected in zip(filled(base, recipe, 0.5), filled(base, recipe, 0), strict=True):
        assert torch.equal(found, expected)


def test_student_s_points_do(base: Base) -> None:
    recipe = tiny_recipe(base.id, preserve=[], trajectory_steps=STEPS, x_t_from="student")
    found, expected = filled(base, recipe, 0.5), filled(base, recipe, 0)
    assert torch.equal(found.x_t[0], expected.x_t[0])  # pure noise
    assert not torch.allclose(found.x_t[-1], expected.x_t[-1], atol=1e-3)
    # At the same place the teacher says the same, so only the place makes the targets differ.
    assert torch.equal(found.target[0], expected.target[0])


def test_every_lesson_gets_its_turn(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    concepts, kept = [f"concept {i}" for i in range(5)], [f"kept {i}" for i in range(3)]
    settings = {"trajectories": 2, "preserve_trajectories": 1, "refresh_every": 1}
    recipe = tiny_recipe(base.id, concepts=concepts, preserve=kept, **settings)
    lessons, asked = plan(recipe), []
    teacher = Teacher(base, recipe, lessons)

    def fill(lesson: torch.Tensor, noise: torch.Generator, *_: object) -> tuple[None, list[Points]]:
        asked.append((lesson.tolist(), noise.initial_seed()))
        return None, []

    monkeypatch.setattr(teacher, "fill", fill)
    for number in range(15):
        refill(teacher, number, [(4, 8, 8)])
    erased, preserved = ([row for rows, _ in asked[i::2] for row in rows] for i in (0, 1))
    assert [erased.count(row) for row in range(8)] == [6] * 5 + [0] * 3
    assert [preserved.count(row) for row in range(8)] == [0] * 5 + [5] * 3
    assert set(erased[:5]) == set(range(5))  # nobody comes twice before everybody came once
    assert len({seed for _, seed in asked}) == 15  # new noise at every refresh


@pytest.mark.parametrize("x_t_from", ["base", "student"])
def test_the_empty_prompt_is_held_where_others_are_trained(base: Base, x_t_from: str) -> None:
    """On the base's walk for nothing: guidance has predicted it there."""
    settings = {"x_t_from": x_t_from, "preserve_trajectories": 1, "trajectories": 3, "trajectory_steps": STEPS}
    plain, teacher = (
        teacher_of(base if n else load_base(base.id), tiny_recipe(base.id, null_batch=n, **settings)) for n in (0, 5)
    )
    (without,), (buffers,) = (refill(each, 0, [(4, 8, 8)]).values() for each in (plain, teacher))
    assert without.null is None
    assert buffers.preserving is not None
    assert buffers.null is not None
    assert teacher.evaluations - plain.evaluations == (0 if x_t_from == "base" else len(buffers.null))
    held, walked = buffers.null.points, Points.join([buffers.erasing.points, buffers.preserving.points])
    assert torch.equal(held.x_t, walked.x_t)
    assert torch.equal(held.t, walked.t)
    with teacher.adapter_disabled(), torch.no_grad():
        expected = base.predict(held.x_t, held.t, {k: v.expand(len(held.t), -1, -1) for k, v in base.encode([""]).items()})
    torch.testing.assert_close(held.target, expected, rtol=1e-4, atol=1e-5)
    (batch,) = buffers.batches(teacher.spec, torch.Generator().manual_seed(0))
    assert batch.lesson.tolist()[-5:] == [teacher.null_lesson] * 5
    assert torch.equal(teacher.condition(batch.lesson[-1:])["prompt_embeds"], base.encode([""])["prompt_embeds"])


@pytest.mark.parametrize(
    "setting", [{"preserve": []}, {"preserve_batch": 0}, {"preserve_trajectories": 0}], ids=lambda s: next(iter(s))
)
def test_nothing_is_walked_that_is_not_trained_on(base: Base, setting: dict[str, object]) -> None:
    recipe = tiny_recipe(base.id, **setting)
    teacher = teacher_of(base, recipe)
    erasing, preserving, null = refill(teacher, 0, [(4, 8, 8)])[0]
    assert len(erasing) == 2 * STEPS
    assert preserving is None
    assert null is None
    assert teacher.evaluations == 2 * 2 * STEPS


def on_a_line(prompts: Sequence[str]) -> Condition:
    """Encode "p0", "p1", ... as texts that have ever less in common with the concept."""
    angles = torch.tensor([(1 + int(p[1:])) / 50 if p.startswith("p") else 0.0 for p in prompts])
    size = torch.tensor([float(p != "") for p in prompts])
    return {"prompt_embeds": (size * torch.stack([angles.cos(), angles.sin()])).T[:, None]}


def shared(count: int, walks: int, seed: int = 0) -> dict[str, int]:
    """Preserved prompt to its turns, of prompts "p0" ... that are ever farther from the concept, listed the other way."""
    recipe = tiny_recipe("emoji", preserve=[f"p{i}" for i in reversed(range(count))])
    lessons = share_turns(plan(recipe), walks, on_a_line, seed)
    assert [lesson.prompt for lesson in lessons if not lesson.preserves] == ["a cat"]
    return {lesson.prompt: lesson.turns for lesson in lessons if lesson.preserves}


def test_what_erasing_reaches_furthest_takes_two_turns() -> None:
    assert shared(12, 15) == {f"p{i}": 2 if i < 3 else 1 for i in range(12)}
    assert shared(3, 100) == {f"p{i}": 1 for i in range(3)}


def test_too_few_walks_go_to_what_is_reached_furthest_and_to_some_others() -> None:
    turns = shared(40, 10)
    assert len(turns) == 10
    assert set(turns.values()) == {1}
    assert {f"p{i}" for i in range(5)} <= set(turns)
    assert set(turns) != set(shared(40, 10, seed=1))
    assert shared(12, 14) == {f"p{i}": 1 for i in range(12)}  # one short of a second turn for the nearest
    assert shared(12, 0) == {}


def test_guarded_is_what_erasing_reaches_furthest() -> None:
    listed = [*(f"p{i}" for i in reversed(range(9))), "a cat with p9"]
    assert choose_guarded(tiny_recipe("emoji", preserve=listed[:-1]), 3, [], on_a_line) == ("p0", "p1", "p2")
    assert choose_guarded(tiny_recipe("emoji", preserve=[]), 2, listed, on_a_line) == ("p0", "p1"), "from the base's list"
    assert choose_guarded(tiny_recipe("emoji", preserve=["p4"]), 2, listed, on_a_line) == ("p4",)


def test_turns_are_walked(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(base.id, preserve=["a dog", "a hat", "a key"], preserve_trajectories=2, refresh_every=1, steps=8)
    lessons = [lesson._replace(turns=2) if lesson.prompt == "a hat" else lesson for lesson in plan(recipe)]
    teacher, walked = Teacher(base, recipe, lessons), []
    monkeypatch.setattr(teacher, "fill", lambda lesson, *_: walked.append(lesson.tolist()) or (None, []))
    for step in range(8):
        refill(teacher, step, [(4, 8, 8)])
        preserved = [row for rows in walked[1::2] for row in rows]
        assert walked_so_far(teacher, step + 1, 1) == set(preserved)
    assert len(preserved) == preserved_walks(recipe.train, 1) == 16
    assert [preserved.count(row) for row in (1, 2, 3)] == [4, 8, 4]


def test_preserved_prompts_keep_few_points_each(base: Base) -> None:
    recipe = tiny_recipe(base.id, trajectories=1, preserve_trajectories=2, trajectory_steps=6, preserve_steps=3)
    buffers = refill(teacher_of(base, recipe), 0, [(4, 8, 8)])[0]
    assert buffers.preserving is not None
    assert (len(buffers.erasing), len(buffers.preserving)) == (6, 2 * 3)
