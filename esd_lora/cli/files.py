"""`esd-lora merge`, `inspect`, `diff`, `export`, `import`, `extract`: work on eraser files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from esd_lora.cli.commands import HeavyCommand
from esd_lora.cli.completing import complete_bases, complete_erasers
from esd_lora.cli.options import (
    ERASER,
    Weighted,
    choose_out,
    concept_option,
    dry_run_option,
    force_option,
    names_of,
    out_option,
    paths_of,
    unweighted,
)
from esd_lora.cli.printing import say
from esd_lora.cli.results import Compared, Estimated, Exported, Extracted, Imported, Inspected, Merged, Proof
from esd_lora.errors import EsdLoraError
from esd_lora.preflight import check
from esd_lora.settings import variable

if TYPE_CHECKING:
    from esd_lora.erasers.stacking import Strength
    from esd_lora.weights.verifying import Verified

_out_directory = out_option("Directory for the eraser", "erasers/FILE")
_rank = click.option("--rank", type=click.IntRange(min=1), help="Highest rank of a layer.")
_energy = click.option("--energy", type=float, help="Share of every layer's squared norm to keep: 0.999.")
_concepts = concept_option("What the file erases.")
_file = click.argument("file", type=click.Path(), shell_complete=complete_erasers)


@click.command(cls=HeavyCommand)
@click.argument("erasers", nargs=-1, required=True, type=ERASER)
@click.option(
    "--base",
    required=True,
    envvar=variable("base"),
    shell_complete=complete_bases,
    help="Built-in base, diffusers directory, .safetensors checkpoint, or Hub id.",
)
@out_option("Diffusers directory or file to make", "models/BASE-ERASERS")
@click.option("--verify", is_flag=True, help="Read the result again and prove every tensor.")
@dry_run_option
@force_option
def merge(
    erasers: tuple[Weighted, ...], base: str, out: Path | None, verify: bool, dry_run: bool, force: bool
) -> Merged | Estimated:
    """Merge erasers into a base for good, in the base's own layout: a diffusers directory or a single file."""
    suffix = ".safetensors" if base.lower().endswith(".safetensors") else ""
    out = choose_out(out, "models", names_of(base, *paths_of(*erasers)), suffix=suffix, again=force)
    check(out, force or dry_run, base, erasers, file=out.suffix == ".safetensors")
    from esd_lora.weights.merging import merge as run

    paths, strengths = unweighted(erasers)
    if dry_run:
        from esd_lora.estimates.merging import estimate_merging

        estimate = estimate_merging(paths, base, out, weights=strengths)
        say(*estimate.lines(), f"would be written: {out}")
        return {"out": str(out), "seconds": [estimate.seconds] * 2, "memory": None, "lines": estimate.lines()}
    run(paths, base, out, weights=strengths, force=force)
    say(f"merged {'checkpoint' if out.is_file() else 'pipeline'}: {out}")
    proof = Proof(**_proved(out, base, paths, strengths)._asdict()) if verify else None
    return {"model": str(out), "base": base, "proof": proof}


def _proved(out: Path, base: str, paths: Sequence[str], strengths: Sequence[Strength]) -> Verified:
    """Prove a merged base and print what was compared."""
    from esd_lora.weights.verifying import verify

    try:
        proof = verify(out, base, paths, weights=strengths)
    except KeyboardInterrupt:
        raise EsdLoraError(f"interrupted: {out} is merged and whole, but not proved. With --force it is done again.") from None
    say(f"verified: {proof.touched} tensors are base + update to within rounding, {proof.untouched} others are bit-equal")
    return proof


@click.command(cls=HeavyCommand)
@_file
@click.option("--layers/--no-layers", default=None, help="Show every layer; default: if there are not too many.")
def inspect(file: str, layers: bool | None) -> Inspected:
    """Show what an eraser, a stack manifest or any LoRA file removes, how much, and where it came from."""
    from esd_lora.formats.inspecting import inspect_file

    facts = inspect_file(file)
    say(*facts.lines(layers))
    return Inspected(**facts.as_json())


@click.command(cls=HeavyCommand)
@click.argument("first", type=click.Path(), shell_complete=complete_erasers)
@click.argument("second", type=click.Path(), shell_complete=complete_erasers)
def diff(first: str, second: str) -> Compared:
    """Compare two LoRA files: headers, layers, and how far apart their updates are."""
    from esd_lora.formats.inspecting import diff as run

    difference = run(first, second)
    say(*difference.lines())
    return {
        "only_first": difference.only[0],
        "only_second": difference.only[1],
        "layers": {module: {"distance": far, "cosine": cosine} for module, (far, cosine) in difference.layers.items()},
        "overall": difference.overall,
        "header": {field: list(values) for field, values in difference.header.items()},
    }


