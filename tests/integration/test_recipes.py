"""Every recipe that ships: it trains on its family's toy, and what its first line states is so."""

from __future__ import annotations

import re
from functools import cache

import pytest
from torch import nn

from esd_lora.bases.base import Base
from esd_lora.families import FAMILIES
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import kind_of, load_recipe, recipe_names, recipe_path
from esd_lora.training import train
from published_denoisers import DENOISERS, denoiser
from toys import load_toy, save_toy

TOY_OF = {
    "emoji": "sd",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
    "black-forest-labs/FLUX.1-schnell": "flux-schnell",
}
"""Base of a recipe to the toy of its family."""
TITLES = {"SD 1.4/1.5": "sd15", "SDXL base 1.0": "sdxl", "Flux.1 dev": "flux"}
KINDS = {name: kind_of(name) for name in recipe_names()}
READY = [name for name, kind in KINDS.items() if kind == "recipe"]
ON_REAL_BASES = [name for name in READY if not name.startswith("emoji-")]
BRIEF = {
    "train.steps": 2,
    "train.trajectories": 2,
    "train.preserve_trajectories": 2,
    "train.trajectory_steps": 2,
    "train.resolution": None,
    "train.preview_every": 0,
    "train.checkpoint_every": 0,
}


def complete(name: str) -> Recipe:
    """A shipped file as a recipe: a preset with a concept, a concept with a preset."""
    if KINDS[name] == "preset":
        return load_recipe(name, BRIEF, concepts=["a cat"])
    return load_recipe(["fast", name] if KINDS[name] == "concept" else name, BRIEF)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("toys")
    return {name: load_toy(save_toy(name, folder / name)) for name in sorted(set(TOY_OF.values()))}


def test_nothing_is_left_out() -> None:
    assert len(READY) == 62
    assert len(ON_REAL_BASES) == 60
    assert {complete(name).base for name in KINDS} == TOY_OF.keys()


@pytest.mark.parametrize("name", KINDS)
def test_recipe_trains_on_its_family_s_toy(name: str, toys: dict[str, Base]) -> None:
    recipe = complete(name)
    eraser = train(recipe, base=toys[TOY_OF[recipe.base]], progress=False)
    assert eraser.header.cost["steps"] == 2
    assert eraser.header.scope == recipe.scope
    assert any(pair.up.abs().max() > 0 for pair in eraser.pairs.values())


@cache
def bytes_of(model: str, scope: str, rank: int) -> int:
    """Bytes of an eraser's factors on a published denoiser, which are stored in float32."""
    family = next(family for family in FAMILIES if family.name == DENOISERS[model][0])
    total = 0
    for layer in family.modules(denoiser(model), scope).values():
        inputs = layer.weight[0].numel() if isinstance(layer, nn.Linear | nn.Conv2d) else 0
        total += rank * (inputs + layer.weight.shape[0])
    return 4 * total


@pytest.mark.parametrize("name", ON_REAL_BASES)
def test_first_line_states_what_is_so(name: str) -> None:
    line = recipe_path(name).read_text("utf-8").splitlines()[0]
    stated = re.fullmatch(
        r"# Erases .+ from (.+): (\S+) \(.+\), eta ([\d.]+), (\d+) steps, ([\d.]+) MB\. Not yet run on these weights\.", line
    )
    assert stated, line
    title, scope, eta, steps, size = stated.groups()
    recipe = load_recipe(name)
    assert (scope, float(eta), int(steps)) == (recipe.scope, recipe.eta, recipe.train.steps)
    model = TITLES[title]
    assert TOY_OF[recipe.base].split("-")[0] == DENOISERS[model][0]
    assert recipe.lora.ranks == {}
    assert f"{bytes_of(model, scope, recipe.lora.rank) / 1e6:.1f}" == size
