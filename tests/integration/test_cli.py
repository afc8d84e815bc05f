"""The command line at toy size: every command, and every mistake a user can make."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from esd_lora import __version__, training
from esd_lora.built_in import keep_prompts
from esd_lora.cli import main, stacks
from esd_lora.cli.commands import HeavyCommand
from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.erasers.header import FORMAT
from esd_lora.formats.exporting import kohya_tensors
from esd_lora.recipe_files import (
    load_fuse_spec,
    load_harmonise_spec,
    load_recipe,
    recipe_text,
    recipe_title,
    recipes_by_kind,
    recipes_dir,
)
from esd_lora.watching import StepReport
from esd_lora.weights import verifying
from original_checkpoints import save_checkpoint
from tiny import save_tiny, tiny_pipeline, tiny_unet

# A training of a moment: two steps on two short trajectories.
QUICK = {"steps": 2, "trajectories": 2, "trajectory_steps": 2, "preserve_trajectories": 1, "preview_every": 0, "lr": 1e-3}
SETTINGS = [part for key, value in QUICK.items() for part in ("-s", f"train.{key}={value}")]
ESD_LORA = str(Path(sys.executable).with_name("esd-lora"))


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def good(*args: object) -> str:
    """What a command that succeeds prints."""
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def bad(*args: object) -> str:
    """The error of a command that fails as a user's mistake should."""
    result = invoke(*args)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    return result.stderr


def bad_sentence(*args: object) -> str:
    """The same, of one line."""
    message = bad(*args)
    assert message.count("\n") == 1
    assert message.endswith(".\n")
    assert "?." not in message
    return message


def test_help_imports_little() -> None:
    """The models of recipes and requests take as long to import as all of the rest."""
    script = "import sys; from esd_lora.cli import main; print(*sys.modules)"
    modules = set(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split())
    assert "esd_lora.cli.making" in modules
    assert not modules & {"torch", "numpy", "esd_lora.recipe", "esd_lora.fleet.request"}


def test_train(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "no-cat"
    said = good(
        "train", "--concept", "a cat", "--concept", "a hat", "--base", tiny_dir, "--scope", "xattn-kv", *SETTINGS, "-o", out
    )
    assert said.startswith("erased a cat, a hat in ")
    assert said.endswith(f"{out}\n")
    assert said.count("\n") == 1
    (recipe,) = Eraser.load(out).header.recipes
    quick = {f"train.{key}": value for key, value in QUICK.items()}
    assert recipe == load_recipe("fast", quick, base=str(tiny_dir), concepts=["a cat", "a hat"], scope="xattn-kv")
    anchors = {concept.pairs[0][1] for concept in Eraser.load(out).header.concepts}
    assert anchors <= set(keep_prompts("package"))


def test_train_from_a_file(tiny_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"extends": "paper", "base": str(tiny_dir), "concepts": ["a cat"], "train": {"steps": 9}}))
    good("train", file, "-s", "train.steps=1", "-s", "train.lr=1e-3", "-s", "train.trajectory_steps=2", "-o", tmp_path / "out")
    recipe = Eraser.load(tmp_path / "out").header.recipes[0]
    assert (recipe.train.steps, recipe.train.lr, recipe.train.x_t_from) == (1, 1e-3, "student")


@pytest.mark.parametrize(
    ("options", "eta", "said"),
    [
        ([], 1.0, "negative guidance 2, measured from the concept, is eta 1"),
        (["--anchor", ""], 1.0, "negative guidance 2, measured from the concept, is eta 1"),
        (["--erase-from", "a man with a cat"], 2.0, "measured from the prompt it is erased from, is eta 2"),
        (["--erase-from", "a man", "--anchor", "a man"], 2.0, "measured from the prompt it is erased from, is eta 2"),
    ],
)
def test_negative_guidance_is_converted_and_says_so(
    tiny_dir: Path, tmp_path: Path, options: list[str], eta: float, said: str
) -> None:
    """concept - 2 (concept - null) of the authors' scripts is null - 1 (concept - null)."""
    out = tmp_path / "out"
    train = ["train", "--concept", "a cat", "--base", tiny_dir, *SETTINGS, "-o", out]
    assert said in good(*train, "--negative-guidance", "2", *options)
    (recipe,) = Eraser.load(out).header.recipes
    assert recipe.eta == eta


@pytest.mark.parametrize(
    "command",
    [
        ["--concept", "a cat", "--anchor", "a dog"],
        ["--concept", "a cat", "--anchor", "a dog", "--erase-from", "a man with a cat"],
        ["--concept", "a cat", "--anchor", "", "--erase-from", "a man with a cat"],
        ["concepts/van-gogh"],
    ],
    ids=["anchor", "anchor and prompt to erase from", "empty anchor and prompt to erase from", "anchors of a recipe"],
)
def test_negative_guidance_knows_no_anchor(tiny_dir: Path, tmp_path: Path, command: list[str]) -> None:
    preset = [] if command[0] == "--concept" else ["fast"]
    out = tmp_path / "out"
    message = bad_sentence("train", *preset, *command, "--base", tiny_dir, "--negative-guidance", 2, *SETTINGS, "-o", out)
    assert "negative guidance 2: ESD's scripts know no anchor" in message
    assert "-s eta=" in message
    assert not out.exists()