@click.command(cls=HeavyCommand)
@click.argument("eraser", type=click.Path(), shell_complete=complete_erasers)
@click.option("--layout", required=True, help="kohya (A1111, Forge, ComfyUI), diffusers, or peft.")
@out_option(".safetensors file; for peft a directory", "exports/ERASER-LAYOUT")
@force_option
def export(eraser: str, layout: str, out: Path | None, force: bool) -> Exported:
    """Write an eraser for another program, its update unchanged."""
    from esd_lora.files import refuse_inputs
    from esd_lora.formats.exporting import export as run
    from esd_lora.formats.opening import open_eraser

    suffix = "" if layout == "peft" else ".safetensors"
    out = choose_out(out, "exports", f"{names_of(eraser)} {layout}", suffix=suffix, again=force)
    refuse_inputs(out, [eraser])
    file = run(open_eraser(eraser), out, layout=layout, force=force)
    say(f"{layout} LoRA: {file}")
    return {"file": str(file), "layout": layout}


@click.command("import", cls=HeavyCommand)
@_file
@_out_directory
@_concepts
@click.option("--base", metavar="NAME", help="What it was made for; default: what the file says.")
@click.option("--family", help="Family of the model (sd, sdxl, flux2, wan, ...), where the layers' names fit several.")
@click.option("--without-text-encoder", is_flag=True, help="Leave out layers of text encoders.")
@force_option
def import_(
    file: str,
    out: Path | None,
    concepts: tuple[str, ...],
    base: str | None,
    family: str | None,
    without_text_encoder: bool,
    force: bool,
) -> Imported:
    """Make an eraser of a LoRA file of kohya, LECO, SPM, ai-toolkit, peft or Concept Sliders (.pt)."""
    from esd_lora.erasers.eraser import RUN_FILES
    from esd_lora.files import reserve_directory
    from esd_lora.formats.cards import save_with_card
    from esd_lora.formats.importing import import_lora

    out = choose_out(out, "erasers", names_of(file), again=force)
    with reserve_directory(out, force, [file]):
        eraser = import_lora(file, family=family, concepts=concepts, base=base, without_text_encoder=without_text_encoder)
        save_with_card(eraser, out, replaces=RUN_FILES)
    header, layers, known = eraser.header, len(eraser.pairs), not eraser.header.origins
    unknown = "" if known else "; where it came from is not known"
    say(f"eraser of {', '.join(eraser.names)}, {layers} layers of family {header.family}{unknown}: {out}")
    return {
        "eraser": str(out),
        "concepts": eraser.names,
        "family": header.family,
        "layers": layers,
        "origin_known": known,
    }


@click.command(cls=HeavyCommand)
@click.option(
    "--base",
    required=True,
    shell_complete=complete_bases,
    help="What was fine-tuned: built-in base, diffusers directory, single file, Hub id.",
)
@click.option("--tuned", required=True, help="The result: the same, or a file with some of the denoiser's weights.")
@_out_directory
@_rank
@_energy
@_concepts
@force_option
def extract(
    base: str, tuned: str, out: Path | None, rank: int | None, energy: float | None, concepts: tuple[str, ...], force: bool
) -> Extracted:
    """Turn a fully fine-tuned model, such as released ESD or UCE weights, into an eraser."""
    out = choose_out(out, "erasers", names_of(tuned), again=force)
    check(out, force, base)
    from esd_lora.erasers.eraser import RUN_FILES
    from esd_lora.files import reserve_directory
    from esd_lora.formats.cards import save_with_card
    from esd_lora.weights.extracting import extract as run

    with reserve_directory(out, force, [base, tuned]):
        result = run(base, tuned, rank=rank, energy=energy, concepts=concepts)
        save_with_card(result.eraser, out, replaces=RUN_FILES)
    ranks = {module: pair.rank for module, pair in result.eraser.pairs.items()}
    for module, share in result.energy.items():
        say(f"  {module}  rank {ranks[module]}  energy kept {share:.4%}")
    say(f"energy kept over all {len(result.energy)} layers that differ: {result.overall:.4%}")
    say(f"eraser of {', '.join(result.eraser.names)}: {out}")
    return {
        "eraser": str(out),
        "concepts": result.eraser.names,
        "layers": {module: {"rank": ranks[module], "energy": share} for module, share in result.energy.items()},
        "energy": result.overall,
    }
