"""`esd-lora stack`: several erasers as one, fused on a base or added up."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from esd_lora.cli.commands import HeavyCommand
from esd_lora.cli.options import (
    ERASER,
    Weighted,
    base_option,
    choose_out,
    device_options,
    dry_run_option,
    force_option,
    given,
    names_of,
    out_option,
    paths_of,
    unweighted,
)
from esd_lora.cli.printing import estimated, say
from esd_lora.cli.results import Estimated, Stacked
from esd_lora.errors import EsdLoraError
from esd_lora.preflight import check

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esd_lora.bases.base import Base
    from esd_lora.erasers.eraser import Eraser
    from esd_lora.erasers.stacking import Strength


class HarmoniseSteps(click.IntRange):
    """Number of steps for each member; without a number that of `recipes/harmonise.yaml`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of steps."""
        from esd_lora.recipe_files import load_harmonise_spec

        return load_harmonise_spec().steps if value == "recipe" else super().convert(value, param, ctx)


_harmonise: dict[str, Any] = {"type": HarmoniseSteps(min=1), "is_flag": False, "flag_value": "recipe", "metavar": "[STEPS]"}


@click.command(cls=HeavyCommand)
@click.argument("erasers", nargs=-1, required=True, type=ERASER)
@out_option("Directory, or manifest (.yaml), to make", "erasers/ERASERS")
@base_option(configurable=False)
@click.option("--fuse", "how", type=click.Choice(["closed-form", "sum"]), help="Default: closed-form on a --base, else sum.")
@click.option(
    "--harmonise", help="Distil what members do alone instead, in steps for each: erases and keeps more.", **_harmonise
)
@click.option(
    "--keep", metavar="FILE", help="Prompts to leave alone, one a line; 'default', as without it: the base's or the package's."
)
@click.option("--lam", type=click.FloatRange(min=0), help="Weight of what is kept.")
@click.option("--rank", "--max-rank", type=click.IntRange(min=1), help="Highest rank of a layer.")
@click.option("--energy", type=float, help="Share of every layer's effect (in a sum: squared norm) to keep: 0.995.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of fusing and harmonising.")
@click.option("--keep-state", is_flag=True, help="Keep beside the stack what --add and --remove need; its size is shown.")
@click.option("--add", multiple=True, type=ERASER, help="Add an eraser to a stack that has a state; repeatable.")
@click.option("--remove", multiple=True, metavar="NAME", help="Remove a member by a concept's name or its hash; repeatable.")
@click.option("--report", is_flag=True, help="Report how the members interfere: a table, interference.json and .png.")
@device_options
@dry_run_option
@force_option
def stack(
    erasers: tuple[Weighted, ...],
    out: Path | None,
    base: str | None,
    base_config: str | None,
    how: str | None,
    harmonise: int | None,
    keep: str | None,
    lam: float | None,
    rank: int | None,
    energy: float | None,
    seed: int | None,
    keep_state: bool,
    add: tuple[Weighted, ...],
    remove: tuple[str, ...],
    report: bool,
    device: str,
    dtype: str | None,
    dry_run: bool,
    force: bool,
) -> Stacked | Estimated:
    """Stack erasers into one: fused on a base so that they leave the rest alone, or their exact sum.

    \b
    esd-lora stack no-cat no-style:0.8 --base emoji -o no-both     # closed form
    esd-lora stack no-cat no-style --base emoji --harmonise -o no-both     # to publish
    esd-lora stack no-cat no-style:1,mid=0.5,up.1=0 --fuse sum -o no-both     # exact, weights by block
    esd-lora stack no-cat no-style -o stack.yaml                   # a document instead of a file
    esd-lora stack no-cat no-style --fuse sum --report --base emoji -o no-both
    esd-lora stack no-cat no-style --base emoji --keep-state -o two     # so that it can grow and shrink:
    esd-lora stack two --add no-hat --base emoji -o three
    esd-lora stack three --remove "a cat" --base emoji -o others
    """
    out = _choose(out, (*erasers, *add), remove, force)
    check(out, force or dry_run, base, (*erasers, *add), file=(manifest := _is_manifest(out)))
    from esd_lora.bases.loading import load_base
    from esd_lora.formats.opening import open_eraser

    paths, strengths = unweighted((*erasers, *add))
    settings, ranks = given(lam=lam, harmonise=harmonise, seed=seed, keep=keep), given(rank=rank, energy=energy)
    how = how or ("closed-form" if base and not manifest else "sum")
    change = given(add=add or None, remove=remove or None)
    _check_change(change, erasers, how, base, {**settings, **given(report=report or None, dry_run=dry_run or None)})
    _check(how, base, settings, ranks, manifest=manifest, report=report, keep_state=keep_state)
    reserved = nullcontext() if dry_run else _reserved(out, force, [*paths, base, keep])
    with reserved, _state_beside(out, (keep_state or bool(change)) and not dry_run) as state:
        loaded = load_base(base, config=base_config, device=device, dtype=dtype, vae=False) if base else None
        members = [] if change or manifest else [open_eraser(path, loaded and loaded.family.name) for path in paths]
        if dry_run:
            on = None if how == "sum" else loaded
            return _rehearse(members, strengths, on, out, keep_state, **given(rank=rank), **settings)
        if loaded and change:
            stacked = _change(paths[0], loaded, ranks, state, **change)
        elif loaded and how == "closed-form":
            stacked = _fuse(members, strengths, loaded, ranks, state, **settings)
        else:
            stacked = _name(out, paths, strengths) if manifest else _add_up(members, strengths, ranks)
        return _save(stacked, out, _report(members, strengths, loaded, stacked) if report else {}, state, manifest=manifest)


def _choose(out: Path | None, erasers: Sequence[Weighted], removed: Sequence[str], force: bool) -> Path:
    """Return where the stack is to lie, as given or by its members."""
    names = [names_of(*paths_of(*erasers)), *(f"without {name}" for name in removed)]
    return choose_out(out, "erasers", " ".join(names), again=force)


def _reserved(out: Path, force: bool, inputs: Sequence[str | None]) -> AbstractContextManager[None]:
    """Return what holds the output: a file for a manifest, else a directory."""
    from esd_lora.files import reserve_directory, reserve_file

    return (reserve_file if _is_manifest(out) else reserve_directory)(out, force, filter(None, inputs))


def _is_manifest(out: Path) -> bool:
    return out.suffix.lower() in (".yaml", ".yml")


@contextmanager
def _state_beside(out: Path, kept: bool) -> Generator[Path | None]:
    """Yield a file beside the output for a stack's state, if one is to be kept; it is gone once the `with` block is done."""
    from esd_lora.erasers.eraser import STATE_NAME

    if not kept:
        yield None
        return
    with TemporaryDirectory(dir=out.parent, prefix=".") as folder:
        yield Path(folder) / STATE_NAME


