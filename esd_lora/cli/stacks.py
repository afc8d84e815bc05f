"""`esd-lora stack`: several erasers as one, fused on a base or added up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esd_lora.cli.options import ERASER, Weighted, base_option, device_options, force_option, unweighted
from esd_lora.errors import EsdLoraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esd_lora.bases.base import Base
    from esd_lora.erasers.eraser import Eraser
    from esd_lora.erasers.stacking import Strength

_MANIFESTS = (".yaml", ".yml")
_HARMONISE = 400  # steps of --harmonise without a number
_distil = {"is_flag": False, "flag_value": _HARMONISE, "metavar": "[STEPS]"}


@click.command()
@click.argument("erasers", nargs=-1, required=True, type=ERASER)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory, or manifest (.yaml), to make.")
@base_option()
@click.option("--fuse", "how", type=click.Choice(["closed-form", "sum"]), help="Default: closed-form on a --base, else sum.")
@click.option(
    "--harmonise", type=click.IntRange(min=0), help="Distil afterwards what members do alone: slower, erases more.", **_distil
)
@click.option("--keep", metavar="FILE", help="Prompts to leave alone, one a line; default: the base's or the package's.")
@click.option("--lam", type=click.FloatRange(min=0), help="Weight of what is kept.")
@click.option("--rank", "--max-rank", type=click.IntRange(min=1), help="Highest rank of a layer.")
@click.option("--energy", type=float, help="Share of every layer's effect (in a sum: squared norm) to keep: 0.995.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the trajectories that fusing walks.")
@click.option("--report", is_flag=True, help="Report how the members interfere: a table, interference.json and .png.")
@device_options
@force_option
def stack(
    erasers: tuple[Weighted, ...],
    out: Path,
    base: str | None,
    base_config: str | None,
    how: str | None,
    harmonise: int | None,
    keep: str | None,
    lam: float | None,
    rank: int | None,
    energy: float | None,
    seed: int | None,
    report: bool,
    device: str,
    dtype: str | None,
    force: bool,
) -> None:
    """Stack erasers into one: fused on a base so that they leave the rest alone, or their exact sum.

    \b
    esd-lora stack no-cat no-style:0.8 --base emoji -o no-both     # closed form
    esd-lora stack no-cat no-style --base emoji --harmonise --energy 0.995 -o no-both
    esd-lora stack no-cat no-style:1,mid=0.5,up.1=0 --fuse sum -o no-both     # exact, weights by block
    esd-lora stack no-cat no-style -o stack.yaml                   # a document instead of a file
    esd-lora stack no-cat no-style --fuse sum --report --base emoji -o no-both
    """
    from esd_lora.erasers.eraser import RUN_FILES
    from esd_lora.erasers.manifests import load_eraser, write_manifest
    from esd_lora.erasers.stacking import stack as add_up
    from esd_lora.files import prepare_directory, prepare_file
    from esd_lora.formats.cards import save_with_card
    from esd_lora.fusing.interference import REPORT_FILES, measure

    paths, strengths = unweighted(erasers)
    manifest = out.suffix.lower() in _MANIFESTS
    how = how or ("closed-form" if base and not manifest else "sum")
    chosen = {n: v for n, v in {"lam": lam, "harmonise": harmonise, "seed": seed}.items() if v is not None}
    if how == "closed-form" and not base:
        raise EsdLoraError("--fuse closed-form needs --base: what the layers read there decides. Give the base of the erasers.")
    if how == "sum" and (chosen or keep):
        raise EsdLoraError(f"--{next(iter(chosen), 'keep')} goes with --fuse closed-form, on a --base.")
    if base and how == "sum" and not report:
        raise EsdLoraError("--base has nothing to do in a sum: leave out --fuse sum, or add --report.")
    if manifest and (rank is not None or energy is not None or how != "sum"):
        raise EsdLoraError("a manifest names its members as they are: to fuse or cut ranks, give a directory to write into.")
    members = [load_eraser(path) for path in paths]
    prepare_file(out, force) if manifest else prepare_directory(out, force, ())  # before minutes of work are lost on it
    loaded = None
    if base:
        from esd_lora.bases.loading import load_base

        loaded = load_base(base, config=base_config, device=device, dtype=dtype, vae=False)
    if loaded and how == "closed-form":
        stacked = _fused(members, strengths, loaded, keep, rank=rank, energy=energy, **chosen)
    else:
        if len(members) > 1:
            click.echo(
                f"warning: a plain sum of {len(members)} erasers adds up what they cost everything else too; with --base they"
                " are fused instead (docs/stacking.md).",
                err=True,
            )
        stacked = write_manifest(out, paths, strengths) if manifest else _cut(add_up(members, strengths), rank, energy)
    if not manifest:
        prepare_directory(out, force, [*RUN_FILES, *REPORT_FILES])
        save_with_card(stacked, out)
    if report:
        found = measure(members, strengths, base=loaded, whole=stacked if loaded else None)
        found.save(out.parent if manifest else out)
        click.echo("\n".join(found.lines()))
    named = [f"{c.name} (amplified, weight {c.weight:g})" if c.weight < 0 else c.name for c in stacked.header.concepts]
    click.echo(f"stack of {', '.join(named)}: {out}")


def _fused(members: Sequence[Eraser], strengths: Sequence[Strength], base: Base, keep: str | None, **chosen: Any) -> Eraser:
    """The closed form, and what it went by."""
    from esd_lora.built_in import read_prompts
    from esd_lora.fusing.closed_form import fuse

    prompts = None if keep in (None, "default") else read_prompts(keep)
    fused = fuse(members, base, weights=strengths, keep=prompts, **chosen)
    record = fused.header.fusions[-1]
    if record.dropped:
        click.echo(f"not kept, because they name what is erased: {'; '.join(record.dropped)}")
    ranks = sorted({pair.rank for pair in fused.pairs.values()})
    click.echo("\n".join([*fused.header.making(), f"ranks {ranks[0]} to {ranks[-1]}"]))
    return fused


def _cut(stacked: Eraser, rank: int | None, energy: float | None) -> Eraser:
    """A sum at lower ranks, if asked for, and what that cost."""
    from esd_lora.erasers.stacking import compress

    if rank is None and energy is None:
        return stacked
    shrunk, errors, overall = compress(stacked, rank=rank, energy=energy)
    for module, error in errors.items():
        click.echo(f"  {module}  rank {shrunk.pairs[module].rank}  relative error {error:.2e}")
    click.echo(f"relative error over all {len(errors)} layers: {overall:.2e}")
    return shrunk
