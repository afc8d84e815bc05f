"""A recipe written out and read back is the same recipe, whatever its strings hold."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from esd_lora.recipe import JOINT_SCOPE, SCOPES, Concept, LoraSpec, Neighbours, PromptPair, Recipe, TrainSpec
from esd_lora.recipe_files import dump_recipe, load_recipe

# Line breaks of other alphabets, what YAML reads as something else, and a byte order mark, beside whatever turns up.
ODD = [
    "",
    " ",
    "\x85",
    "\u2028",
    "\r\n",
    "\ufeff",
    "\x00",
    "no",
    "1e5",
    "~",
    "- a: b",
    "#",
    "%x",
    "2001-01-01",
    "日本 🐈",
    "a\\",
]
texts = st.text(max_size=12) | st.sampled_from(ODD)
numbers = st.floats(allow_nan=False, allow_infinity=False)
above_zero = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
not_negative = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
ranks = st.integers(1, 1024)
counts = st.integers(min_value=0, max_value=2**62)


def tuples(items: st.SearchStrategy, max_size: int = 3) -> st.SearchStrategy:
    return st.lists(items, max_size=max_size).map(tuple)


pairs = st.builds(PromptPair, prompt=texts, anchor=st.none() | texts)
concepts = st.builds(
    Concept,
    name=texts.filter(str.strip),
    prompts=tuples(pairs),
    fill=tuples(texts).map(lambda fill: (*fill, "cat")),  # never empty, so that {x} may stand anywhere
    anchor=st.none() | texts | st.just("{x}"),
    erase_from=st.none() | texts,
    synonyms=tuples(texts),
)
specs = st.builds(
    TrainSpec,
    steps=counts.map(lambda n: n + 1),
    lr=above_zero,
    lr_schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=counts,
    optimizer=st.sampled_from(["adam", "adamw8bit", "my_module:Mine"]),
    optimizer_args=st.dictionaries(st.sampled_from(["weight_decay", "eps"]), not_negative),
    batch_size=counts.map(lambda n: n + 1),
    preserve_batch=counts,
    preserve_weight=not_negative,
    accumulate=counts.map(lambda n: n + 1),
    aspects=tuples(st.sampled_from(["1:1", "3:2", "16:9"])),
    resolution=st.none() | st.integers(8, 4096),
    patience=counts,
    x_t_from=st.sampled_from(["student", "base", "auto"]),
    points=st.sampled_from(["one", "all"]),
    trajectories=counts.map(lambda n: n + 1),
    preserve_trajectories=counts,
    refresh_every=counts.map(lambda n: n + 1) | st.just("auto"),
    trajectory_steps=st.integers(2, 1000),
    guidance=not_negative,
    seed=counts,
    probe_every=counts,
    stop_at=st.none() | above_zero,
    preview_every=counts,
    checkpoint_every=counts,
)
recipes = st.builds(
    Recipe,
    base=texts.filter(bool),
    concepts=st.lists(concepts, min_size=1, max_size=2).map(tuple),
    scope=st.sampled_from([*SCOPES, JOINT_SCOPE, r"re:to_[kv]$"]),
    objective=st.sampled_from(["esd", "my_module:mine"]),
    eta=numbers,
    preserve=st.just("default") | tuples(texts),
    neighbours=st.none() | st.builds(Neighbours, vocabulary=texts | tuples(texts), count=counts.map(lambda n: n + 1)),
    lora=st.builds(
        LoraSpec,
        rank=ranks,
        alpha=above_zero,
        conv_rank=st.none() | ranks,
        ranks=st.dictionaries(st.sampled_from(SCOPES), ranks),
        dropout=st.floats(0, 0.5),
        rslora=st.booleans(),
    ),
    train=specs,
)


@given(recipes)
def test_dumped_recipe_loads_as_itself(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(dump_recipe(recipe).encode())  # as Eraser.save writes it
        assert load_recipe(file, allow_code=["my_module:mine", "my_module:Mine"]) == recipe


@given(recipes)
def test_round_trip_through_json(recipe: Recipe) -> None:
    """The header of an eraser file holds the recipe as JSON."""
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
