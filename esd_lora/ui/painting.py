"""Pictures for the page: before and after, from the same seeds; the base's own are painted once and kept."""

from __future__ import annotations

import shlex
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from esd_lora.errors import EsdLoraError
from esd_lora.ui.workplace import Workplace

if TYPE_CHECKING:
    from PIL.Image import Image

    from esd_lora.bases.base import Base
    from esd_lora.gating import Gate

_MOST_KEPT = 64  # sets of pictures of a base
_MOST_STRENGTHS = 8  # rows of a grid


class Scene(NamedTuple):
    """What a base paints without any eraser."""

    base: str
    """Name as the page has it."""
    prompt: str
    seed: int = 0
    """Seed of the first picture."""
    count: int = 1
    """Number of pictures, from as many seeds in a row."""
    steps: int | None = None
    """Denoising steps; the base's default unless given."""
    guidance: float | None = None
    """Classifier-free guidance scale; the base's default unless given."""

    @property
    def seeds(self) -> range:
        """The seed of every picture."""
        return range(self.seed, self.seed + self.count)


class Applied(NamedTuple):
    """Erasers, and how they are on."""

    erasers: tuple[str, ...]
    """Names as the page has them."""
    strengths: tuple[float, ...]
    gate: float | None = None
    """Threshold of a gate; without one they are on for every prompt."""


@dataclass
class Painted:
    """Pictures of one scene."""

    before: list[Image]
    after: list[Image]
    kept: bool
    """Whether those before were painted earlier."""
    gate: str
    """What the gate did, in words; empty without one."""


class Painter:
    """Paints on the bases of a workplace."""

    def __init__(self, workplace: Workplace):
        self.workplace = workplace
        self._before: OrderedDict[Scene, list[Image]] = OrderedDict()

    def paint(self, scene: Scene, applied: Applied) -> Painted:
        """Paint a scene without and with erasers.

        Raises:
            EsdLoraError: If there is no prompt, or a base or an eraser cannot be loaded or do not fit each other.
        """
        with self.workplace.base_in_use(scene.base) as base:
            kept = scene in self._before
            before, after, gate = self._sweep(base, scene, applied, (1.0,))
        return Painted(before, after[1.0], kept, gate)

    def paint_strengths(self, scene: Scene, applied: Applied, strengths: Sequence[float]) -> dict[float, list[Image]]:
        """Paint a scene at several strengths of all erasers together.

        Args:
            scene: What to paint.
            applied: With their own strengths, which are multiplied.
            strengths: Factors on top; 0 is the base, below 0 the concepts are amplified.

        Raises:
            EsdLoraError: As `paint` does, or if no eraser is chosen, or there are no strengths or too many.
        """
        if not applied.erasers:
            raise EsdLoraError("no eraser is chosen whose strength to change. Choose one.")
        if not 0 < len(strengths) <= _MOST_STRENGTHS:
            raise EsdLoraError(f"{len(strengths)} strengths: expected 1 to {_MOST_STRENGTHS}, such as -1, 0, 0.5, 1, 1.5.")
        with self.workplace.base_in_use(scene.base) as base:
            before, after, _ = self._sweep(base, scene, applied, [strength for strength in strengths if strength])
        return {strength: after[strength] if strength else before for strength in strengths}

    def _sweep(
        self, base: Base, scene: Scene, applied: Applied, strengths: Sequence[float]
    ) -> tuple[list[Image], dict[float, list[Image]], str]:
        """Return the pictures of the base, those at every strength, and what a gate did."""
        from esd_lora.erasers.manifests import load_eraser
        from esd_lora.gating import Gate
        from esd_lora.sampling import generate, sweep

        if not scene.prompt.strip():
            raise EsdLoraError("there is no prompt. Write what to paint.")
        members = [load_eraser(self.workplace.place(name)) for name in applied.erasers]
        options: dict[str, Any] = {"seeds": scene.seeds, "steps": scene.steps, "guidance": scene.guidance}
        if scene not in self._before:
            while len(self._before) >= _MOST_KEPT:
                self._before.popitem(last=False)
            self._before[scene] = generate(base, [scene.prompt], **options)
        self._before.move_to_end(scene)
        before = self._before[scene]
        if not any(applied.strengths):
            return before, dict.fromkeys(strengths, before), ""
        gate = None if applied.gate is None else Gate(base, members, threshold=applied.gate)
        options |= {"erasers": members, "weights": applied.strengths, "gate": gate}
        after = sweep(base, [scene.prompt], strengths, **options)
        return before, after, _gate_in_words(gate, scene.prompt, applied.erasers) if gate else ""


def _gate_in_words(gate: Gate, prompt: str, names: Sequence[str]) -> str:
    """Return how far each eraser was on for a prompt, and why."""
    parts: list[str] = []
    for name, similarity, factor in zip(names, gate.similarities(prompt), gate(prompt), strict=True):
        state = "off" if not factor else "on" if factor == 1 else f"on at {factor:.0%}"
        parts.append(f"{name} {state} (similarity {similarity:.2f})")
    return f"Gate: {', '.join(parts)}."


def settings_of(scene: Scene, applied: Applied) -> dict[str, Any]:
    """Return what repeats a picture, for JSON: keywords of `esd_lora.generate`, and the command that does the same."""
    keywords: dict[str, Any] = {
        "base": scene.base,
        "prompts": [scene.prompt],
        "erasers": list(applied.erasers),
        "weights": list(applied.strengths),
        "seeds": list(scene.seeds),
        "steps": scene.steps,
        "guidance": scene.guidance,
    }
    return {"generate": keywords, "gate_threshold": applied.gate, "command": command_of(scene, applied)}


def command_of(scene: Scene, applied: Applied, strengths: Sequence[float] = ()) -> str:
    """Return the command line that paints a scene, before and after.

    Args:
        scene: What it paints.
        applied: Erasers, and how they are on.
        strengths: Of a grid, if one is wanted.
    """
    words = ["esd-lora", "generate", "--base", scene.base]
    for name, strength in zip(applied.erasers, applied.strengths, strict=True):
        words += ["--eraser", f"{name}:{strength:g}"]
    if applied.gate is not None:
        words += ["--gate-threshold", f"{applied.gate:g}"]
    if strengths:
        words.append(f"--strengths={','.join(format(strength, 'g') for strength in strengths)}")
    words += ["--seed", str(scene.seed), "-n", str(scene.count)]
    words += [] if scene.steps is None else ["--steps", str(scene.steps)]
    words += [] if scene.guidance is None else ["--guidance", f"{scene.guidance:g}"]
    return shlex.join([*words, "--compare", "-o", "pictures", "--", scene.prompt])
