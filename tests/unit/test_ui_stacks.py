"""The command lines of stacks and merges, and what is told of a stack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esd_lora.cli.options import ERASER
from esd_lora.erasers.header import Distillation, Fusion
from esd_lora.erasers.stacking import stack
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.files import fresh_output
from esd_lora.ui.stacks import (
    Weighted,
    check_weighted,
    describe_merged,
    describe_stack,
    export_for_others,
    interference,
    losses,
    merge_command,
    merged_name,
    output_name,
    stack_command,
)
from random_erasers import eraser_on, random_eraser
from tiny import tiny_pipeline

CAT, DOG = Weighted("no-cat"), Weighted("own/no dog", -0.25)
RANKS = {"mid.attn2.to_k": 2, "conv": 1}


@pytest.fixture
def cat(tmp_path: Path) -> Weighted:
    return Weighted(str(random_eraser(RANKS, "a cat", dtype=torch.float32).save(tmp_path / "cat")))


@pytest.fixture
def hat(tmp_path: Path) -> Weighted:
    return Weighted(str(random_eraser(RANKS, "a <hat>", seed=1, dtype=torch.float32).save(tmp_path / "hat")), 0.5)


def test_command_takes_erasers_with_their_strengths() -> None:
    assert [ERASER.convert(each.argument(), None, None) for each in (CAT, DOG)] == [
        ("no-cat", 1, {}),
        ("own/no dog", -0.25, {}),
    ]


@pytest.mark.parametrize(
    ("how", "options", "rest"),
    [
        ("sum", {}, ["--fuse=sum"]),
        ("closed form", {}, ["--base=emoji"]),
        ("closed form", {"rank": 4, "energy": 0.99}, ["--base=emoji", "--rank=4", "--energy=0.99"]),
        ("harmonise", {"rank": 8}, ["--base=emoji", "--harmonise", "--rank=8"]),
    ],
)
def test_stack_command(how: str, options: dict[str, float], rest: list[str]) -> None:
    command = stack_command([CAT, DOG], how, "emoji", Path("both"), **options)  # type: ignore[arg-type]
    assert command == ["stack", "no-cat:1", "own/no dog:-0.25", *rest, "--out=both"]


def test_merge_command_proves_what_it_made() -> None:
    assert merge_command([CAT], "model.safetensors", Path("m")) == [
        *["merge", "no-cat:1", "--base=model.safetensors", "--verify", "--out=m"]
    ]
    assert (
        merged_name("free", "/x/sd15.safetensors") == merged_name("free.safetensors", "sd15.safetensors") == "free.safetensors"
    )
    assert merged_name("free", "emoji") == "free"


@pytest.mark.parametrize(
    ("erasers", "least", "words"),
    [
        ([], 1, "no erasers chosen: choose 1 or more"),
        ([CAT], 2, "1 eraser chosen: choose 2 or more"),
        ([CAT, CAT._replace(weight=0.5)], 1, "no-cat is chosen twice"),
        ([Weighted("--force")], 1, "--force is no eraser"),
        ([CAT._replace(weight=float("nan"))], 1, "the strength of no-cat is no number"),
    ],
)
def test_choices_that_no_command_takes(erasers: list[Weighted], least: int, words: str) -> None:
    with pytest.raises(EsdLoraError, match=words):
        check_weighted(erasers, least)


def test_what_needs_a_base_says_so() -> None:
    with pytest.raises(EsdLoraError, match="choose the base of the erasers"):
        stack_command([CAT, DOG], "closed form", "", Path("x"))
    with pytest.raises(EsdLoraError, match="nothing to merge into"):
        merge_command([CAT], "", Path("x"))
    with pytest.raises(EsdLoraError, match="harmonising takes a rank alone"):
        stack_command([CAT, DOG], "harmonise", "emoji", Path("x"), energy=0.99)


def test_interference_of_files_alone(cat: Weighted, hat: Weighted) -> None:
    html = interference([cat, hat])
    assert [part.partition("<")[0] for part in html.split("<caption>")[1:]] == [
        "Read overlap",
        "Write overlap",
        "Cosine of updates",
    ]
    assert "<hat>" not in html
    assert "a &lt;hat&gt;" in html
    with pytest.raises(EsdLoraError, match="choose 2 or more"):
        interference([cat])


def test_description_of_a_sum(cat: Weighted, hat: Weighted, tmp_path: Path) -> None:
    html = describe_stack(cat.place)
    assert "<dt>Erases</dt><dd>a cat</dd>" in html
    assert "<dt>Layers</dt><dd>2, ranks 1 to 2</dd>" in html
    assert "What is lost" not in html
    from esd_lora.erasers.manifests import load_eraser

    both = stack([load_eraser(cat.place), load_eraser(hat.place)], [1, 0.5])
    html = describe_stack(str(both.save(tmp_path / "both")))
    assert "<dt>Erases</dt><dd>a cat, a &lt;hat&gt; (at strength 0.5)</dd>" in html
    assert "<dd>2, ranks 2 to 4</dd>" in html
    assert "a plain sum: each does all that it did" in html
    assert output_name([cat, hat]) == "no-cat-hat"


def test_names_that_are_taken_get_a_number(tmp_path: Path) -> None:
    for name in ("no-cat", "m.safetensors", "m-2.safetensors", "xl-1.0"):
        (tmp_path / name).touch()
    assert fresh_output(tmp_path / "no-dog").name == "no-dog"
    assert fresh_output(tmp_path / "no-cat").name == "no-cat-2"
    assert fresh_output(tmp_path / "m.safetensors").name == "m-3.safetensors"
    assert fresh_output(tmp_path / "xl-1.0").name == "xl-1.0-2"


def test_what_was_checked_of_a_merge() -> None:
    log = "merged pipeline: m\nverified: 64 tensors are base + update to within rounding, 622 others are bit-equal\n"
    html = describe_merged("/w/m", log)
    assert '<dt>64 tensors that erasers change</dt><dd class="good">' in html
    assert "<dt>622 other tensors</dt>" in html
    assert "byte for byte" in html
    assert "byte for byte" not in describe_merged("/w/m.safetensors", log)
    assert "no: the log does not say so" in describe_merged("/w/m", "verified: nothing")


def test_file_for_other_programs(tmp_path: Path) -> None:
    base = tiny_pipeline().unet
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    eraser = eraser_on(base, [module], "a cat")
    file = export_for_others(str(eraser.save(tmp_path / "cat")), tmp_path)
    assert file == tmp_path / "kohya" / "no-cat.safetensors"
    assert any(name.endswith("attn2_to_k.lora_down.weight") for name in read_header(file).tensors)
    assert export_for_others(str(tmp_path / "cat"), tmp_path) == file  # again, over itself


def test_losses_of_what_was_fused_and_harmonised() -> None:
    one = random_eraser(RANKS, "a cat")
    fields = {
        "members": ("a", "b"),
        "dropped": ("a cat in ink",),
        "keep_trajectories": 1,
        "guidance": 3.0,
        "evaluations": 1,
        "seconds": 1.0,
    }
    fusion = Fusion(
        **fields, lam=0.3, mu=0.03, kept=9, kept_sha256="", trajectories=1, steps=4, seed=0, rank=None, energy=None,
        objective=0.125, objective_summed=0.5,
    )  # fmt: skip
    fused = losses(type(one)(one.pairs, one.header.model_copy(update={"fusions": (fusion,), "truncation": 0.0123})))
    assert fused == {
        "What is lost": "it misses 12% of what no eraser at all would; their plain sum 50%",
        "Not kept, as it names what is erased": "a cat in ink",
        "Cut off by lower ranks": "1.23% of the update",
    }
    spent = Distillation(**fields, steps=9, trajectories=(1, 1), trajectory_steps=2, first_loss=0.5, last_loss=0.05)
    harmonised = losses(type(one)(one.pairs, one.header.model_copy(update={"fusions": (fusion,), "distillations": (spent,)})))
    assert harmonised["What is lost"] == "by the end of distilling it missed 10% of what it missed at the start"