def test_concept_replaced_by_another(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good("train", "replace", "--concept", "a cat", "--anchor", "a dog", "--base", tiny_dir, *SETTINGS, "-o", out)
    header = Eraser.load(out).header
    assert header.concepts[0].pairs[0] == ("a cat", "a dog")
    assert header.concepts[0].pairs[1] == ("a photo of a cat", "a photo of a dog")
    assert header.recipes[0].eta == 0


def test_single_file_base(tmp_path: Path) -> None:
    folder, out = save_tiny(tmp_path / "tiny"), tmp_path / "out"
    file = save_checkpoint(tiny_pipeline(), tmp_path / "model.safetensors")
    base = ["--base", file, "--base-config", folder]
    good("train", "--concept", "a cat", *base, *SETTINGS, "-s", "preserve=[]", "-o", out)
    assert Eraser.load(out).header.base == str(file)
    good("generate", "a cat", *base, "--eraser", out, "-o", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "000_seed0.png").is_file()


def test_interrupted_and_resumed_train(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(out: str, *more: str) -> list[object]:
        return [
            "train",
            "--concept",
            "a cat",
            "--base",
            tiny_dir,
            *SETTINGS,
            "-s",
            "train.steps=3",
            "-o",
            tmp_path / out,
            *more,
        ]

    def interrupt(report: StepReport) -> None:
        if report.state.step == 1:
            signal.raise_signal(signal.SIGINT)

    as_usual = training.watchers_for
    with monkeypatch.context() as patch:
        patch.setattr(training, "watchers_for", lambda *args: [*as_usual(*args), interrupt])
        result = invoke(*command("run"))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: interrupted; go on with the same command and --resume (checkpoint in {tmp_path / 'run'})."
    )
    good(*command("run", "--resume"))
    good(*command("unbroken"))
    run, unbroken = (Eraser.load(tmp_path / name).state_dict() for name in ("run", "unbroken"))
    assert all((run[key] == unbroken[key]).all() for key in unbroken)


def test_generate_and_compare(tiny_dir: Path, tmp_path: Path, cat_dir: Path) -> None:
    out = tmp_path / "pictures"
    command = ["generate", "a cat", "a dog", "--base", tiny_dir, "--steps", 2, "-n", 2, "--seed", 5, "--guidance", 3]
    said = good(*command, "--eraser", f"{cat_dir}:0.5", "--compare", "-o", out)
    pictures = ["000_seed5.png", "000_seed6.png", "001_seed5.png", "001_seed6.png"]
    assert sorted(path.name for path in out.iterdir()) == [*pictures, "comparison.png"]
    assert "4 pictures" in said
    assert str(out) in said
    with Image.open(out / "000_seed5.png") as picture, Image.open(out / "comparison.png") as sheet:
        assert picture.size == (16, 16)
        assert sheet.width > 4 * 128
        assert sheet.height > 2 * 128
    # The weight is that of the adapter: none is the base, and one by default.
    shown = {}
    for name, eraser in {"base": [], "none": [f"{cat_dir}:0"], "half": [f"{cat_dir}:0.5"], "one": [cat_dir]}.items():
        good(*command, *(part for path in eraser for part in ("--eraser", path)), "-o", tmp_path / name)
        shown[name] = (tmp_path / name / "000_seed5.png").read_bytes()
    assert shown["none"] == shown["base"]
    assert shown["half"] == (out / "000_seed5.png").read_bytes()
    assert len(set(shown.values())) == 3


def test_generate_again_leaves_nothing_of_before(tiny_dir: Path, tmp_path: Path, cat_dir: Path) -> None:
    command = ["generate", "a cat", "--base", tiny_dir, "--steps", 1, "-o", tmp_path]
    good(*command, "--eraser", cat_dir, "--compare")
    good(*command, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["000_seed0.png"]


def test_stack_with_weights(tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    said = good("stack", f"{cat_dir}:0.5", car_dir, "-o", tmp_path / "both")
    assert said == f"stack of a cat, a car: {tmp_path / 'both'}\n"
    stacked, cat = Eraser.load(tmp_path / "both"), Eraser.load(cat_dir)
    assert [(c.name, c.weight) for c in stacked.header.concepts] == [("a cat", 0.5), ("a car", 1)]
    module = next(iter(cat.pairs))
    assert stacked.pairs[module].delta().equal(0.5 * cat.pairs[module].delta())


def test_stack_with_weights_by_block(tmp_path: Path, cat_dir: Path) -> None:
    good("stack", f"{cat_dir}:2,mid=0.5,up.1=-1", "-o", tmp_path / "out")
    good("stack", f"{cat_dir}:mid=0.5", "-o", tmp_path / "mid")
    cat, out, mid = (Eraser.load(folder) for folder in (cat_dir, tmp_path / "out", tmp_path / "mid"))
    for module, pair in cat.pairs.items():
        factors = {"mid_block": (1.0, 0.5), "up_blocks": (-2.0, 1.0)}.get(module.partition(".")[0], (2.0, 1.0))
        for eraser, factor in zip((out, mid), factors, strict=True):
            assert eraser.pairs[module].delta().equal(factor * pair.delta())
    said = good("inspect", tmp_path / "out")
    assert "weight 2, mid_block x 0.5, up_blocks.1 x -1" in said


def test_stack_that_amplifies_says_so(tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    assert "stack of a cat (amplified, weight -1), a car: " in good("stack", f"{cat_dir}:-1", car_dir, "-o", tmp_path / "out")
    assert "weight -1, amplified" in good("inspect", tmp_path / "out")
    assert "amplifies" in (tmp_path / "out" / "README.md").read_text("utf-8").lower()


@pytest.mark.filterwarnings("ignore:.* is given twice")
def test_stack_to_lower_ranks(tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    said = good("stack", cat_dir, f"{cat_dir}:0.5", "--energy", "0.999", "-o", tmp_path / "energy").splitlines()
    stacked = Eraser.load(tmp_path / "energy")
    layers = {line.split()[0]: line for line in said[:-2]}
    assert layers.keys() == stacked.pairs.keys()
    for module, line in layers.items():
        assert f"rank {stacked.pairs[module].rank} " in line
        assert float(line.split()[-1]) < 1e-3 + 0.001**0.5
        assert stacked.pairs[module].rank <= 4
    assert said[-2].startswith("relative error over all 16 layers: ")
    good("stack", cat_dir, car_dir, "--rank", "1", "-o", tmp_path / "rank")
    assert {pair.rank for pair in Eraser.load(tmp_path / "rank").pairs.values()} == {1}


def test_manifest_stands_for_its_stack(tiny_dir: Path, tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    for folder in (cat_dir, car_dir):
        shutil.copytree(folder, tmp_path / folder.name)
    file = tmp_path / "stack.yaml"
    said = good("stack", f"{tmp_path / 'cat'}:0.5", tmp_path / "car", "-o", file)
    assert said == f"stack of a cat, a car: {file}\n"
    assert "a manifest names its members as they are" in bad_sentence(
        "stack", tmp_path / "cat", "--rank", "2", "-o", tmp_path / "other.yaml"
    )
    assert "already exists" in bad_sentence("stack", tmp_path / "cat", "-o", file)
    good("stack", f"{cat_dir}:0.5", car_dir, "-o", tmp_path / "both")
    for name in ("both", "stack.yaml"):
        good(
            "generate",
            "a cat",
            "--base",
            tiny_dir,
            "--steps",
            1,
            "--eraser",
            tmp_path / name,
            "-o",
            tmp_path / f"{name} pictures",
        )
        good("merge", tmp_path / name, "--base", tiny_dir, "-o", tmp_path / f"{name} merged")
        good("export", tmp_path / name, "--layout", "kohya", "-o", tmp_path / f"{name}.safetensors")
        good("stack", tmp_path / name, cat_dir, "-o", tmp_path / f"{name} and more")
    same = ("{} pictures/000_seed0.png", "{}.safetensors", "{} and more/" + WEIGHTS_NAME)
    for path in same:
        assert (tmp_path / path.format("both")).read_bytes() == (tmp_path / path.format("stack.yaml")).read_bytes(), path
    assert "differ by 0.000%" in good("diff", tmp_path / "both", file)
    assert "weight 0.5" in good("inspect", file)


@pytest.mark.filterwarnings("ignore:.* is given twice")
def test_report_of_a_stack(tiny_dir: Path, tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    said = good("stack", cat_dir, car_dir, cat_dir, "-o", tmp_path / "out", "--fuse", "sum", "--report", "--base", tiny_dir)
    assert "read overlap" in said
    assert "changed in the stack by" in said
    found = json.loads((tmp_path / "out" / "interference.json").read_text("utf-8"))
    assert found["cosine"][0][2] == pytest.approx(1)
    assert found["shared"][0] == [16, 0, 16]
    with Image.open(tmp_path / "out" / "interference.png") as picture:
        assert picture.width > 300


def test_stack_on_a_base_is_fused(tiny_dir: Path, tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("# mine\n\na house\ntwo cats\na cat, asleep\na tree in the rain\n", "utf-8")
    fused = tmp_path / "fused"
    said = good("stack", cat_dir, f"{car_dir}:0.5", "--base", tiny_dir, "--keep", keep, "--report", "-o", fused)
    assert said.splitlines()[0] == "not kept, because they name what is erased: a cat, asleep; two cats"
    assert "fused from 2 erasers beside 4 kept prompts" in said  # two of the list, two that the members preserved
    assert " of no update's, plain sum " in said
    assert "fused from 2 erasers beside 4 kept prompts (lam 0.3, mu 0.03)" in good("inspect", fused)
    assert "- Fused from 2 erasers" in (fused / "README.md").read_text("utf-8")
    assert "changed in the stack by" in said
    (record,) = Eraser.load(fused).header.fusions
    assert (record.dropped, record.lam) == (("a cat, asleep", "two cats"), 0.3)
    plain = good("stack", cat_dir, f"{car_dir}:0.5", "-o", tmp_path / "sum")
    assert plain.startswith("stack of ")
    assert "differ by 0.000%" not in good("diff", fused, tmp_path / "sum")
    on_base = ["stack", cat_dir, car_dir, "--base", tiny_dir, "--keep", keep]
    good(*on_base, "--lam", 0.5, "--max-rank", 1, "--seed", 3, "-o", tmp_path / "chosen")
    (record,) = Eraser.load(tmp_path / "chosen").header.fusions
    assert (record.lam, record.rank, record.seed) == (0.5, 1, 3)


def test_stack_grows_and_shrinks(tiny_dir: Path, tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    keep, base = tmp_path / "keep.txt", ("--base", tiny_dir)
    keep.write_text("a house\ntwo cats\na car at night\n", "utf-8")
    one, two, rest, anew = (tmp_path / name for name in ("one", "two", "rest", "anew"))
    made = ["stack", car_dir, *base, "--keep", keep, "--keep-state", "-o", one]
    planned = re.search(r"stack.state.safetensors \(([\d.]+) MB\)", good(*made, "--dry-run"))
    printed = re.search(r"^state for --add and --remove: ([\d.]+) MB in stack.state.safetensors$", good(*made), re.MULTILINE)
    assert planned
    assert printed
    assert float(planned[1]) == pytest.approx(float(printed[1]), rel=0.05), "the names of hundreds of layers are not counted"
    output = good("stack", one, "--add", f"{cat_dir}:0.5", *base, "-o", two)
    assert output.splitlines()[0] == "not kept, because they name what is erased: a car at night; two cats"
    assert "fused from 2 erasers beside" in output
    good("stack", car_dir, f"{cat_dir}:0.5", *base, "--keep", keep, "-o", anew)
    assert "differ by 0.000%" in good("diff", two, anew)
    assert "stack of a car: " in good("stack", two, "--remove", "a cat", *base, "-o", rest)
    good("stack", two, "--remove", "a cat", "--add", f"{cat_dir}:0.5", *base, "-o", tmp_path / "same")
    assert "differ by 0.000%" in good("diff", two, tmp_path / "same")
    assert "differ by 0.000%" in good("diff", one, rest)
    assert sorted(path.name for path in rest.iterdir()) == sorted(path.name for path in one.iterdir())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    good("stack", car_dir, cat_dir, *base, "--keep", keep, "-o", one, "--force")
    assert not (one / "stack.state.safetensors").exists(), "it would be another stack's"


def test_faults_of_a_stack_that_changes(tiny_dir: Path, tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    out, base = tmp_path / "out", ("--base", tiny_dir)
    for options, expected in (
        ([cat_dir, "--keep-state"], "--keep-state goes with --fuse closed-form"),
        ([cat_dir, "--keep-state", *base, "--harmonise"], "--keep-state goes with --fuse closed-form"),
        ([cat_dir, "--add", car_dir], "--add needs --base"),
        ([cat_dir, "--add", car_dir, *base], "no stack.state.safetensors"),
        ([cat_dir, "--add", car_dir, "--remove", "a cat", *base, "--seed", 1], "--seed does not go with --add and --remove"),
        ([cat_dir, car_dir, "--remove", "a cat", *base], "--remove changes one stack"),
        ([f"{cat_dir}:0.5", "--remove", "a cat", *base], "--remove changes one stack"),
        ([cat_dir, "--remove", "a cat", *base, "--lam", 1], "--lam does not go with --remove"),
        ([cat_dir, "--remove", "a cat", *base, "--dry-run"], "--dry-run does not go with --remove"),
        ([cat_dir, "--remove", "a cat", *base, "--fuse", "sum"], "leave out --fuse sum"),
    ):
        assert expected in bad_sentence("stack", *options, "-o", out)
    assert not out.exists()


def test_stack_on_a_base_is_harmonised(tiny_dir: Path, tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    keep, out = tmp_path / "keep.txt", tmp_path / "out"
    keep.write_text("a house\ntwo cats\n", "utf-8")
    chosen = ["--harmonise", 2, "--rank", 1, "--seed", 3]
    output = good("stack", cat_dir, car_dir, "--base", tiny_dir, "--keep", keep, *chosen, "-o", out)
    assert output.splitlines()[0] == "not kept, because they name what is erased: two cats"
    assert "harmonised from 2 erasers beside 3 kept prompts on scope full at rank 1 in 4 steps: loss" in good("inspect", out)
    chosen_too = Eraser.load(out)
    assert chosen_too.header.fusions == ()
    (spent,) = chosen_too.header.distillations
    assert (spent.steps, spent.trajectories, spent.rank, spent.seed) == (4, (32, 32), 1, 3)
    assert (spent.dropped, spent.kept, len(spent.members)) == (("two cats",), 3, 2)
    assert spent.evaluations == (2 * 32 + 128) * 12 * 2 + 2 * 32 * 12 + 4 * (32 + 8)  # walked, taught, in two steps for each
    assert spent.first_loss
    assert f"{spent.evaluations} evaluations" in output
    assert {pair.rank for pair in chosen_too.pairs.values()} == {1}


@pytest.mark.slow
def test_default_keep_list_by_name(tiny_dir: Path, tmp_path: Path, cat_dir: Path) -> None:
    """`--keep default` is what happens without --keep, and the help says so."""
    command = ["stack", cat_dir, "--base", tiny_dir, "--seed", 3]
    good(*command, "-o", tmp_path / "without")
    good(*command, "--keep", "default", "-o", tmp_path / "default")
    without, named = (Eraser.load(tmp_path / name) for name in ("without", "default"))
    assert without.header.fusions[0].kept_sha256 == named.header.fusions[0].kept_sha256
    assert all(a.equal(b) for m, pair in without.pairs.items() for a, b in zip(pair, named.pairs[m], strict=True))
    assert "'default', as without it" in " ".join(good("stack", "--help").split())


def test_harmonise_without_a_number_takes_that_of_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    monkeypatch.setattr(stacks.stack, "callback", lambda **options: steps.append(options["harmonise"]))
    for options in (["--harmonise"], ["--harmonise", 7], []):
        good("stack", "x", "-o", tmp_path, *options)
    assert steps == [load_harmonise_spec().steps, 7, None]


def test_sum_without_a_base_says_what_it_costs(tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    told = invoke("stack", cat_dir, car_dir, "-o", tmp_path / "two").stderr
    assert told.startswith("warning: a plain sum of 2 erasers adds up what they cost everything else too; with --base ")
    assert invoke("stack", cat_dir, "-o", tmp_path / "one").stderr == ""


def test_faults_of_a_stack_s_options(tiny_dir: Path, tmp_path: Path, cat_dir: Path) -> None:
    out, empty = tmp_path / "out", tmp_path / "keep.txt"
    empty.write_text("# nothing\n", "utf-8")
    for options, expected in (
        (["--fuse", "closed-form"], "needs --base"),
        (["--lam", 0.2], "--lam goes with --fuse closed-form"),
        (["--keep", empty], "--keep goes with --fuse closed-form"),
        (["--fuse", "sum", "--harmonise"], "give the base of the erasers, and leave out --fuse sum"),
        (["--harmonise"], "--harmonise trains a stack on a --base"),
        (["--base", tiny_dir, "--harmonise", "--lam", 0.2], "--lam goes with the closed form, and --harmonise takes its place"),
        (["--base", tiny_dir, "--harmonise", "--energy", 0.9], "--energy goes with the closed form"),
        (["--fuse", "sum", "--base", tiny_dir], "--base has nothing to do in a sum"),
        (["--base", tiny_dir, "--keep", empty], "holds no prompt. "),
        (["--base", tiny_dir, "--keep", tmp_path / "none.txt"], "cannot be read"),
    ):
        assert expected in bad_sentence("stack", cat_dir, *options, "-o", out)
    assert not list(out.glob("*"))


def test_gated_pictures(tiny_dir: Path, tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    out, plain, always = tmp_path / "gated", tmp_path / "plain", tmp_path / "always"
    common = ["--base", tiny_dir, "--steps", 2]
    erasers = ["--eraser", cat_dir, "--eraser", f"{car_dir}:0.5"]
    good("generate", "two cats", "a house", *common, *erasers, "--gate", "--gate-threshold", 1, "-o", out)
    good("generate", "two cats", "a house", *common, "-o", plain)
    good("generate", "two cats", "a house", *common, "--eraser", cat_dir, "-o", always)

    def picture(folder: Path, number: int) -> bytes:
        return (folder / f"00{number}_seed0.png").read_bytes()

    assert picture(out, 1) == picture(plain, 1) != picture(always, 1)
    assert picture(out, 0) == picture(always, 0) != picture(plain, 0)
    told = json.loads((out / "gates.json").read_text("utf-8"))
    assert told["threshold"] == 1
    assert told["erasers"] == [["cat"], ["car"]]
    assert [said["factors"] for said in told["prompts"]] == [[1.0, 0.0], [0.0, 0.0]]
    assert "--gate needs an --eraser" in bad_sentence("generate", "a cat", *common, "--gate", "-o", tmp_path / "other")
    wrong = ["--gate-threshold", 1.5, "-o", tmp_path / "other"]
    assert "gate threshold 1.5" in bad_sentence("generate", "a cat", *common, *erasers, *wrong)


def test_path_with_a_colon_is_a_path(tmp_path: Path, cat_dir: Path) -> None:
    odd = shutil.copytree(cat_dir, tmp_path / "cat:2")
    good("stack", odd, "-o", tmp_path / "one")
    good("stack", f"{odd}:3", "-o", tmp_path / "three")
    weights = [Eraser.load(tmp_path / name).header.concepts[0].weight for name in ("one", "three")]
    assert weights == [1, 3]


def test_merge(tiny_dir: Path, tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    out = tmp_path / "merged"
    assert good("merge", cat_dir, f"{car_dir}:0.5", "--base", tiny_dir, "-o", out) == f"merged pipeline: {out}\n"
    command = ["generate", "a cat", "--steps", 2, "--base"]
    good(*command, out, "-o", tmp_path / "a")
    good(*command, tiny_dir, "-o", tmp_path / "b")
    assert (tmp_path / "a" / "000_seed0.png").read_bytes() != (tmp_path / "b" / "000_seed0.png").read_bytes()


def test_merge_of_a_single_file_and_its_proof(tmp_path: Path, cat_dir: Path) -> None:
    file = save_checkpoint(tiny_pipeline(), tmp_path / "model.safetensors")
    before = file.read_bytes()
    out = tmp_path / "merged.safetensors"
    said = good("merge", f"{cat_dir}:0.5,mid=2", "--base", file, "-o", out, "--verify").splitlines()
    assert said[0] == f"merged checkpoint: {out}"
    assert said[1].startswith("verified: 16 tensors are base + update to within rounding, ")
    assert "is the base itself" in bad_sentence("merge", cat_dir, "--base", file, "-o", file, "--force")
    assert file.read_bytes() == before


def test_proof_that_is_interrupted_leaves_what_was_merged(
    tiny_dir: Path, tmp_path: Path, cat_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verifying, "verify", interrupt)
    out = tmp_path / "merged"
    done = invoke("merge", cat_dir, "--base", tiny_dir, "-o", out, "--verify")
    assert done.exit_code == 1
    assert f"{out} is merged and whole, but not proved" in done.stderr
    assert (out / "model_index.json").exists()


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_export_and_import(tmp_path: Path, cat_dir: Path, layout: str) -> None:
    out = tmp_path / ("adapter" if layout == "peft" else "cat.safetensors")
    export = ["export", cat_dir, "--layout", layout, "-o", out]
    assert good(*export) == f"{layout} LoRA: {out}\n"
    assert "--force" in bad_sentence(*export)
    good(*export, "--force")
    assert "a cat" in good("inspect", out)
    assert good("import", out, "-o", tmp_path / "back") == f"eraser of a cat, 16 layers of family sd: {tmp_path / 'back'}\n"
    assert "the updates differ by 0.000%" in good("diff", cat_dir, tmp_path / "back")


def test_import_of_a_stranger_s_file(tmp_path: Path, cat: Eraser) -> None:
    file = tmp_path / "van gogh.safetensors"
    save_file(kohya_tensors(cat), file)
    said = good("import", file, "--family", "sd", "--concept", "Van Gogh", "--base", "owner/model", "-o", tmp_path / "out")
    assert said == f"eraser of Van Gogh, 16 layers of family sd; where it came from is not known: {tmp_path / 'out'}\n"
    assert Eraser.load(tmp_path / "out").header.base == "owner/model"
    assert "provenance unknown" in good("inspect", tmp_path / "out")
    assert "provenance unknown" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_extract(tiny_dir: Path, tmp_path: Path, cat_dir: Path) -> None:
    merged = tmp_path / "merged"
    good("merge", cat_dir, "--base", tiny_dir, "-o", merged)
    command = ["extract", "--base", tiny_dir, "--tuned", merged, "--concept", "a cat", "-o", tmp_path / "out"]
    said = good(*command, "--rank", 4).splitlines()
    assert len(said) == 16 + 2
    kept = next(line for line in said if line.startswith("energy kept over all 16 layers"))
    assert float(kept.split()[-1].rstrip("%")) > 99.99
    for module, pair in Eraser.load(cat_dir).pairs.items():
        found = Eraser.load(tmp_path / "out").pairs[module].delta()
        torch.testing.assert_close(found, pair.delta(), rtol=1e-4, atol=1e-4 * float(pair.delta().abs().max()))
    assert "# Eraser: a cat" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "--force" in bad_sentence(*command, "--rank", 4)
    result = invoke("extract", "--base", tiny_dir, "--tuned", tiny_dir, "--rank", 4, "-o", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "do not differ in any of the 83 layers they share" in result.stderr.splitlines()[-1]


def test_kohya_file_beside_the_eraser(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good("train", "--concept", "a cat", "--base", tiny_dir, *SETTINGS, "--kohya", "-o", out)
    beside = out / "kohya" / "no-cat.safetensors"
    assert "the updates differ by 0.000%" in good("diff", out, beside)
    # load_lora_weights takes a directory with one file in it.
    assert [file.name for file in out.glob("*.safetensors")] == [WEIGHTS_NAME]


def test_pictures_at_several_strengths(tiny_dir: Path, tmp_path: Path, cat_dir: Path) -> None:
    command = ["generate", "a cat", "--base", tiny_dir, "--steps", 1, "-o"]
    said = good(*command, tmp_path / "out", "--eraser", cat_dir, "--strengths=-1,0,0.5,1")
    assert said == f"1 pictures in {tmp_path / 'out'}, strengths.png among them\n"
    with Image.open(tmp_path / "out" / "strengths.png") as sheet:
        assert sheet.height > 4 * 128
    good(*command, tmp_path / "one", "--eraser", cat_dir)
    one = "000_seed0.png"
    assert (tmp_path / "out" / one).read_bytes() == (tmp_path / "one" / one).read_bytes()


def test_inspect(tiny_dir: Path, cat_dir: Path) -> None:
    said = good("inspect", cat_dir)
    for fact in (
        f"a cat (eta {Eraser.load(cat_dir).header.concepts[0].eta:g}, weight 1)",
        str(tiny_dir),
        "family sd",
        "epsilon",
        "xattn: 16 layers, rank 4",
        "steps 4",
        f"format {FORMAT}",
        "█",
    ):
        assert fact in said


def test_inspect_as_json(cat_dir: Path) -> None:
    found = json.loads(good("inspect", cat_dir / WEIGHTS_NAME, "--json"))
    eraser = Eraser.load(cat_dir)
    assert found["header"] == eraser.header.model_dump(mode="json")
    for module, pair in eraser.pairs.items():
        facts = found["layers"][module]
        assert (facts["rank"], facts["shape"]) == (4, list(pair.shape))
        assert facts["norm"] == pytest.approx(float(pair.delta().norm()), rel=1e-5)
    assert found["sha256"] == hashlib.sha256((cat_dir / WEIGHTS_NAME).read_bytes()).hexdigest()
    assert found["size"] == (cat_dir / WEIGHTS_NAME).stat().st_size


def test_recipes_list_says_what_each_is() -> None:
    lines = good("recipes", "list").splitlines()
    heads = [line for line in lines if not line.startswith("  ")]
    assert [head.split()[0].rstrip(":") for head in heads] == ["presets", "concepts", "recipes", "how", "how"]
    listed = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    composed = [f"{base}/CONCEPT" for base in ("flux", "sd", "sdxl")]
    kinds = recipes_by_kind()
    expected = [*kinds["preset"], *kinds["concept"], *kinds["recipe"], *composed, "fuse", "harmonise"]
    assert list(listed) == expected
    for name in composed:
        base = name.partition("/")[0]
        assert listed.pop(name) == f"{base}/fast with any of the concepts: {base}/van-gogh"
    for name, described in listed.items():
        assert len(described) > 20, name
        assert recipe_text(name).startswith(f"# {described}\n")


def test_recipes_show() -> None:
    assert good("recipes", "show", "paper") == (recipes_dir() / "paper.yaml").read_text("utf-8")
    assert good("recipes", "show", "sdxl/van-gogh").splitlines() == [
        "# Erases Van Gogh from stabilityai/stable-diffusion-xl-base-1.0: scope xattn, eta auto, steps auto.",
        f"# {recipe_title('sdxl/fast')}",
        f"# {recipe_title('concepts/van-gogh')}",
        "extends: [sdxl/fast, concepts/van-gogh]",
    ]


def test_recipes_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert good("recipes", "copy", "fast") == "recipe: fast.yaml\n"
    assert (tmp_path / "fast.yaml").read_text("utf-8") == recipe_text("fast")
    assert "already exists" in bad_sentence("recipes", "copy", "paper", "-o", "fast.yaml")
    good("recipes", "copy", "paper", "-o", "fast.yaml", "--force")
    assert (tmp_path / "fast.yaml").read_text("utf-8") == recipe_text("paper")
    assert good("recipes", "copy", "sd/van-gogh") == "recipe: van-gogh.yaml\n"
    assert load_recipe("van-gogh.yaml") == load_recipe("sd/van-gogh")


def test_recipes_check(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("extends: fast\nconcepts: [a cat, a hat]\n")
    said = good("recipes", "check", "fast", file).splitlines()
    assert said[0].startswith("fast: good")
    assert said[1] == f"{file}: good, erases a cat, a hat"
    assert good("recipes", "check", "sd/van-gogh", "concepts/tench", "fuse", "harmonise").splitlines() == [
        "sd/van-gogh: good, erases Van Gogh",
        "concepts/tench: good, a concept, give it a preset",
        "fuse: good, says how to fuse a stack",
        "harmonise: good, says how to harmonise a stack",
    ]


def test_recipes_check_resolved(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("extends: fast\nconcepts: [a cat]\n")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(good("recipes", "check", file, "-s", "eta=2", "--resolved"))
    assert load_recipe(resolved) == load_recipe(file, {"eta": 2})
    resolved.write_text(good("recipes", "check", "fuse", "-s", "lam=0.7", "--resolved"))
    assert load_fuse_spec(resolved) == load_fuse_spec(lam=0.7)


def test_version_and_help() -> None:
    assert __version__ in good("--version")
    said = good("-h")
    commands = "train generate stack merge inspect diff export import extract recipes demo"
    for command in commands.split():
        assert f"\n  {command} " in said


@pytest.mark.parametrize("command", ["tarin", "recipe"])
def test_unknown_command(command: str) -> None:
    assert f"no command '{command}' (did you mean" in bad_sentence(command)


# The user's mistakes. {placeholders} are filled in by the test.
TRAIN = "train --concept cat --base {tiny} -o {out}"
MISTAKES = {
    "unknown base": ("train --concept cat --base emojy -o {out}", "did you mean 'emoji'?"),
    "unknown base to paint with": ("generate cat --base emojy -o {out}", "did you mean 'emoji'?"),
    "unknown base to merge into": ("merge {cat} --base emojy -o {out}", "'emojy'"),
    "base that is a pickle": ("train --concept cat --base {pickle} -o {out}", ".safetensors"),
    "base that is a damaged file": ("train --concept cat --base {cut} -o {out}", "damaged"),
    "base that is a pickle, to paint with": ("generate cat --base {pickle} -o {out}", ".safetensors"),
    "base that is no pipeline": ("train --concept cat --base {empty} -o {out}", "model_index.json"),
    "nothing to erase": ("train -o {out}", "--concept"),
    "scope without a layer": ("train --concept cat --base {plain} -o {out}", "Scopes with layers here: noxattn, full."),
    "code that is no module and name": (f"{TRAIN} --resume --allow-code os.nothing", "such as my_module:my_objective"),
    "unknown device": (f"{TRAIN} --device cude", "did you mean 'cuda'?"),
    "unknown dtype": (f"{TRAIN} --dtype float17", "did you mean 'float16'?"),
    "unknown tracker": (f"{TRAIN} --track tensorbord", "did you mean 'tensorboard'?"),
    "regular expression without a layer": (f"{TRAIN} --scope re:nothing$", "down_blocks.N.resnets.N.conv1"),
    "optimizer that is not installed": (f"{TRAIN} -s train.optimizer=adamw8bit", "pip install '.[8bit]'"),
    "optimizer's argument": (f"{TRAIN} -s train.optimizer_args={{{{momentum:1}}}}", "does not take"),
    "anchor without a concept": ("train fast --anchor dog -o {out}", "--concept"),
    "preserve names the concept": (f"{TRAIN} -s preserve=[cat]", "preserve"),
    "setting without a value": (f"{TRAIN} -s train.steps", "key=value"),
    "setting that is no YAML": (f"{TRAIN} -s preserve=[cat", "-s preserve=[cat"),
    "unknown recipe": ("train fsat -o {out}", "did you mean 'fast'?"),
    "recipe that is no YAML": ("train {text} -o {out}", "not valid YAML"),
    "recipe that is binary": ("train {damaged} -o {out}", "cannot be read as a recipe"),
    "nothing to resume": (f"{TRAIN} --resume", "Train without --resume"),
    "existing output of train": ("train --concept cat --base {tiny} -o {full}", "--force"),
    "existing output of generate": ("generate cat --base {tiny} -o {full}", "--force"),
    "existing output of stack": ("stack {cat} -o {full}", "--force"),
    "existing output of merge": ("merge {cat} --base {tiny} -o {full}", "--force"),
    "merge into the base": ("merge {cat} --base {tiny} -o {tiny} --force", "inside the base"),
    "output that is a file": ("stack {cat} -o {text}", "file"),
    "output below a file": ("stack {cat} -o {text}/x", "file"),
    "unknown recipe to show": ("recipes show fsat", "did you mean 'fast'?"),
    "unknown recipe to copy": ("recipes copy fsat", "did you mean 'fast'?"),
    "unknown recipe to check": ("recipes check fsat", "did you mean 'fast'?"),
    "missing eraser to inspect": ("inspect {out}", "no eraser"),
    "missing eraser to paint with": ("generate cat --base {tiny} --eraser {out} -o {out}", "no eraser"),
    "damaged eraser to inspect": ("inspect {damaged}", "damaged"),
    "damaged eraser to paint with": ("generate cat --base {tiny} --eraser {damaged} -o {out}", "damaged"),
    "damaged eraser to stack": ("stack {cat} {damaged} -o {out}", "damaged"),
    "damaged eraser to merge": ("merge {damaged} --base {tiny} -o {out}", "damaged"),
    "weight that is no number": ("stack {cat}:nan -o {out}", "nan"),
    "second weight": ("stack {cat}:1,2 -o {out}", "BLOCK=FACTOR"),
    "block without a layer": ("stack {cat}:1,mad=0 -o {out}", "has no layer in 'mad'"),
    "rank and share that cannot be": ("stack {cat} --energy 0 -o {out}", "a share above 0"),
    "strengths that are no numbers": ("generate cat --base {tiny} --eraser {cat} --strengths 0,x -o {out}", "'0,x'"),
    "gate that is always open": ("generate cat --base {tiny} --eraser {cat} --gate-threshold 0 -o {out}", "gate threshold 0: "),
    "gate of nothing": ("generate cat --base {tiny} --gate-threshold 0 -o {out}", "--eraser"),
    "strengths of nothing": ("generate cat --base {tiny} --strengths 0,1 -o {out}", "--eraser"),
    "missing manifest": ("stack {out}.yaml -o {out}", "no eraser at {out}.yaml"),
    "unknown layout": ("export {cat} --layout koyha -o {out}.safetensors", "did you mean 'kohya'?"),
    "export under another name": ("export {cat} --layout kohya -o {out}.ckpt", "ends in .safetensors"),
    "missing file to import": ("import {out}.safetensors -o {out}", "no LoRA at"),
    "checkpoint to import": ("import {cut} -o {out}", "damaged"),
    "unknown family": ("import {foreign} --family sdlx -o {out}", "did you mean 'sdxl'?"),
    "what an eraser knows of itself": ("import {cat} --family sd -o {out}", "leave out what you say"),
    "existing output of import": ("import {cat} -o {full}", "--force"),
    "extract without a rank": ("extract --base {tiny} --tuned {tiny} -o {out}", "a rank or a share of energy"),
    "extract from another base": ("extract --base {tiny} --tuned {cut} --rank 4 -o {out}", "damaged"),
    "missing file to compare": ("diff {cat} {out}", "no eraser"),
    "binary recipe to show": ("recipes show {damaged}", "cannot be read as a recipe"),
    "binary recipe to copy": ("recipes copy {damaged} -o {out}.yaml", "cannot be read as a recipe"),
    "directory to show": ("recipes show {empty}", "no recipe"),
    "recipe copied over a directory": ("recipes copy fast -o {full} --force", "directory"),
    "directory as a suite": ("evaluate --base {tiny} --suite {empty} -o {out}", "no suite"),
    "directory as prompts": ("evaluate --base {tiny} --suite nudity --prompts {empty} -o {out}", "cannot be read"),
    "file as pictures": ("evaluate --suite emoji-object --score-only {text} -o {out}", "no directories"),
    "directory as a list of prompts": ("stack {cat} --base {tiny} --keep {empty} -o {out}", "cannot be read"),
    "directory as an eraser": ("inspect {empty}", "no eraser"),
    "file as a folder to list": ("catalog --no-cache {text}", "no folder"),
    "text as an eraser": ("stack {text} -o {out}", "damaged"),
    "output that is an input of merge": ("merge {cat} --base {foreign} -o {foreign} --force", "LoRA"),
    "output of evaluate that is a file": ("evaluate --base {tiny} --suite emoji-object --concept cat -o {text}", "file"),
    "output of generate that is a file": ("generate cat --base {tiny} -o {text}", "is a file"),
    "output of export that is a directory": ("export {cat} --layout kohya -o {dir} --force", "is a directory, expected a file"),
    "directory merged into a file": ("merge {cat} --base {tiny} -o {out}.safetensors", "diffusers directory"),
}


@pytest.fixture(scope="module")
def places(tiny_dir: Path, cat: Eraser, cat_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the mistakes are made with. Read only."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "dir.safetensors").mkdir()
    (folder / "full" / "thesis.tex").write_text("years of work")
    (folder / "damaged").write_bytes(b"\xff\xfe\x00 half a file")
    (folder / "text").write_text("concepts: [cat\n")
    (folder / "model.ckpt").write_bytes(b"PK")
    (folder / "cut.safetensors").write_bytes(b"\xff" * 20)
    save_file(kohya_tensors(cat), folder / "foreign.safetensors")
    plain = tiny_pipeline()
    plain.register_modules(
        unet=tiny_unet(
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            mid_block_type=None,
            cross_attention_dim=16,
        )
    )
    plain.save_pretrained(folder / "plain")
    places = {path.name: path for path in folder.iterdir()}
    files = {path.stem: path for path in folder.glob("*.safetensors")} | {"pickle": folder / "model.ckpt"}
    return {"tiny": tiny_dir, "cat": cat_dir, **places, **files}


@pytest.mark.parametrize(("command", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_told_in_a_sentence(places: dict[str, Path], tmp_path: Path, command: str, said: str) -> None:
    named = {**places, "out": tmp_path / "out"}
    before = {path: path.read_bytes() for path in places["full"].iterdir()}
    message = bad_sentence(*(word.format(**named) for word in command.split()))
    assert said.format(**named) in message
    assert {path: path.read_bytes() for path in places["full"].iterdir()} == before


def test_faults_of_a_recipe_come_all_at_once(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("extends: fast\nconcepts: [cat]\nscop: full\nlora: {rank: 0}\n")
    for command in (["train", file, "-o", tmp_path / "out"], ["recipes", "check", file]):
        lines = bad(*command).splitlines()
        assert [line.strip().rsplit(": ", 1)[0].split(" ")[0] for line in lines[1:]] == [f"{file}:4:", f"{file}:3:"]
        assert "did you mean 'scope'?" in lines[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scope", "xatn"], "given: scope: unknown scope (did you mean 'xattn'?)"),
        (["-s", "scope=xatn"], "--set: scope: unknown scope (did you mean 'xattn'?)"),
        (["--scope", "re:("], "scope: not a regular expression"),
        (["-s", "objective=edd"], "--set: objective: unknown objective 'edd' (did you mean 'esd'?)"),
        (["-s", "train.optimizer=adm"], "--set: train.optimizer: unknown optimizer 'adm' (did you mean 'adam'?)"),
        (["-s", "objective=os:system"], "--set: objective: objective 'os:system' is code, which no file runs by itself"),
        (["-s", "train.aspects=[wide]"], "--set: train.aspects.0: expected width:height"),
        (["-s", "lora.use_dora=true"], "lora: DoRA rescales whole weights"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_fault_of_an_option(tiny_dir: Path, tmp_path: Path, options: list[str], said: str) -> None:
    assert said in bad("train", "--concept", "cat", "--base", tiny_dir, *options, "-o", tmp_path / "out")


def test_fault_of_a_setting(tiny_dir: Path, tmp_path: Path) -> None:
    message = bad("train", "--concept", "cat", "--base", tiny_dir, "-s", "lora.rank=0", "-o", tmp_path / "out")
    assert "lora.rank" in message
    assert "found 0" in message


def test_preset_without_a_concept(tmp_path: Path) -> None:
    assert "concept" in bad("train", "fast", "-o", tmp_path / "out")


def test_installed_command_prints_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run([ESD_LORA, "inspect", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no eraser at")
    assert done.stderr.count("\n") == 1


def test_warning_is_one_line_and_no_failure(tmp_path: Path, cat_dir: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    command = [ESD_LORA, "generate", "a cat", "--base", other, "--eraser", cat_dir, "--steps", "1", "-o", tmp_path / "out"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if "trained on other weights" in line] == done.stderr.splitlines()
    assert done.stderr.startswith("warning: ")


class Terminal(io.StringIO):
    """A standard error that people look at."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_heavy_commands_say_at_once_that_they_are_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = {name for name, command in main.commands.items() if isinstance(command, HeavyCommand)}
    assert set(main.commands) - heavy == {"recipes", "requests", "completion", "ui"}, (
        "which load nothing that takes time, or say so"
    )
    shown: list[str] = []
    at_exit: list[object] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    monkeypatch.setattr(sys, "stderr", Terminal())
    HeavyCommand("train", callback=lambda: shown.append(sys.stderr.getvalue())).main([], "train", standalone_mode=False)
    assert shown == ["train: loading ...\n"], "before anything is loaded"
    assert at_exit == [gc.freeze], "or it takes seconds to end"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    HeavyCommand("train", callback=lambda: shown.append(sys.stderr.getvalue())).main([], "train", standalone_mode=False)
    assert shown[1] == "", "scripts read what matters alone"