def _rehearse(
    members: Sequence[Eraser],
    strengths: Sequence[Strength],
    base: Base | None,
    out: Path,
    keep_state: bool,
    *,
    harmonise: int | None = None,
    keep: str = "default",
    rank: int | None = None,
    **fields: Any,
) -> Estimated:
    """Print what stacking would take, and what it would write."""
    from esd_lora.built_in import read_prompts
    from esd_lora.erasers.eraser import STATE_NAME, WEIGHTS_NAME
    from esd_lora.estimates.stacking import estimate_fusing, estimate_harmonising, state_size

    options = {"weights": strengths, "keep": None if keep == "default" else read_prompts(keep), **fields}
    written = f"would be written: {out}" if _is_manifest(out) else f"would be written into {out}: {WEIGHTS_NAME}, README.md"
    if base is None:
        lines = ["a sum of weights: no evaluation of a base, and about as much memory as the erasers take", written]
        say(*lines)
        return {"out": str(out), "seconds": None, "memory": None, "lines": lines}
    if harmonise:
        return estimated(estimate_harmonising(members, base, steps=harmonise, **given(rank=rank), **options), out, written)
    if keep_state:
        written += f", {STATE_NAME} ({state_size(members, base, **options) / 1e6:,.1f} MB)"
    return estimated(estimate_fusing(members, base, **given(rank=rank), **options), out, written)


