"""What an eraser's header says, in words: for its card, other programs' metadata, and `inspect`."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from esd_lora.erasers.measured import TITLES, role_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esd_lora.erasers.header import ErasedConcept, EraserHeader
    from esd_lora.erasers.measured import Measured, Number


def base_hash(header: EraserHeader) -> str:
    """One hash for the base's weights under all the layers that an eraser touches, 16 hex digits."""
    return hashlib.sha256(json.dumps(header.base_hashes, sort_keys=True).encode()).hexdigest()[:16]


def effect(concepts: Sequence[ErasedConcept]) -> str:
    """What the eraser does to a base, concept by concept, strengths included where they are not 1."""

    def told(chosen: list[ErasedConcept]) -> str:
        return ", ".join(
            c.name if c.weight == 1 and not c.blocks else f"{c.name} (at strength {c.weight:g}{_blocks(c)})" for c in chosen
        )

    removed, amplified = [c for c in concepts if c.weight >= 0], [c for c in concepts if c.weight < 0]
    effects = [f"removes {told(removed)}"] * bool(removed) + [f"amplifies {told(amplified)}"] * bool(amplified)
    return " and ".join(effects)


def making(header: EraserHeader) -> list[str]:
    """How a stack was fused and harmonised, a line each."""
    lines: list[str] = []
    for fusion in header.fusions:
        text = (
            f"fused from {len(fusion.members)} erasers beside {fusion.kept} kept prompts (lam {fusion.lam:g}, mu {fusion.mu:g})"
        )
        if fusion.objective is not None:
            text += f": objective {fusion.objective:.2f} of no update's, plain sum {fusion.objective_summed:.2f}"
        lines.append(f"{text}; {fusion.evaluations} evaluations of the base, {fusion.seconds:.0f} s")
    for spent in header.distillations:
        text = f"harmonised in {spent.steps} steps"
        if spent.last_loss is not None:
            text += f": loss {spent.first_loss:.2g} to {spent.last_loss:.2g}"
        lines.append(f"{text}; {spent.evaluations} evaluations, {spent.seconds:.0f} s")
    return lines


def measured(header: EraserHeader) -> str:
    """The numbers on what was erased, in a line."""
    found = header.evaluation
    if found is None:
        return "no"
    targets = [
        f"{metric} {number.text()} ({name})" for role, name, metric, number in measured_numbers(found) if role == "target"
    ]
    return f"suite {found.suite}, {found.date}: {'; '.join(targets)}"


def measured_numbers(found: Measured) -> list[tuple[str, str, str, Number]]:
    """Role, model, metric and number of everything measured."""
    return [(role, *row) for role in TITLES for row in role_rows(found.variants, role)]


def _blocks(concept: ErasedConcept) -> str:
    return "".join(f", {block} x {factor:g}" for block, factor in concept.blocks.items())
