"""`esd-lora train`, `generate` and `demo`: making erasers, and pictures with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esd_lora.cli.commands import HeavyCommand
from esd_lora.cli.completing import complete_recipes
from esd_lora.cli.options import (
    ERASER,
    NUMBERS,
    SCHEDULER,
    Weighted,
    allow_code_option,
    base_option,
    choose_out,
    concept_option,
    device_options,
    dry_run_option,
    force_option,
    given,
    is_configured,
    out_option,
    overrides,
    unweighted,
)
from esd_lora.cli.printing import estimated, say
from esd_lora.cli.results import Demonstrated, Estimated, Painted, Picture, Trained
from esd_lora.errors import EsdLoraError
from esd_lora.preflight import check, check_inputs, check_output, check_strengths
from esd_lora.ranks import is_main

if TYPE_CHECKING:
    from esd_lora.bases.base import Base
    from esd_lora.erasers.eraser import Eraser
    from esd_lora.recipe import Recipe

_SHORT = {"steps": "train.steps", "rank": "lora.rank", "lr": "train.lr", "seed": "train.seed"}
"""Options of `train` that stand for a field of the recipe."""
_UNNAMED = "a thing in pictures"
"""Label of what pictures show, where --concept gives none."""
_TRAIN_SECTIONS = {
    "What to erase": ("concepts", "images", "literal", "anchor", "erase_from", "avoid", "guard"),
    "From what, and how": ("base", "base_config", "scope", "steps", "rank", "lr", "seed", "negative_guidance", "settings"),
    "Where it runs": ("device", "dtype", "fit", "teacher_cache", "track"),
    "What is written": ("out", "kohya", "resume", "force", "dry_run"),
}
_GENERATE_SECTIONS = {
    "What to paint": ("prompt_file", "negative_prompt", "seed", "count", "width", "height", "frames"),
    "How": ("base", "base_config", "steps", "guidance", "scheduler", "clip_skip", "device", "dtype"),
    "Erasers": ("erasers", "strengths", "compare", "gate", "gate_threshold"),
    "What is written": ("out", "force", "dry_run"),
}


@click.command(cls=HeavyCommand, sections=_TRAIN_SECTIONS)
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...", shell_complete=complete_recipes)
@concept_option("What to erase; may be given several times.")
@click.option("--images", metavar="FOLDER", help="Pictures of it, where it has no name; --concept is a label then.")
@click.option("--avoid", metavar="TEXT", multiple=True, help="What others of a stack erase, so no anchor; repeatable.")
@click.option(
    "--guard", metavar="TEXT|N", multiple=True, help="Prompt that must not change at all; repeatable. N: those most at risk."
)
@click.option("--anchor", metavar="TEXT", help="What should appear instead; none: the empty prompt. Chosen unless given.")
@click.option("--erase-from", metavar="TEXT", help="Prompt to erase the concept from: a hat from 'cowboy'.")
@base_option()
@click.option(
    "--scope", help="Layers that get an adapter: xattn, xattn-kv, selfattn, noxattn, full, joint-qk, re:REGEX, text-encoder."
)
@click.option("--steps", metavar="N|auto", help="Optimiser steps: short for -s train.steps=N.")
@click.option("--rank", metavar="N", help="Rank of the update: short for -s lora.rank=N.")
@click.option("--lr", metavar="X|auto", help="Learning rate: short for -s train.lr=X.")
@click.option("--seed", metavar="N", help="Seed: short for -s train.seed=N.")
@click.option(
    "--negative-guidance",
    type=float,
    metavar="X",
    help="eta as ESD's 2025 scripts say it: eta + 1, of prompts without an anchor; with --erase-from eta itself.",
)
@click.option("-s", "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a recipe field: train.warmup=10.")
@allow_code_option
@device_options
@click.option("--track", multiple=True, metavar="TRACKER", help="Report to tensorboard, wandb or trackio.")
@click.option("--teacher-cache", type=click.Path(path_type=Path), metavar="DIR", help="Keep what the base predicts for others.")
@out_option("Directory for the eraser", "erasers/CONCEPT")
@click.option("--kohya", is_flag=True, help="Also write kohya/NAME.safetensors there, for A1111, Forge and ComfyUI.")
@click.option(
    "--fit", is_flag=False, flag_value="card", metavar="[SIZE]", help="Choose what fits the card at hand, or one of SIZE: 12GB."
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the output directory.")
@dry_run_option
@force_option
def train(
    recipes: tuple[str, ...],
    concepts: tuple[str, ...],
    images: str | None,
    avoid: tuple[str, ...],
    guard: tuple[str, ...],
    anchor: str | None,
    erase_from: str | None,
    base: str | None,
    base_config: str | None,
    scope: str | None,
    steps: str | None,
    rank: str | None,
    lr: str | None,
    seed: str | None,
    negative_guidance: float | None,
    settings: tuple[str, ...],
    allow_code: tuple[str, ...],
    device: str,
    dtype: str | None,
    track: tuple[str, ...],
    teacher_cache: Path | None,
    out: Path | None,
    kohya: bool,
    fit: str | None,
    resume: bool,
    dry_run: bool,
    force: bool,
) -> Trained | Estimated:
    """Train an eraser from RECIPE: built-in names or YAML files, each over those before it.

    Without a recipe that says how to train, the base's family and size choose a preset.

    \b
    esd-lora train --concept "a cat" -o no-cat
    esd-lora train emoji-twemoji --steps 300 -o no-twemoji
    esd-lora train sdxl/fast concepts/van-gogh -o no-van-gogh
    esd-lora train --images pictures-of-it --concept "our mascot" -o no-mascot
    torchrun --nproc_per_node 2 -m esd_lora train --concept "a cat" -o no-cat    # shared by two devices
    """
    concepts = _require_concept(concepts, recipes, anchor, erase_from, images)
    base = _base_for(recipes, base)
    names = given(base=base or None, base_config=base_config or None, scope=scope or None)
    fields = {**names, **_concepts(concepts, anchor, erase_from, images), **given(guard=_guard(guard), avoid=avoid or None)}
    values = _settings(settings, steps=steps, rank=rank, lr=lr, seed=seed)
    recipe = _loaded(_with_preset(recipes, base), values, allow_code, fields, negative_guidance)
    out = choose_out(out, "erasers", " ".join(concept.name for concept in recipe.concepts), again=resume or force)
    check_output(out, force or resume or dry_run, () if resume else recipes)
    if fit:
        recipe, dtype = _fitted(recipe, fit, device, dtype)
    if dry_run:
        return _rehearse(recipe, out, device, dtype, allow_code)
    from esd_lora.training import train as run

    try:
        options = {"resume": resume, "force": force, "device": device, "dtype": dtype, "track": track}
        eraser = run(recipe, out=out, allow_code=allow_code, teacher_cache=teacher_cache, **options)
    except KeyboardInterrupt:
        raise EsdLoraError(_how_to_go_on(out, recipe)) from None
    return _report(eraser, out, kohya)


def _how_to_go_on(out: Path, recipe: Recipe) -> str:
    """Return what to do after a training was interrupted."""
    from esd_lora.recipe_files import dump_recipe
    from esd_lora.train_state import how_to_go_on

    return how_to_go_on(out, dump_recipe(recipe))


def _report(eraser: Eraser, out: Path, kohya: bool) -> Trained:
    """Print what was erased, what it took, and how far it came; return it; export it if that was asked for."""
    from esd_lora.calibration import outcome

    file = _export_kohya(eraser, out) if kohya and is_main() else None
    if file:
        say(f"kohya LoRA: {file}")
    header = eraser.header
    work = f"{header.cost['steps']:.0f} steps, {header.cost['sample_evaluations']:.0f} sample evaluations"
    reached = f" ({outcome(header)})" if header.calibrations else ""
    say(f"erased {', '.join(eraser.names)} in {header.cost['seconds']:.1f} s, {work}{reached}: {out}")
    return {
        "eraser": str(out),
        "concepts": eraser.names,
        "base": header.base,
        "family": header.family,
        "rank": max(pair.rank for pair in eraser.pairs.values()),
        "cost": dict(header.cost),
        "kohya": str(file) if file else None,
    }


def _settings(settings: tuple[str, ...], **short: str | None) -> dict[str, object]:
    """Return the fields of the recipe that options say, `-s` and those that are short for one.

    Raises:
        EsdLoraError: If two say the same field.
    """
    values = overrides(settings)
    for name, value in given(**short).items():
        if _SHORT[name] in values:
            raise EsdLoraError(f"--{name} and -s {_SHORT[name]} say the same thing twice. Leave either out.")
        values |= overrides([f"{_SHORT[name]}={value}"])
    return values


def _concepts(concepts: tuple[str, ...], anchor: str | None, erase_from: str | None, images: str | None) -> dict[str, object]:
    """Return the concepts that options say as a field of the recipe."""
    instead = "" if anchor == "none" else anchor
    named = [{"name": name, "anchor": instead, "erase_from": erase_from, "images": images} for name in concepts]
    return {"concepts": named} if named else {}


def _base_for(recipes: tuple[str, ...], base: str | None) -> str | None:
    """Return the base; one that the environment or the configuration gives yields to that of a complete recipe."""
    from esd_lora.recipe_files import recipe_kind

    complete = any(recipe_kind(name) == "recipe" for name in recipes)
    return None if base and complete and is_configured("base") else base


def _loaded(
    recipes: list[str],
    values: dict[str, object],
    allow_code: tuple[str, ...],
    fields: dict[str, object],
    negative_guidance: float | None,
) -> Recipe:
    """Return the recipe, with the eta of a negative guidance if there is one."""
    from esd_lora.recipe_files import load_recipe

    recipe = load_recipe(recipes, values, allow_code=allow_code, **fields, **given(eta=negative_guidance))
    return recipe if negative_guidance is None else _guided(recipe, negative_guidance)


def _rehearse(recipe: Recipe, out: Path, device: str, dtype: str | None, allow_code: tuple[str, ...]) -> Estimated:
    """Print what a training would take, and what it would write."""
    from esd_lora.bases.loading import load_base
    from esd_lora.erasers.eraser import RUN_FILES
    from esd_lora.estimates.training import estimate_training
    from esd_lora.from_pictures import check_pictures

    check_pictures(recipe)
    base = load_base(recipe.base, device=device, dtype=dtype, config=recipe.base_config, vae=recipe.train.preview_every > 0)
    estimate = estimate_training(recipe, base, allow_code=allow_code)
    written = f"would be written into {out}, as far as the recipe asks for it: {', '.join(RUN_FILES)}"
    return estimated(estimate, out, written)


def _fitted(recipe: Recipe, size: str, device: str, dtype: str | None) -> tuple[Recipe, str]:
    """Return the recipe and the dtype that fit a card, and print them."""
    from esd_lora.memory_plans import fit_recipe, free_memory, read_size

    recipe, plan = fit_recipe(recipe, free_memory(device) if size == "card" else read_size(size), dtype)
    say(f"fit: {plan.describe()}")
    return recipe, plan.setting.dtype


def _guard(guard: tuple[str, ...]) -> int | tuple[str, ...] | None:
    """Return what to guard: prompts, or how many are to be chosen."""
    return int(guard[0]) if len(guard) == 1 and guard[0].isdecimal() else guard or None


def _require_concept(
    concepts: tuple[str, ...], recipes: tuple[str, ...], anchor: str | None, erase_from: str | None, images: str | None
) -> tuple[str, ...]:
    """Return the concepts, or a label for what pictures show.

    Raises:
        EsdLoraError: If nothing is to be erased, options only go with a concept, or pictures are to show several.
    """
    if images is not None:
        if len(concepts) > 1:
            raise EsdLoraError(f"--images shows one thing, and {len(concepts)} concepts are given. Train an eraser for each.")
        return concepts or (_UNNAMED,)
    if not concepts and (not recipes or anchor is not None or erase_from is not None):
        raise EsdLoraError("nothing to erase: give a RECIPE or --concept TEXT; --anchor and --erase-from go with --concept.")
    return concepts


def _with_preset(recipes: tuple[str, ...], base: str | None) -> list[str]:
    """Return the recipes, over the preset that fits the base if none of them says how to train; which one is printed."""
    from esd_lora.recipe_files import DEFAULT_PRESET, recipe_kind, recipe_title

    check_inputs(base)
    if recipes and not base:
        return list(recipes)  # a concept without a preset and a base lacks both, and is told so
    if not base:
        return [DEFAULT_PRESET]
    from esd_lora.bases.presets import preset_for, require_fitting

    if any(recipe_kind(name) != "concept" for name in recipes):
        require_fitting(recipes, base)
        return list(recipes)
    preset = preset_for(base)
    if preset != DEFAULT_PRESET:
        say(f"preset {preset}, by the base's family and size: {recipe_title(preset)}")
    return [preset, *recipes]


def _guided(recipe: Recipe, guidance: float) -> Recipe:
    """Return a recipe with the eta of a negative guidance, and print it."""
    from esd_lora.negative_guidance import with_negative_guidance

    recipe = with_negative_guidance(recipe, guidance)
    start = "the concept" if recipe.eta != guidance else "the prompt it is erased from"
    say(f"negative guidance {guidance:g}, measured from {start}, is eta {recipe.eta:g}")
    return recipe


def _export_kohya(eraser: Eraser, out: Path) -> Path:
    """Write an eraser for A1111, Forge and ComfyUI, in a folder of its own: load_lora_weights takes one with one file in it."""
    from esd_lora.formats.exporting import export
    from esd_lora.wording import eraser_name

    return export(eraser, out / "kohya" / f"{eraser_name(eraser.names)}.safetensors", layout="kohya", force=True)


@click.command(cls=HeavyCommand, sections=_GENERATE_SECTIONS)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--prompts", "prompt_file", metavar="FILE", help="Also paint the prompts of a .txt, one a line, or of a .csv.")
@click.option("--negative-prompt", metavar="TEXT", help="What guidance leads away from, in the place of the empty prompt.")
@base_option("emoji")
@click.option("--eraser", "erasers", multiple=True, type=ERASER, help="Eraser to apply; may be given several times.")
@click.option("--compare", is_flag=True, help="Also write comparison.png: base above, erased below.")
@click.option("--strengths", type=NUMBERS, metavar="LIST", help="Also write strengths.png, a row for each: 0,0.5,1,1.5.")
@click.option("--gate", is_flag=True, help="Have each eraser on for prompts near its concepts alone; writes gates.json.")
@click.option("--gate-threshold", type=float, metavar="X", help="Similarity up to which --gate keeps an eraser off: 0.95.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the first picture.")
@click.option("-n", "count", default=1, show_default=True, type=click.IntRange(min=1), help="Pictures a prompt.")
@click.option("--width", type=click.IntRange(min=1), help="Pixels; the base's native size unless given.")
@click.option("--height", type=click.IntRange(min=1), help="Pixels; the base's native size unless given.")
@click.option("--frames", type=click.IntRange(min=1), help="Length of videos, where the base makes them: 1, 5, 9, ...")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps.")
@click.option("--guidance", type=float, help="Classifier-free guidance scale.")
@click.option("--scheduler", type=SCHEDULER, help="DDIM, Euler, UniPC, ... as diffusers calls them; default: the base's.")
@click.option("--clip-skip", type=click.IntRange(min=1), metavar="N", help="Last layers of CLIP that prompts skip: 1, 2.")
@device_options
@out_option("Directory for the pictures", "pictures/PROMPT")
@dry_run_option
@force_option
def generate(
    prompts: tuple[str, ...],
    prompt_file: str | None,
    base: str,
    base_config: str | None,
    erasers: tuple[Weighted, ...],
    compare: bool,
    strengths: list[float] | None,
    gate: bool,
    gate_threshold: float | None,
    seed: int,
    count: int,
    device: str,
    dtype: str | None,
    out: Path | None,
    dry_run: bool,
    force: bool,
    **sampling: Any,
) -> Painted | Estimated:
    """Generate pictures of PROMPTs, with erasers on.

    \b
    esd-lora generate "a cat" "a dog" --eraser no-cat:0.8 --compare -o pictures
    esd-lora generate "a cat" --eraser no-cat:1,mid=0 --strengths=-1,0,0.5,1,1.5 -o pictures
    esd-lora generate "a cat" "a dog" --eraser no-cat --eraser no-car --gate -o pictures
    esd-lora generate --prompts prompts.txt --negative-prompt blurry --scheduler UniPC --eraser no-cat.safetensors
    """
    gate = gate or gate_threshold is not None
    _check_erasers(erasers, strengths, gate)
    prompts = _read_prompts(prompts, prompt_file)
    out = choose_out(out, "pictures", prompts[0], again=force)
    check(out, force or dry_run, base, erasers)
    from esd_lora.bases.loading import load_base
    from esd_lora.formats.opening import open_eraser
    from esd_lora.gating import Gate
    from esd_lora.sampling import write_pictures

    loaded = load_base(base, device=device, dtype=dtype, config=base_config, text_first=not dry_run)
    members = [open_eraser(path, loaded.family.name) for path, *_ in erasers]
    if dry_run:
        rows = len({1.0, *(strengths or ()), *((0.0,) if compare else ())})
        return _estimate_pictures(loaded, len(prompts) * count * rows, out, sampling)
    opening = Gate(loaded, members, **given(threshold=gate_threshold)) if gate else None
    weights, seeds = unweighted(erasers)[1], range(seed, seed + count)
    options = {"compare": compare, "strengths": strengths or (), "force": force, **sampling}
    files = write_pictures(loaded, prompts, out, erasers=members, weights=weights, gate=opening, seeds=seeds, **options)
    return _show_pictures(files, prompts, seeds, out)


def _read_prompts(prompts: tuple[str, ...], file: str | None) -> tuple[str, ...]:
    """Return what to paint, from the command line and from a file.

    Raises:
        EsdLoraError: If there is nothing, or the file cannot be read.
    """
    if file:
        from esd_lora.evaluation.suites.prompt_files import read_prompt_file

        prompts = (*prompts, *(case.prompt for case in read_prompt_file(file).cases))
    if not prompts:
        raise EsdLoraError("nothing to paint: give a PROMPT, or --prompts with a .txt or .csv of them.")
    return prompts


def _show_pictures(files: Sequence[Path], prompts: Sequence[str], seeds: Sequence[int], out: Path) -> Painted:
    """Print how many pictures there are, and where, and return them."""
    painted: list[Picture] = [
        {"file": str(file), "prompt": prompt, "seed": seed}
        for file, (prompt, seed) in zip(files, product(prompts, seeds), strict=False)  # videos and sheets come after them
    ]
    others = files[len(painted) :]
    videos, sheets = ([f for f in others if (f.suffix == ".webp") == moving] for moving in (True, False))
    among = " and ".join(file.name for file in sheets)
    beside = ", each the middle frame of the video beside it" if videos else ""
    say(f"{len(painted)} pictures in {out}" + (f", {among} among them" if sheets else "") + beside)
    return {"out": str(out), "pictures": painted, "sheets": list(map(str, sheets)), "videos": list(map(str, videos))}


def _estimate_pictures(base: Base, pictures: int, out: Path, sampling: dict[str, Any]) -> Estimated:
    """Print what painting would take, and what it would write."""
    from esd_lora.estimates.pictures import estimate_pictures

    written = f"would be written into {out}: {pictures} pictures, and the sheets that were asked for"
    return estimated(estimate_pictures(base, pictures, **sampling), out, written)


def _check_erasers(erasers: tuple[Weighted, ...], strengths: list[float] | None, gate: bool) -> None:
    """Refuse options that say how an eraser is on where there is none."""
    if strengths is not None and not erasers:
        raise EsdLoraError("--strengths needs an --eraser whose strength to change.")
    if gate and not erasers:
        raise EsdLoraError("--gate needs an --eraser to switch by prompt.")
    check_strengths(strengths or (), "--strengths")


@click.command(cls=HeavyCommand)
@click.option(
    "-o", "--out", default="out/demo", show_default=True, type=click.Path(path_type=Path), help="Directory for everything."
)
@force_option
def demo(out: Path, force: bool) -> Demonstrated:
    """Erase an object and a style on the built-in base, stack, merge, and measure what happened."""
    check_output(out, force)
    from esd_lora.demo import MEASURED
    from esd_lora.demo import demo as run

    say(*run(out, force=force).split("\n"))
    page, table = out / MEASURED / "report.html", out / MEASURED / "table.md"
    return {"out": str(out), "page": str(page), "table": table.read_text("utf-8")}