def _check(
    how: str,
    base: str | None,
    settings: Mapping[str, Any],
    ranks: Mapping[str, Any],
    *,
    manifest: bool,
    report: bool,
    keep_state: bool,
) -> None:
    """Refuse options that do not go together."""
    if keep_state and (how != "closed-form" or "harmonise" in settings):
        raise EsdLoraError("--keep-state goes with --fuse closed-form, on a --base: only there a stack is solved from sums.")
    if "harmonise" in settings and (wrong := {"lam", "energy"} & {*settings, *ranks}):
        raise EsdLoraError(f"--{min(wrong)} goes with the closed form, and --harmonise takes its place. Leave either out.")
    if how == "closed-form" and not base:
        raise EsdLoraError("--fuse closed-form needs --base: what the layers read there decides. Give the base of the erasers.")
    if how == "sum" and "harmonise" in settings:
        raise EsdLoraError("--harmonise trains a stack on a --base: give the base of the erasers, and leave out --fuse sum.")
    if how == "sum" and settings:
        raise EsdLoraError(f"--{next(iter(settings))} goes with --fuse closed-form, on a --base.")
    if base and how == "sum" and not report:
        raise EsdLoraError("--base has nothing to do in a sum: leave out --fuse sum, or add --report.")
    if manifest and (ranks or how != "sum"):
        raise EsdLoraError("a manifest names its members as they are: to fuse or cut ranks, give a directory to write into.")


def _check_change(
    change: Mapping[str, Any], stacks: Sequence[Weighted], how: str, base: str | None, others: Mapping[str, Any]
) -> None:
    """Refuse what does not go with a change of a stack's members, of which `others` are further options that were given."""
    if not change:
        return
    option = " and ".join(f"--{name}" for name in change)
    if [(weight, blocks) for _, weight, blocks in stacks] != [(1, {})]:
        raise EsdLoraError(f"{option} changes one stack, given by its directory, without a weight.")
    if not base:
        raise EsdLoraError(f"{option} needs --base: what changes is read there. Give the base that the stack was fused on.")
    if how != "closed-form":
        raise EsdLoraError(f"{option} fuses a stack into a directory: leave out --fuse sum, and give -o a directory.")
    for name in others:
        raise EsdLoraError(
            f"--{name.replace('_', '-')} does not go with {option}, which fuses as the stack was fused. Leave it out."
        )


def _save(stacked: Eraser, out: Path, sheets: Mapping[str, bytes], state: Path | None, *, manifest: bool) -> Stacked:
    """Write the stack's directory in the place of an earlier one, beside a manifest the report alone; say so, and return it."""
    from esd_lora.erasers.eraser import RUN_FILES, STATE_NAME
    from esd_lora.files import write_atomically
    from esd_lora.formats.cards import save_with_card
    from esd_lora.fusing.interference import REPORT_FILES

    if not manifest:
        more = {**sheets, **({state.name: state} if state else {})}
        save_with_card(stacked, out, more, replaces=[*RUN_FILES, *REPORT_FILES, STATE_NAME])
        if state:
            say(f"state for --add and --remove: {state.stat().st_size / 1e6:,.1f} MB in {state.name}")
    for name, content in sheets.items() if manifest else ():
        write_atomically(out.with_name(name), content)
    names = [f"{c.name} (amplified, weight {c.weight:g})" if c.weight < 0 else c.name for c in stacked.header.concepts]
    say(f"stack of {', '.join(names)}: {out}")
    ranks = sorted({pair.rank for pair in stacked.pairs.values()})
    return {
        "eraser": str(out),
        "concepts": [{"name": concept.name, "weight": concept.weight} for concept in stacked.header.concepts],
        "ranks": [ranks[0], ranks[-1]],
        "making": stacked.header.making(),
        "files": [*sheets, *([state.name] if state else [])],
    }


