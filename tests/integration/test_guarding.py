"""Guarded prompts: their text is left exactly alone, by a closed form, by training, in stacks and in fused ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import stack
from esd_lora.errors import EsdLoraError
from esd_lora.formats.inspecting import inspect_file
from esd_lora.fusing.closed_form import fuse
from esd_lora.fusing.harmonising import harmonise
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train
from tiny import tiny_recipe

LITTLE = {"train.trajectories": 2, "train.preserve_trajectories": 2, "train.trajectory_steps": 3, "train.preview_every": 0}
FEW = {"trajectories": 1, "steps": 2, "progress": False}


@pytest.fixture(scope="module")
def emoji() -> Base:
    return load_base("emoji")


def erase(base: Base, name: str, guard: tuple[str, ...], steps: int = 2, **settings: Any) -> Eraser:
    numbers = {"train.steps": steps, "train.lr": 0.01, "train.preserve_weight": 1.0, "eta": 1.0}
    recipe = load_recipe("fast", {**LITTLE, **numbers, **settings}, concepts=[f"a {name}"], guard=guard)
    return train(recipe, base=base, progress=False)


@pytest.fixture(scope="module")
def cat(emoji: Base) -> Eraser:
    return erase(emoji, "cat", ("a dog", "a key"))


@pytest.fixture(scope="module")
def car(emoji: Base) -> Eraser:
    return erase(emoji, "car", ("a bus", "a dog"))


def touched(base: Base, eraser: Eraser, prompt: str) -> float:
    """Return the largest |dW r| of all layers that read text and all rows of a prompt, in units of |dW| |r|."""
    rows = base.encode([prompt])["prompt_embeds"][0].double()
    return max(
        float((rows @ pair.delta().double().T).norm(dim=1).max() / (pair.delta().double().norm() * rows.norm(dim=1).min()))
        for path, pair in eraser.pairs.items()
        if base.family.reads_text(path) and pair.up.any()
    )


def test_training_touches_no_row_of_a_guarded_prompt(emoji: Base, cat: Eraser) -> None:
    assert cat.header.cost["steps"] == 2
    for prompt in ("a dog", "a key"):
        assert touched(emoji, cat, prompt) < 1e-6
    assert touched(emoji, cat, "a fox") > 1e-3
    assert touched(emoji, cat, "a cat") > 1e-2
    assert touched(emoji, erase(emoji, "cat", ()), "a dog") > 1e-4, "nothing else keeps it so"


def test_closed_form_alone_leaves_predictions_for_a_guarded_prompt_alone(emoji: Base) -> None:
    """All the layers of `xattn-kv` read text, so what the model draws is the same."""
    eraser = erase(emoji, "cat", ("a dog",), steps=0, scope="xattn-kv")
    prompts = ["a dog", "", "a cat"]
    x_t = torch.randn(1, *emoji.latent_shape(), generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    t, condition = torch.full((3,), 500), emoji.encode(prompts)
    with torch.no_grad():
        before = emoji.predict(x_t, t, condition)
        with applied(emoji, [eraser]):
            moved = (emoji.predict(x_t, t, condition) - before).flatten(1).norm(dim=1)
    assert float(moved[0]) < 1e-4 * float(moved[2])
    assert eraser.header.solved[0].left < 0.6, "the cat is on its way all the same"


def test_guarded_prompts_are_preserved_and_written_down(cat: Eraser, tmp_path: Path) -> None:
    assert cat.header.guard == ("a dog", "a key")
    assert {"a dog", "a key"} <= set(cat.header.preserve)
    saved = cat.save(tmp_path / "cat")
    assert "guards" in "\n".join(inspect_file(saved).lines())
    assert "guards" not in "\n".join(
        inspect_file(Eraser(cat.pairs, cat.header.model_copy(update={"guard": ()})).save(saved)).lines()
    )


def test_guarded_prompts_choose_themselves(emoji: Base, capfd: pytest.CaptureFixture[str]) -> None:
    """The header names them, the recipe says how many."""
    recipe = load_recipe("instant", concepts=["a cat"], guard=2)
    eraser = train(recipe, base=emoji)
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("guarded: "))
    assert line == f"guarded: {', '.join(map(repr, eraser.header.guard))}"
    assert len(eraser.header.guard) == 2
    assert eraser.header.recipes[0].guard == 2
    assert {*eraser.header.guard} <= {*emoji.keep}
    for prompt in eraser.header.guard:
        assert touched(emoji, eraser, prompt) < 1e-6


def test_stacks_leave_alone_what_all_members_guard(emoji: Base, cat: Eraser, car: Eraser) -> None:
    both = stack([cat, car], [1.0, 0.5])
    assert both.header.guard == ("a dog",)
    fused = fuse([cat, car], emoji, keep=["a fox", "a key"], rank=3, keep_trajectories=2, **FEW)
    few = {"steps": 2, "trajectories": 1, "keep_trajectories": 2, "trajectory_steps": 2, "progress": False}
    for each in (both, fused, harmonise([cat, car], emoji, keep=["a fox", "a key"], **few)):
        assert touched(emoji, each, "a dog") < 1e-6
        assert touched(emoji, each, "a key") > 1e-5, "one member alone guards it"


def test_guard_that_cannot_be(emoji: Base, tiny_dir: Path) -> None:
    with pytest.raises(EsdLoraError, match="guard holds 'a cat in a hat', which names 'a cat'"):
        erase(emoji, "cat", ("a cat in a hat",))
    recipe = tiny_recipe(tiny_dir).model_copy(update={"guard": ("a dog",)})
    with pytest.raises(
        EsdLoraError, match=r"1 guarded prompts take \d+ of the 16 directions .* all that 'a cat' has\. Guard fewer"
    ):
        train(recipe, progress=False)


def test_guard_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "no-cat"
    given = ["train", "instant", "--concept", "a cat", "--guard", "a dog", "--guard", "a key", "-o", out]
    result = CliRunner().invoke(main, [str(each) for each in given])
    assert result.exit_code == 0, result.output
    assert Eraser.load(out).header.guard == ("a dog", "a key")
