"""`esd-lora merge`, `inspect`, `diff`, `export`, `import`, `extract`: work on eraser files."""

from __future__ import annotations

import json
from pathlib import Path

import click

from esd_lora.cli.options import ERASER, HeavyCommand, Weighted, dry_run_option, force_option, say, unweighted
from esd_lora.preflight import check

_out_directory = click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory for the eraser.")
_rank = click.option("--rank", type=click.IntRange(min=1), help="Highest rank of a layer.")
_energy = click.option("--energy", type=float, help="Share of every layer's squared norm to keep: 0.999.")
_concepts = click.option("--concept", "concepts", multiple=True, metavar="TEXT", help="What the file erases.")


@click.command(cls=HeavyCommand)
@click.argument("erasers", nargs=-1, required=True, type=ERASER)
@click.option("--base", required=True, help="Built-in base, diffusers directory, .safetensors checkpoint, or Hub id.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Diffusers directory or file to make.")
@click.option("--verify", is_flag=True, help="Read the result again and prove every tensor.")
@dry_run_option
@force_option
def merge(erasers: tuple[Weighted, ...], base: str, out: Path, verify: bool, dry_run: bool, force: bool) -> None:
    """Merge erasers into a base for good, in the base's own layout: a diffusers directory or a single file."""
    check(out, force or dry_run, base, erasers, file=out.suffix == ".safetensors")
    from esd_lora.weights.merging import merge as run

    paths, strengths = unweighted(erasers)
    if dry_run:
        from esd_lora.estimates.merging import estimate_merging

        say(*estimate_merging(paths, base, out, weights=strengths).lines(), f"would be written: {out}")
        return
    run(paths, base, out, weights=strengths, force=force)
    say(f"merged {'checkpoint' if out.is_file() else 'pipeline'}: {out}")
    if verify:
        from esd_lora.weights.verifying import verify as prove

        proof = prove(out, base, paths, weights=strengths)
        say(f"verified: {proof.touched} tensors are base + update to within rounding, {proof.untouched} others are bit-equal")


@click.command(cls=HeavyCommand)
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--layers/--no-layers", default=None, help="Show every layer; default: if there are not too many.")
def inspect(file: str, as_json: bool, layers: bool | None) -> None:
    """Show what an eraser, a stack manifest or any LoRA file removes, how much, and where it came from."""
    from esd_lora.formats.inspecting import inspect_file

    facts = inspect_file(file)
    say(*(json.dumps(facts.as_json(), indent=2).split("\n") if as_json else facts.lines(layers)))


@click.command(cls=HeavyCommand)
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
def diff(first: str, second: str) -> None:
    """Compare two LoRA files: headers, layers, and how far apart their updates are."""
    from esd_lora.formats.inspecting import diff as run

    say(*run(first, second).lines())


@click.command(cls=HeavyCommand)
@click.argument("eraser", type=click.Path())
@click.option("--layout", required=True, help="kohya (A1111, Forge, ComfyUI), diffusers, or peft.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help=".safetensors file; for peft a directory.")
@force_option
def export(eraser: str, layout: str, out: Path, force: bool) -> None:
    """Write an eraser for another program, its update unchanged."""
    from esd_lora.erasers.manifests import load_eraser
    from esd_lora.files import refuse_inputs
    from esd_lora.formats.exporting import export as run

    refuse_inputs(out, [eraser])
    say(f"{layout} LoRA: {run(load_eraser(eraser), out, layout=layout, force=force)}")


@click.command("import", cls=HeavyCommand)
@click.argument("file", type=click.Path(path_type=Path))
@_out_directory
@_concepts
@click.option("--base", metavar="NAME", help="What it was made for; default: what the file says.")
@click.option("--family", help="sd, sdxl, sd3, flux or sana, where the layers' names fit several.")
@click.option("--without-text-encoder", is_flag=True, help="Leave out layers of text encoders.")
@force_option
def import_(
    file: Path,
    out: Path,
    concepts: tuple[str, ...],
    base: str | None,
    family: str | None,
    without_text_encoder: bool,
    force: bool,
) -> None:
    """Make an eraser of a LoRA file of kohya, LECO, SPM, ai-toolkit, peft or Concept Sliders (.pt)."""
    from esd_lora.erasers.eraser import RUN_FILES
    from esd_lora.files import reserve_directory
    from esd_lora.formats.cards import save_with_card
    from esd_lora.formats.importing import import_lora

    with reserve_directory(out, force, [file]):
        eraser = import_lora(file, family=family, concepts=concepts, base=base, without_text_encoder=without_text_encoder)
        save_with_card(eraser, out, replaces=RUN_FILES)
    unknown = "; where it came from is not known" if eraser.header.origins else ""
    say(f"eraser of {', '.join(eraser.names)}, {len(eraser.pairs)} layers of family {eraser.header.family}{unknown}: {out}")


@click.command(cls=HeavyCommand)
@click.option("--base", required=True, help="What was fine-tuned: built-in base, diffusers directory, single file, Hub id.")
@click.option("--tuned", required=True, help="The result: the same, or a file with some of the denoiser's weights.")
@_out_directory
@_rank
@_energy
@_concepts
@force_option
def extract(
    base: str, tuned: str, out: Path, rank: int | None, energy: float | None, concepts: tuple[str, ...], force: bool
) -> None:
    """Turn a fully fine-tuned model, such as released ESD or UCE weights, into an eraser."""
    check(out, force, base)
    from esd_lora.erasers.eraser import RUN_FILES
    from esd_lora.files import reserve_directory
    from esd_lora.formats.cards import save_with_card
    from esd_lora.weights.extracting import extract as run

    with reserve_directory(out, force, [base, tuned]):
        result = run(base, tuned, rank=rank, energy=energy, concepts=concepts)
        save_with_card(result.eraser, out, replaces=RUN_FILES)
    for module, share in result.energy.items():
        say(f"  {module}  rank {result.eraser.pairs[module].rank}  energy kept {share:.4%}")
    say(f"energy kept over all {len(result.energy)} layers that differ: {result.overall:.4%}")
    say(f"eraser of {', '.join(result.eraser.names)}: {out}")
