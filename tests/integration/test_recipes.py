"""Every recipe that ships: it trains on its family's toy, and the sizes that presets state are so."""

from __future__ import annotations

import re
from functools import cache

import pytest
from torch import nn

from esd_lora.bases.base import Base
from esd_lora.families import FAMILIES
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe, recipe_bases, recipe_names, recipe_text, recipes_by_kind
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
DENOISER_OF = {"sd": "sd15", "sdxl": "sdxl", "flux": "flux"}
"""BASE of `BASE/fast` to its published denoiser."""
KINDS = {name: kind for kind in ("preset", "concept", "recipe") for name in recipes_by_kind()[kind]}
COMPOSED = sorted(set(recipe_names()) - {name for names in recipes_by_kind().values() for name in names})
EVERY_SCOPE = {(name.split("/")[0], load_recipe(name).scope): name for name in COMPOSED}
"""One composed recipe for each base and scope: what is trained of a pair beyond its preset and its concept."""
BRIEF = {
    "train.steps": 2,
    "train.lr": 1e-3,  # on random weights there may be no rate at which a step goes the way
    "train.trajectories": 2,
    "train.preserve_trajectories": 2,
    "train.trajectory_steps": 2,
    "train.resolution": None,
    "train.preview_every": 0,
    "train.checkpoint_every": 0,
}


def complete(name: str) -> Recipe:
    """Return a shipped recipe, brief: a preset with a concept, a concept with a preset."""
    kind = KINDS.get(name)
    if kind == "preset":
        return load_recipe(name, BRIEF, concepts=["a cat"])
    return load_recipe(["fast", name] if kind == "concept" else name, BRIEF)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("toys")
    return {name: load_toy(save_toy(name, folder / name)) for name in sorted(set(TOY_OF.values()))}


def test_nothing_is_left_out() -> None:
    assert len(KINDS) == 42
    assert len(COMPOSED) == 81
    assert sorted(EVERY_SCOPE) == [(base, scope) for base in recipe_bases() for scope in ("noxattn", "xattn")]
    assert {complete(name).base for name in [*KINDS, *EVERY_SCOPE.values()]} == TOY_OF.keys()


@pytest.mark.parametrize("name", [*KINDS, *EVERY_SCOPE.values()])
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


@pytest.mark.parametrize("base", recipe_bases())
def test_stated_sizes_are_so(base: str) -> None:
    """`BASE/fast` states the size of an eraser for every scope that a concept has."""
    stated = re.search(
        r"^# At rank (\d+) an eraser takes ([\d.]+) MB for (\S+) \(.+\) and ([\d.]+) MB for (\S+) \(.+\)\.$",
        recipe_text(f"{base}/fast"),
        re.MULTILINE,
    )
    assert stated
    rank, *sizes = stated.groups()
    recipe, model = load_recipe(f"{base}/fast", concepts=["a cat"]), DENOISER_OF[base]
    assert TOY_OF[recipe.base].split("-")[0] == DENOISERS[model][0]
    assert (recipe.lora.rank, recipe.lora.ranks, recipe.lora.conv_rank) == (int(rank), {}, None)
    assert {scope for folder, scope in EVERY_SCOPE if folder == base} == set(sizes[1::2])
    for size, scope in zip(sizes[::2], sizes[1::2], strict=True):
        assert f"{bytes_of(model, scope, int(rank)) / 1e6:.1f}" == size
