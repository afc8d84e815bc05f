"""Stacks as the page makes and shows them: the command lines, how members interfere, and what a stack has become."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.erasers.manifests import load_eraser
from esd_lora.erasers.stacking import stack
from esd_lora.errors import EsdLoraError
from esd_lora.ui.markup import Cell, figures, heat_map
from esd_lora.wording import eraser_name

if TYPE_CHECKING:
    from esd_lora.bases.base import Base

How: TypeAlias = Literal["closed form", "harmonise", "sum"]
"""How members become one: solved on a base, distilled on a base, or added up."""


class Weighted(NamedTuple):
    """An eraser, and how strongly it is on."""

    place: str
    """Directory, file, manifest, or Hub id."""
    weight: float = 1.0

    def argument(self) -> str:
        """Return it as commands take it: `PATH:WEIGHT`."""
        return f"{self.place}:{self.weight:g}"


def check_weighted(erasers: Sequence[Weighted], least: int = 1) -> None:
    """Refuse a choice of erasers that no command takes.

    Raises:
        EsdLoraError: If there are too few, one stands twice, or a strength is no number.
    """
    if len(erasers) < least:
        raise EsdLoraError(f"{len(erasers) or 'no'} eraser{'s' * (len(erasers) != 1)} chosen: choose {least} or more.")
    places = [eraser.place for eraser in erasers]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise EsdLoraError(f"{twice} is chosen twice. Choose it once, at the strength of both together.")
    for place, weight in erasers:
        if place.startswith("-"):  # which a command would take for an option
            raise EsdLoraError(f"{place} is no eraser: its name begins with a dash. Give its path, such as ./{place}.")
        if not math.isfinite(weight):
            raise EsdLoraError(f"the strength of {place} is no number. Give one, such as 1.")


def output_name(erasers: Sequence[Weighted]) -> str:
    """Return a name for what is made of erasers: `no-cat-pizza`.

    Raises:
        EsdLoraError: If one cannot be read.
    """
    names = [name for eraser in erasers for name in load_eraser(eraser.place).names]
    return eraser_name(names)


def stack_command(
    erasers: Sequence[Weighted], how: How, base: str, out: Path, *, rank: int | None = None, energy: float | None = None
) -> list[str]:
    """Return the arguments of `esd-lora` that make one eraser of several.

    Args:
        erasers: The members.
        how: How they become one.
        base: The base that they were trained on; of no account for a sum.
        out: Directory to make.
        rank: Highest rank of a layer.
        energy: Share of every layer's effect to keep; not for harmonising.

    Raises:
        EsdLoraError: If the choice of erasers is none, or `how` needs a base and there is none.
    """
    check_weighted(erasers)
    if how != "sum" and not base:
        raise EsdLoraError("fusing and harmonising read and train on a base: choose the base of the erasers.")
    if how == "harmonise" and energy:
        raise EsdLoraError("a share of effect to keep goes with the closed form and the sum: harmonising takes a rank alone.")
    options = ["--fuse=sum"] if how == "sum" else [f"--base={base}"]
    options += ["--harmonise"] if how == "harmonise" else []
    options += [f"--rank={rank}"] if rank else []
    options += [f"--energy={energy:g}"] if energy else []
    return ["stack", *(eraser.argument() for eraser in erasers), *options, f"--out={out}"]


def merge_command(erasers: Sequence[Weighted], base: str, out: Path) -> list[str]:
    """Return the arguments of `esd-lora` that merge erasers into a base, and prove every tensor of the result.

    Raises:
        EsdLoraError: If the choice of erasers is none, or there is no base.
    """
    check_weighted(erasers)
    if not base:
        raise EsdLoraError("nothing to merge into: choose a base.")
    return ["merge", *(eraser.argument() for eraser in erasers), f"--base={base}", "--verify", f"--out={out}"]


def merged_name(name: str, base: str) -> str:
    """Return the name of a merged base: that of a file for a base that is one file, else of a directory."""
    single = base.lower().endswith(".safetensors")
    return f"{name.removesuffix('.safetensors')}.safetensors" if single else name


def estimate_stack(erasers: Sequence[Weighted], how: How, base: Base | None = None) -> str:
    """Return what making a stack takes, in a sentence.

    Args:
        erasers: The members.
        how: How they become one.
        base: The loaded base; of no account for a sum.

    Raises:
        EsdLoraError: If they do not fit each other or the base.
    """
    from esd_lora.estimates.stacking import estimate_fusing, estimate_harmonising

    check_weighted(erasers)
    members, weights = [load_eraser(eraser.place) for eraser in erasers], [eraser.weight for eraser in erasers]
    if how == "sum" or base is None:
        stack(members, weights)
        return "A moment: a sum of weights, no base is needed."
    estimate = (estimate_harmonising if how == "harmonise" else estimate_fusing)(members, base, weights=weights)
    return f"{estimate.sentence()} The eraser will have {estimate.eraser / 1e6:,.1f} MB."


def estimate_merge(erasers: Sequence[Weighted], base: str, out: Path) -> str:
    """Return what a merge takes, in sentences.

    Args:
        erasers: What is merged.
        base: What it is merged into.
        out: Where the result goes.

    Raises:
        EsdLoraError: If base or erasers cannot be read or do not fit.
    """
    from esd_lora.estimates.estimate import spell_time
    from esd_lora.estimates.merging import estimate_merging

    check_weighted(erasers)
    estimate = estimate_merging([eraser.place for eraser in erasers], base, out, weights=[eraser.weight for eraser in erasers])
    room = "" if estimate.free >= estimate.size else f" Only {estimate.free / 1e6:,.0f} MB are free there: make room."
    return (
        f"{estimate.changed} of {estimate.tensors} tensors change. {estimate.size / 1e6:,.0f} MB are read and written:"
        f" {spell_time(estimate.seconds)} as fast as copying goes here, and about as long again to verify; below 200 MB of"
        f" memory.{room}"
    )


def export_for_others(place: str, folder: Path) -> Path:
    """Write the file of an eraser that ComfyUI, A1111 and Forge load, and return it.

    Args:
        place: The eraser.
        folder: Where the file goes, in `kohya/`; one that is there of the same name is replaced.

    Raises:
        EsdLoraError: If the eraser cannot be read, or its layers have no names there.
    """
    from esd_lora.formats.exporting import export

    eraser = load_eraser(place)
    return export(eraser, folder / "kohya" / f"{eraser_name(eraser.names)}.safetensors", layout="kohya", force=True)


def interference(erasers: Sequence[Weighted], base: Base | None = None) -> str:
    """Return how members interfere, as heat maps in HTML.

    Args:
        erasers: Two or more.
        base: A loaded base, to measure what they do there as well: short trajectories under their own prompts.

    Raises:
        EsdLoraError: If they are fewer, or do not fit each other or the base.
    """
    from esd_lora.fusing.interference import measure_interference

    check_weighted(erasers, 2)
    members = [load_eraser(eraser.place) for eraser in erasers]
    report = measure_interference(members, [eraser.weight for eraser in erasers], base=base)
    names = report.names
    maps = [
        heat_map("Read overlap", "0: they read different directions; 1: the same", names, report.reads),
        heat_map("Write overlap", "0: they write different directions; 1: the same", names, report.writes),
        heat_map("Cosine of updates", "below 0: they work against each other; near 1: they are the same", names, report.cosine),
    ]
    if report.effect and report.together:
        rows = [[*row, more] for row, more in zip(report.effect, report.together, strict=True)]
        scale = "1: as much as the row's own eraser does; last: how far the sum of all is from that eraser alone"
        maps.insert(0, heat_map("Effect on the row's prompts", scale, names, rows, last_column="in the sum"))
    return f'<div class="maps">{"".join(maps)}</div>'


def describe_stack(place: str) -> str:
    """Return what an eraser or a stack is, in HTML: what it erases, how it was made, its ranks, what was lost.

    Raises:
        EsdLoraError: If it cannot be read.
    """
    eraser = load_eraser(place)
    header = eraser.header
    ranks = sorted({pair.rank for pair in eraser.pairs.values()})
    rows = {
        "Where": place,
        "Erases": ", ".join(concept.describe() for concept in header.concepts),
        "Made for": header.base,
        "Layers": f"{len(eraser.pairs)}, {f'ranks {ranks[0]} to {ranks[-1]}' if len(ranks) > 1 else f'rank {ranks[0]}'}",
        "Size": _size(place, eraser),
    }
    joined = [step.describe() for step in (*header.fusions, *header.distillations)]
    if made := joined or header.making():
        rows["How it was made"] = "; ".join(made)
    return figures(rows | losses(eraser))


def losses(eraser: Eraser) -> dict[str, str]:
    """Return what became of the members in a stack that was made of them: names to sentences; nothing of a single eraser."""
    header, dropped = eraser.header, tuple[str, ...]()
    lost = ""
    if header.distillations:
        made = header.distillations[-1]
        dropped = made.dropped
        if made.first_loss and made.last_loss is not None:
            lost = f"by the end of distilling it missed {made.last_loss / made.first_loss:.0%} of what it missed at the start"
    elif header.fusions:
        made = header.fusions[-1]
        dropped = made.dropped
        if made.objective is not None and made.objective_summed is not None:
            lost = f"it misses {made.objective:.0%} of what no eraser at all would; their plain sum {made.objective_summed:.0%}"
    elif len(header.concepts) > 1:
        lost = "a plain sum: each does all that it did, and what each costs everything else adds up"
    rows = {"What is lost": lost, "Not kept, as it names what is erased": "; ".join(dropped)}
    if header.truncation:
        rows["Cut off by lower ranks"] = f"{header.truncation:.2%} of the update"
    return {name: text for name, text in rows.items() if text}


def describe_merged(place: str, log: str) -> str:
    """Return what was checked of a merged base, in HTML.

    Args:
        place: Where it lies.
        log: What the command printed.
    """
    rows: dict[str, str | Cell] = {"Where": place}
    if proof := re.search(
        r"^verified: (\d+) tensors are base \+ update to within rounding, (\d+) others are bit-equal$", log, re.M
    ):
        rows |= {
            f"{proof[1]} tensors that erasers change": Cell(
                "each value is the base's plus the update, to within rounding", "good"
            ),
            f"{proof[2]} other tensors": Cell("bit for bit the base's", "good"),
        }
        if not place.endswith(".safetensors"):
            rows["all other files"] = Cell("byte for byte the base's", "good")
    else:
        rows["Verified"] = Cell("no: the log does not say so", "bad")
    return figures(rows)


def _size(place: str, eraser: Eraser) -> str:
    file = Path(place) / WEIGHTS_NAME
    size = file.stat().st_size if file.is_file() else sum(x.numel() * x.element_size() for x in eraser.state_dict().values())
    return f"{size / 1e6:,.2f} MB"
