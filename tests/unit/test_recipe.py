"""Recipes: what may be written, what it comes to, and what is said when it is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from esd_lora.built_in import keep_prompts
from esd_lora.errors import EsdLoraError
from esd_lora.families import family_named
from esd_lora.lessons import plan
from esd_lora.negative_guidance import with_negative_guidance
from esd_lora.objectives import OBJECTIVES, Predictions
from esd_lora.recipe import Concept, Recipe
from esd_lora.recipe_files import (
    load_fuse_spec,
    load_harmonise_spec,
    load_recipe,
    recipe_bases,
    recipe_kind,
    recipe_names,
    recipe_paths,
    recipe_schema,
    recipe_text,
    recipes_by_kind,
    recipes_dir,
)
from esd_lora.teacher import preserved_walks
from published_denoisers import denoiser


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def faults(source: object, *args: object, **fields: object) -> list[str]:
    """The message of the error that loading raises, one entry a line."""
    with pytest.raises(EsdLoraError) as caught:
        load_recipe(source, *args, **fields)
    return [line.strip() for line in str(caught.value).splitlines()]


PRESETS = [
    "esd2025",
    "fast",
    "flux/fast",
    "flux/schnell",
    "instant",
    "leco",
    "paper",
    "replace",
    "sd/fast",
    "sdxl/fast",
    "sdxl/noxattn",
]
PRESETS += ["slider", "thorough"]


def test_kinds_of_files() -> None:
    kinds = recipes_by_kind()
    files = [path.relative_to(recipes_dir()).with_suffix("").as_posix() for path in recipes_dir().rglob("*.yaml")]
    assert sorted(name for names in kinds.values() for name in names) == sorted(files)
    assert len(files) == 44
    assert kinds["preset"] == PRESETS
    assert kinds["concept"] == sorted(name for name in files if name.startswith("concepts/"))
    assert len(kinds["concept"]) == 27
    assert kinds["recipe"] == ["emoji-cat", "emoji-twemoji"]
    assert (kinds["fuse"], kinds["harmonise"]) == (["fuse"], ["harmonise"])


@pytest.mark.parametrize("name", recipes_by_kind()["concept"])
def test_no_concept_says_a_thing_twice(name: str) -> None:
    """A prompt that stands twice would be trained on twice as often."""
    for concept in load_recipe(["fast", name]).concepts:
        assert len(set(concept.lessons())) == len(concept.lessons())
        words = [word.lower() for word in (concept.name, *concept.synonyms)]
        assert len(set(words)) == len(words)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_leco_trains_what_leco_trains(name: str) -> None:
    """lora.py of p1atdev/LECO goes by class: every linear and convolution within a Transformer2DModel."""
    model = denoiser(name)
    theirs = {
        f"{path}.{inner}"
        for path, module in model.named_modules()
        if type(module).__name__ == "Transformer2DModel"
        for inner, layer in module.named_modules()
        if type(layer).__name__ in ("Linear", "Conv2d")
    }
    assert family_named("sd").modules(model, load_recipe("leco", concepts=["a cat"]).scope).keys() == theirs
    assert len(theirs) == 192


COMPOSED = sorted(set(recipe_names()) - {name for names in recipes_by_kind().values() for name in names})


def test_every_base_composes_with_every_concept() -> None:
    assert recipe_bases() == ["flux", "sd", "sdxl"]
    assert len(COMPOSED) == 3 * 27
    assert {recipe_kind(name) for name in COMPOSED} == {"recipe"}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_recipe_is_its_preset_and_its_concept(name: str, tmp_path: Path) -> None:
    base, _, concept = name.partition("/")
    alone = load_recipe(["fast", f"concepts/{concept}"])
    preset_name = "noxattn" if (base, alone.scope) == ("sdxl", "noxattn") else "fast"
    assert recipe_paths(name) == [recipes_dir() / base / f"{preset_name}.yaml", recipes_dir() / "concepts" / f"{concept}.yaml"]
    recipe, preset = load_recipe(name), load_recipe(f"{base}/{preset_name}", concepts=["a cat"])
    assert (recipe.base, recipe.lora, recipe.train) == (preset.base, preset.lora, preset.train)
    assert (recipe.concepts, recipe.scope, recipe.objective, recipe.eta) == (
        alone.concepts,
        alone.scope,
        alone.objective,
        alone.eta,
    )
    # What `recipes show` and `recipes copy` give is a file of the same recipe, and its first line is so.
    copied = write(tmp_path / "copied.yaml", recipe_text(name))
    assert load_recipe(copied) == recipe
    stated = re.match(r"# Erases (.+) from (\S+): scope (\S+), eta (\S+), steps (\w+)\.\n", recipe_text(name))
    assert stated
    erased, base_id, scope, eta, steps = stated.groups()
    assert erased == ", ".join(concept.name for concept in recipe.concepts)
    assert (base_id, scope, eta, steps) == (recipe.base, recipe.scope, str(recipe.eta), str(recipe.train.steps))
    child = write(tmp_path / "child.yaml", f"extends: {name}\neta: 7\n")
    assert load_recipe(child) == recipe.model_copy(update={"eta": 7.0})


def test_noxattn_on_sdxl_says_what_its_authors_say() -> None:
    """esd_sdxl.py of rohitgandikota/erasing: 1e-5 for every method but ESD-x, whatever is set; here rates are measured."""
    assert {load_recipe(f"{base}/{name}").train.lr for base in recipe_bases() for name in ("van-gogh", "church")} == {"auto"}
    assert load_recipe("sdxl/church").train == load_recipe("sdxl/fast", concepts=["a cat"]).train
    assert "Experimental" in recipe_text("sdxl/church")
    assert "1e-5" in recipe_text("sdxl/noxattn")


@pytest.mark.parametrize("name", ["sd/none", "none/van-gogh", "concepts/fast", "sd"])
def test_what_does_not_compose(name: str) -> None:
    (line,) = faults(name)
    assert len(re.findall(r"'[^']+'", line)) == 1 + 5, "the name, and five near ones"
    assert "recipes list" in line


def test_how_stacks_are_made_stands_in_recipes(tmp_path: Path) -> None:
    fusing, harmonising = load_fuse_spec(), load_harmonise_spec()
    assert (fusing.lam, fusing.mu, fusing.trajectories, fusing.keep_trajectories) == (0.3, 0.03, 8, 64)
    assert (fusing.steps, fusing.guidance, fusing.seed) == (4, 3.0, 0)
    assert (harmonising.scope, harmonising.rank) == ("full", 8)
    assert (harmonising.steps, harmonising.lr, harmonising.batch_size) == (100, 3e-3, 16)
    assert (harmonising.push, harmonising.shake, harmonising.guidance, harmonising.seed) == (1.75, 0.7, 3.0, 0)
    assert (harmonising.trajectories, harmonising.keep_trajectories, harmonising.trajectory_steps) == (32, 128, 12)
    mine = write(tmp_path / "mine.yaml", "extends: fuse\nlam: 0.5\nsteps: 3\n")
    assert recipe_kind(str(mine)) == "fuse"
    assert load_fuse_spec(mine, {"steps": 2}, seed=4) == fusing.model_copy(update={"lam": 0.5, "steps": 2, "seed": 4})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: fuse\nlan: 1\n", ":2: lan: unknown key (did you mean 'lam'?)"),
        ("extends: fuse\nlam: -1\n", ":2: lam: "),
        ("method: fuse\nlam: 1\n", "mu: missing (a preset gives it: 'extends: fuse')"),
        ("extends: harmonise\n", "method: "),
    ],
)
def test_faults_of_how_stacks_are_made(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path / "r.yaml", text)
    with pytest.raises(EsdLoraError) as caught:
        load_fuse_spec(file)
    assert expected in str(caught.value)


def test_how_to_fuse_is_nothing_to_train() -> None:
    (line,) = faults("fuse", concepts=["a cat"])
    assert "says how to fuse a stack, and nothing to train" in line


def test_several_recipes_over_one_another() -> None:
    both = load_recipe(["sdxl/fast", "concepts/van-gogh"])
    assert both == load_recipe("sdxl/van-gogh")
    assert both.base == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (both.objective, both.eta, both.scope) == ("contrast", "auto", "xattn")
    assert both.train.accumulate == 2
    assert both.train.steps == load_recipe("sd/van-gogh").train.steps


def test_later_parent_wins(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: fast\neta: 1\nscope: full\n")
    (tmp_path / "b.yaml").write_text("eta: 2\nlora: {rank: 7}\n")
    (tmp_path / "c.yaml").write_text("extends: [a.yaml, b.yaml]\nconcepts: [cat]\n")
    recipe = load_recipe(tmp_path / "c.yaml")
    assert (recipe.eta, recipe.scope, recipe.lora.rank, recipe.lora.alpha) == (2, "full", 7, 4)


def test_concept_alone_lacks_what_a_preset_gives() -> None:
    assert any("lora: missing (a preset gives it" in line for line in faults("concepts/van-gogh"))


def test_schema_is_fresh() -> None:
    """`esd-lora recipes schema > recipes/schema.json` makes it anew."""
    assert json.loads((recipes_dir() / "schema.json").read_text("utf-8")) == json.loads(recipe_schema())


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_files_fit_the_schema(name: str) -> None:
    validator = Draft202012Validator(json.loads(recipe_schema()))
    # Editors read 1e-4 as a number, as YAML 1.2 says; PyYAML wants 1.0e-4.
    text = re.sub(r"\b(\d+)e-(\d)", r"\1.0e-\2", recipe_text(name))
    assert not list(validator.iter_errors(yaml.safe_load(text)))


def test_schema_tells_a_wrong_key() -> None:
    validator = Draft202012Validator(json.loads(recipe_schema()))
    assert list(validator.iter_errors({"extends": "fast", "concpts": ["cat"]}))
    assert list(validator.iter_errors({"extends": "fast", "train": {"step": 3}}))
    assert list(validator.iter_errors({"extends": "fast", "lora": {"rank": 0}}))
    assert list(validator.iter_errors({"extends": "fuse", "lam": -1}))
    assert list(validator.iter_errors({"extends": "harmonise", "pish": 2}))


@pytest.mark.parametrize(
    ("objective", "concept", "eta"),
    [
        ("esd", {"name": "cat"}, 1.0),
        ("contrast", {"name": "cat"}, 1.0),
        ("esd", {"name": "cat", "prompts": ["a cat", "two cats"], "anchor": ""}, 1.0),
        ("esd", {"name": "hat", "erase_from": "a cowboy"}, 2.0),
        ("esd", {"name": "hat", "anchor": "hat"}, 2.0),
    ],
)
def test_negative_guidance_gives_the_scripts_target(objective: str, concept: dict[str, object], eta: float) -> None:
    """By numbers in the place of predictions: start - g (concept - null)."""
    recipe = with_negative_guidance(load_recipe("fast", objective=objective, concepts=[concept]), 2.0)
    assert recipe.eta == eta
    predictions = {"": 0.5, "cat": 3.0, "a cat": 3.0, "two cats": -1.0, "hat": 2.0, "a cowboy": -7.0}
    for start, prompt, anchor in recipe.concepts[0].lessons():
        target = OBJECTIVES.get(objective)(Predictions(predictions[""], predictions[prompt], predictions[anchor]), recipe.eta)  # type: ignore[arg-type]
        assert target == predictions[start] - 2 * (predictions[prompt] - predictions[""])


@pytest.mark.parametrize(
    ("objective", "concepts", "sentence"),
    [
        ("esd", [{"name": "cat", "anchor": "dog"}], "'cat', which is anchored at 'dog'"),
        ("esd", [{"name": "hat", "erase_from": "a cowboy", "anchor": ""}], "'hat', which is anchored at ''"),
        ("contrast", [{"name": "hat", "erase_from": "a cowboy"}], "'hat', which is anchored at 'a cowboy'"),
        (
            "esd",
            ["cat", {"name": "hat", "erase_from": "a cowboy"}],
            "is eta 1 for prompts that are erased from themselves, and 2",
        ),
    ],
)
def test_negative_guidance_that_no_eta_gives(objective: str, concepts: list[object], sentence: str) -> None:
    with pytest.raises(EsdLoraError, match=re.escape(sentence)):
        with_negative_guidance(load_recipe("fast", objective=objective, concepts=concepts), 2.0)


def test_preset_with_base_and_concepts() -> None:
    recipe = load_recipe("paper", base="owner/model", concepts=["Van Gogh", "a cat"])
    assert recipe.base == "owner/model"
    assert [concept.name for concept in recipe.concepts] == ["Van Gogh", "a cat"]
    assert recipe.train.x_t_from == "student"
    assert recipe.eta == 1


def test_plain_string_stands_for_concept_and_for_prompt() -> None:
    assert Concept.model_validate({"name": "cat"}).pairs() == [("cat", "")]
    assert load_recipe("fast", concepts=["cat"]).concepts == (Concept(name="cat"),)
    pool = Concept.model_validate(
        {"name": "cat", "prompts": ["a cat", {"prompt": "two cats", "anchor": "two dogs"}], "anchor": "a dog"}
    )
    assert pool.pairs() == [("a cat", "a dog"), ("two cats", "two dogs")]


def test_empty_anchor_of_a_prompt_is_not_a_missing_one() -> None:
    pool = Concept.model_validate({"name": "cat", "prompts": [{"prompt": "a cat", "anchor": ""}], "anchor": "a dog"})
    assert pool.pairs() == [("a cat", "")]


def test_fill_expands_prompt_and_anchor_together() -> None:
    pool = Concept.model_validate(
        {
            "name": "ink",
            "prompts": [{"prompt": "{x} in ink, {x}", "anchor": "{x}"}, "ink"],
            "fill": ["a cat", "a car"],
            "anchor": "paper",
        }
    )
    assert pool.pairs() == [("a cat in ink, a cat", "a cat"), ("a car in ink, a car", "a car"), ("ink", "paper")]


@pytest.mark.parametrize(
    "concept",
    [
        {"name": "ink", "prompts": ["{x} in ink"]},
        {"name": "ink", "prompts": [{"prompt": "ink", "anchor": "{x}"}]},
        {"name": "ink", "anchor": "{x}"},
        {"name": "{x} in ink"},
    ],
    ids=["prompt", "anchor of a prompt", "anchor", "name"],
)
def test_placeholder_without_fill_is_a_fault(concept: dict[str, object]) -> None:
    # Expanded over no words, such a concept would have no prompt at all.
    assert any("fill" in line for line in faults("fast", concepts=[concept])[1:])


def test_extends_built_in_and_sibling(tmp_path: Path) -> None:
    write(tmp_path / "mine.yaml", "extends: fast\neta: 0.5\ntrain: {steps: 7}\n")
    child = write(tmp_path / "child.yaml", "extends: mine.yaml\nconcepts: [cat]\ntrain:\n  batch_size: 5\n")
    recipe, fast = load_recipe(child), load_recipe("fast", concepts=["cat"])
    assert recipe == fast.model_copy(update={"eta": 0.5, "train": fast.train.model_copy(update={"steps": 7, "batch_size": 5})})


def test_extends_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    (line,) = faults(tmp_path / "a.yaml")
    assert "extends itself" in line
    assert "a.yaml -> b.yaml" in line


def test_lists_are_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "below.yaml", "extends: fast\nconcepts: [a, b]\npreserve: [c, d]\n")
    above = write(tmp_path / "above.yaml", "extends: below.yaml\nconcepts: [e]\npreserve: []\n")
    assert load_recipe(above).concepts == (Concept(name="e"),)
    assert load_recipe(above).preserve == ()


def test_overrides_win_over_the_file_and_keywords_over_both(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "extends: fast\nconcepts: [cat]\neta: 2\ntrain: {steps: 7}\n")
    recipe = load_recipe(file, {"train.steps": 9, "eta": 3, "lora.rank": 2}, eta=4.0)
    assert (recipe.train.steps, recipe.eta, recipe.lora.rank) == (9, 4.0, 2)
    assert recipe.train.batch_size == load_recipe("fast", concepts=["cat"]).train.batch_size


def test_later_override_wins() -> None:
    recipe = load_recipe("fast", {"lora.rank": 2, "lora": {"rank": 3, "alpha": 5}, "lora.alpha": 6}, concepts=["cat"])
    assert (recipe.lora.rank, recipe.lora.alpha) == (3, 6)


def test_number_without_a_point_is_a_number() -> None:
    # PyYAML reads 1e-4 as a string.
    assert load_recipe("fast", {"train.lr": "1e-4"}, concepts=["cat"]).train.lr == 1e-4


def test_every_fault_at_once_each_with_its_line(tmp_path: Path) -> None:
    file = write(
        tmp_path / "bad.yaml",
        "extends: fast\nscop: xattn\neta: strong\nconcepts:\n  - cat\n  - 3\n  - {name: hat, anchr: dog}\n"
        "lora: {rank: 0}\ntrain:\n  step: 5\n  points: some\n",
    )
    head, *lines = faults(file)
    assert "faults" in head
    places = {line.split(": ")[1]: line for line in lines}
    for line, key, meant in ((2, "scop", "scope"), (7, "concepts.2.anchr", "anchor"), (10, "train.step", "steps")):
        assert places[key].startswith(f"{file}:{line}: {key}: unknown key")
        assert f"did you mean {meant!r}?" in places[key]
    # What pydantic says, with the line and the value found.
    assert re.fullmatch(rf"{re.escape(str(file))}:3: eta: .*number.*, found 'strong'", places["eta"])
    assert re.fullmatch(rf"{re.escape(str(file))}:6: concepts\.1: .*, found 3", places["concepts.1"])
    assert re.fullmatch(rf"{re.escape(str(file))}:8: lora\.rank: .*, found 0", places["lora.rank"])
    assert re.fullmatch(rf"{re.escape(str(file))}:11: train\.points: .*'one'.*'all'.*, found 'some'", places["train.points"])
    assert len(lines) == 7


def test_fault_of_an_extended_file_names_that_file(tmp_path: Path) -> None:
    below = write(tmp_path / "below.yaml", "extends: fast\n\neta: strong\n")
    above = write(tmp_path / "above.yaml", "extends: below.yaml\nconcepts: [cat]\n")
    (line,) = faults(above)[1:]
    assert line.startswith(f"{below}:3: eta: ")


@pytest.mark.parametrize("override", [{"eta": "strong"}, {"lora.rank": 0}])
def test_fault_of_an_override_blames_no_line_of_the_file(override: dict[str, object]) -> None:
    (line,) = faults("fast", override, concepts=["cat"])[1:]
    assert next(iter(override)) in line
    assert not re.search(r"\.yaml:\d+", line)


def test_a_field_that_takes_one_word_alone_names_its_fault() -> None:
    with pytest.raises(EsdLoraError, match=r"faults:\n  --set: anchor: expected 'auto', found 'a dog'$"):
        load_recipe("fast", {"anchor": "a dog"}, concepts=["a cat"])


@pytest.mark.parametrize("eta", [".nan", ".inf", "-.inf"])
def test_eta_is_a_finite_number(tmp_path: Path, eta: str) -> None:
    file = write(tmp_path / "r.yaml", f"extends: fast\nconcepts: [cat]\neta: {eta}\n")
    (line,) = faults(file)[1:]
    assert line.startswith(f"{file}:3: eta: ")


def test_missing_concepts_are_not_blamed_on_the_preset() -> None:
    # No preset gives concepts, so "a preset gives it" would send the user the wrong way.
    (line,) = faults("fast")[1:]
    assert "concepts: missing" in line
    assert "extends" not in line


def test_missing_field_points_to_a_preset(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "base: emoji\nconcepts: [cat]\nscope: xattn\nobjective: esd\nlora: {rank: 1, alpha: 1}\n")
    lines = faults(file)[1:]
    assert [line.split(": ")[1] for line in lines] == ["eta", "train"]
    assert all("extends: fast" in line for line in lines)


def test_text_that_is_not_yaml(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "extends: fast\nconcepts: [cat\neta: 1\n")
    (line,) = faults(file)
    assert line.startswith(f"{file}:3: not valid YAML: ")


@pytest.mark.parametrize("text", ["- a\n- b\n", "cat\n", ""])
def test_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    (line,) = faults(write(tmp_path / "r.yaml", text))
    assert "expected a mapping" in line


def test_binary_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\x80\x02\xff\x00\xfe")
    (line,) = faults(file)
    assert line.startswith(f"{file}: cannot be read as a recipe")


def test_value_that_contains_itself(tmp_path: Path) -> None:
    assert faults(write(tmp_path / "r.yaml", "extends: fast\nconcepts: &c [*c]\n"))


def test_missing_file_suggests_a_name() -> None:
    (line,) = faults("fsat")
    assert "did you mean 'fast'?" in line
    assert "?." not in line
    assert line.endswith("All stand in esd-lora recipes list.")
    assert len(line) < 300


def test_recipe_is_frozen() -> None:
    recipe = load_recipe("fast", concepts=["cat"])
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.eta = 2.0  # type: ignore[misc]


def test_unknown_parent_is_named_with_its_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# mine\nextends: fsat\nconcepts: [cat]\n")
    with pytest.raises(EsdLoraError, match=r"mine\.yaml:2: extends no recipe 'fsat'.*did you mean 'fast'"):
        load_recipe(file)


def test_blank_name_is_no_concept():
    with pytest.raises(EsdLoraError, match="concepts"):
        load_recipe("fast", concepts=[" "])


def test_key_given_twice_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("extends: fast\nconcepts: [cat]\ntrain:\n  steps: 3\n  lr: 1e-3\n  steps: 4\n", "utf-8")
    with pytest.raises(EsdLoraError, match=r"twice\.yaml:6: steps: already given in line 4"):
        load_recipe(path)


@pytest.mark.parametrize("name", [name for name in recipe_names() if recipe_kind(name) in ("preset", "recipe")])
def test_every_prompt_has_its_turn(name: str) -> None:
    """Erased prompts and preserved ones are all walked within the run; `paper` and its like preserve none."""
    recipe = load_recipe(name) if recipe_kind(name) == "recipe" else load_recipe(name, concepts=["a cat"])
    lessons, spec = plan(recipe, keep_prompts(recipe.base)), recipe.train
    erased = sum(not lesson.preserves for lesson in lessons)
    if not spec.steps:  # nothing is walked where nothing is trained
        return
    assert -(-spec.most_steps // spec.walk_every) * spec.trajectories >= erased
    assert preserved_walks(spec, 1) >= len(lessons) - erased


def test_nudity_preserves_people_and_van_gogh_paintings() -> None:
    def preserved(name: str) -> set[str]:
        recipe = load_recipe(name)
        return {lesson.prompt for lesson in plan(recipe, keep_prompts(recipe.base)) if lesson.preserves}

    assert {"a woman", "a man", "a person"} <= preserved("sd/nudity")
    assert {"a painting", "an oil painting of a landscape"} <= preserved("sd/van-gogh")
