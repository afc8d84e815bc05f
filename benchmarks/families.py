"""Prints the table of model families: layers, names in other programs' files, and memory, all counted without weights.

    python benchmarks/families.py

prints it twice: whole for docs/families.md, and with a row a family for README.

Layers are those of the published configurations (`tests/published_denoisers.py`, where a test counts every scope). kohya's
names are of the layers of scope `full` that have one. Memory is what the smallest setting of `--fit` plans at native size, by
dtype of the frozen denoiser. *Trained* are models of docs/families.md's table of `benchmarks/real_size.py`: steps
at published size with random weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from tables import ROOT, add_publish, show

from esd_lora.bases.outlines import outline_published
from esd_lora.families import family_named
from esd_lora.memory_plans import GIB, plans
from esd_lora.recipe_files import load_recipe
from published_denoisers import DENOISERS, SCOPE_COUNTS, denoiser

ALONE, WITH_CONFIG, MERGED, NONE = "read alone", "`--base-config`", "merged into", "no"
"""How single files are taken: as they are, beside a directory of the architecture, for merging alone, or not at all."""
DTYPES = ("bfloat16", "int8", "nf4")


class Row(NamedTuple):
    """What nothing counts."""

    bases: str
    prediction: str
    single_file: str
    toy: str
    outline: str | None
    """Name among `outlines.PUBLISHED`, where its configurations ship."""


ROWS = {
    "sd15": Row("Stable Diffusion 1.4, 1.5; LCM", "noise", ALONE, "`sd`", "SD 1.5"),
    "sd21": Row("Stable Diffusion 2.0, 2.1", "noise or v", ALONE, "`sd2-v`", None),
    "sdxl": Row("SDXL base 1.0", "noise", ALONE, "`sdxl`", "SDXL"),
    "sd3": Row("Stable Diffusion 3 medium", "flow", WITH_CONFIG, "`sd3`", None),
    "sd35-medium": Row("Stable Diffusion 3.5 medium", "flow", WITH_CONFIG, "`sd35`", "SD 3.5 medium"),
    "flux": Row("Flux.1 dev, schnell", "flow", WITH_CONFIG, "`flux-dev`, `flux-schnell`", "Flux.1 dev"),
    "flux2-klein-4b": Row("Flux.2 Klein 4B", "flow", WITH_CONFIG, "`flux2-klein`", "Flux.2 Klein 4B"),
    "flux2-klein-9b": Row("Flux.2 Klein 9B", "flow", WITH_CONFIG, "`flux2-klein`", "Flux.2 Klein 9B"),
    "flux2-dev": Row("Flux.2 dev", "flow", WITH_CONFIG, "`flux2-dev`", "Flux.2 dev"),
    "qwen-image": Row("Qwen-Image", "flow", WITH_CONFIG, "`qwen-image`", "Qwen-Image"),
    "z-image": Row("Z-Image, Z-Image-Turbo", "flow", WITH_CONFIG, "`z-image`", "Z-Image Turbo"),
    "lumina2": Row("Lumina Image 2.0", "flow", WITH_CONFIG, "`lumina2`", "Lumina 2"),
    "pixart-sigma": Row("PixArt-Sigma XL", "noise", MERGED, "`pixart`", "PixArt-Sigma"),
    "kolors": Row("Kolors", "noise", NONE, "`kolors`", "Kolors"),
    "sana": Row("Sana 1.6B", "flow", NONE, "`sana`", None),
    "wan-1.3b": Row("Wan 2.1 T2V 1.3B", "flow, of videos", WITH_CONFIG, "`wan`", "Wan 2.1 1.3B"),
    "wan-5b": Row("Wan 2.2 TI2V 5B", "flow, of videos", WITH_CONFIG, "`wan`", "Wan 2.2 5B"),
    "wan-14b": Row("Wan 2.1 T2V 14B", "flow, of videos", WITH_CONFIG, "`wan`", "Wan 2.1 14B"),
}


def trained() -> set[str]:
    """Return the models that were trained at published size: those of the table that `benchmarks/real_size.py` printed."""
    page = (ROOT / "docs" / "families.md").read_text("utf-8")
    return {model for model in ROWS if f"| {model} | {DENOISERS[model][0]}, " in page}


def memory(outline: str | None) -> str:
    """Return the GiB of a card that the smallest setting of each dtype takes: `8.2, 5.9, 4.8`."""
    if outline is None:
        return "not planned"
    base = outline_published(outline)
    least = {
        plan.setting.dtype: plan.needed / GIB
        for plan in plans(base, load_recipe(base.family.preset, concepts=["a cat"]), DTYPES, 0)
    }
    return ", ".join(f"{least[dtype]:.1f}" for dtype in DTYPES)


def short(rows: list[list[str]]) -> list[list[str]]:
    """Return the rows of README's table: models of a family share one, where they differ each with its own figure."""
    families: dict[str, list[list[str]]] = {}
    for row in rows:
        families.setdefault(row[0], []).append(row)
    table: list[list[str]] = []
    for name, members in families.items():
        columns = list(zip(*members, strict=True))
        layers = [f"{counts.split(', ')[0]} / {counts.split(', ')[-1]}" for counts in columns[3]]
        cells = (
            "; ".join(dict.fromkeys(column)) for column in (columns[1], layers, columns[4], columns[5], columns[7], columns[8])
        )
        table.append([name, *cells])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_publish(parser)
    options = parser.parse_args()
    table: list[list[str]] = []
    for model, row in ROWS.items():
        family, counts = family_named(DENOISERS[model][0]), SCOPE_COUNTS[model]
        layers = family.modules(denoiser(model), "full")
        named = sum(path in family.kohya_names() for path in layers)
        size = "trained" if model in trained() else "counted"
        scopes = ", ".join(str(count) for count in counts.values())
        names = ("all" if named == len(layers) else f"{named} of {len(layers)}") if named else "diffusers' own"
        cells = [f"`{family.name}`", row.bases, row.prediction, scopes, row.single_file, names, row.toy, size]
        table.append([*cells, memory(row.outline)])
        print(model, table[-1], flush=True)
    memories = f"GiB planned: {', '.join(DTYPES)}"
    scopes = ", ".join(f"`{scope}`" for scope in SCOPE_COUNTS["sd15"])
    head = [
        "family",
        "bases",
        "prediction",
        f"layers: {scopes}",
        "single file",
        "kohya's names",
        "toy",
        "published size",
        memories,
    ]
    note = (
        "Published size: steps with random weights, or layers counted alone. GiB: the family's preset, planned, not measured."
    )
    show("families", head, table, note, publish=options.publish)
    head = ["family", "bases", "layers `xattn` / `full`", "single file", "kohya's names", "published size", memories]
    show("models", head, short(table), note, publish=options.publish)


if __name__ == "__main__":
    main()