def _fuse(
    members: Sequence[Eraser],
    strengths: Sequence[Strength],
    base: Base,
    ranks: Mapping[str, Any],
    state: Path | None,
    *,
    harmonise: int | None = None,
    keep: str = "default",
    lam: float | None = None,
    seed: int | None = None,
) -> Eraser:
    """Fuse, or harmonise in a number of steps for each member, and print what was done."""
    from esd_lora.built_in import read_prompts
    from esd_lora.fusing.closed_form import fuse
    from esd_lora.fusing.harmonising import harmonise as distil

    prompts = None if keep == "default" else read_prompts(keep)
    if harmonise:
        one = distil(members, base, weights=strengths, keep=prompts, steps=harmonise, **ranks, **given(seed=seed))
        dropped = one.header.distillations[-1].dropped
    else:
        one = fuse(members, base, weights=strengths, keep=prompts, state=state, **ranks, **given(lam=lam, seed=seed))
        dropped = one.header.fusions[-1].dropped
    _say_how(one, dropped)
    return one


def _change(
    stack: str,
    base: Base,
    ranks: Mapping[str, Any],
    state: Path | None,
    *,
    add: Sequence[Weighted] = (),
    remove: Sequence[str] = (),
) -> Eraser:
    """Add members to a stack or remove some, and print what was done."""
    from esd_lora.formats.opening import open_eraser
    from esd_lora.fusing.growing import change_members

    paths, strengths = unweighted(add)
    joining = [open_eraser(path, base.family.name) for path in paths]
    changed = change_members(stack, base, add=joining, weights=strengths, remove=remove, state=state, **ranks)
    _say_how(changed, changed.header.fusions[-1].dropped)
    return changed


def _say_how(fused: Eraser, dropped: Sequence[str]) -> None:
    """Print what is not kept, how it was made, and its ranks."""
    if dropped:
        say(f"not kept, because they name what is erased: {'; '.join(dropped)}")
    reached = sorted({pair.rank for pair in fused.pairs.values()})
    say(*fused.header.making(), f"ranks {reached[0]} to {reached[-1]}")


def _report(members: Sequence[Eraser], strengths: Sequence[Strength], base: Base | None, stacked: Eraser) -> dict[str, bytes]:
    """Print how the members interfere, on the base if there is one, and return the files that say so."""
    from esd_lora.fusing.interference import measure_interference

    interference = measure_interference(members, strengths, base=base, whole=stacked if base else None)
    say(*interference.lines())
    return interference.files()


def _name(manifest: Path, paths: Sequence[str], strengths: Sequence[Strength]) -> Eraser:
    """Write the manifest of a sum."""
    from esd_lora.erasers.manifests import write_manifest

    _warn_of_damage(len(paths))
    return write_manifest(manifest, paths, strengths)


def _warn_of_damage(count: int) -> None:
    """Say what a plain sum of several erasers costs."""
    if count > 1:
        say(
            f"warning: a plain sum of {count} erasers adds up what they cost everything else too; with --base they"
            " are fused instead (docs/stacking.md).",
            err=True,
        )


def _add_up(members: Sequence[Eraser], strengths: Sequence[Strength], ranks: Mapping[str, Any]) -> Eraser:
    """Add up, at lower ranks if any are given, and print what that cost."""
    from esd_lora.erasers.stacking import compress
    from esd_lora.erasers.stacking import stack as add_up

    _warn_of_damage(len(members))
    stacked = add_up(members, strengths)
    if ranks:
        stacked, errors, overall = compress(stacked, **ranks)
        for module, error in errors.items():
            say(f"  {module}  rank {stacked.pairs[module].rank}  relative error {error:.2e}")
        say(f"relative error over all {len(errors)} layers: {overall:.2e}")
    return stacked
