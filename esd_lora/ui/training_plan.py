"""What the tab *Erase* asks `esd-lora train` to do: its arguments, checked, and what they will take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from esd_lora.errors import EsdLoraError
from esd_lora.files import fresh_output
from esd_lora.ui.workplace import Workplace
from esd_lora.wording import eraser_name

if TYPE_CHECKING:
    from esd_lora.estimates.estimate import Estimate
    from esd_lora.recipe import Recipe

EVERYWHERE = "instant"
"""Preset that goes with every base: the closed form alone."""
SMALL_ALONE = "thorough"
"""Preset whose numbers were measured on small bases."""


class TrainingPlan(NamedTuple):
    """An eraser to be trained."""

    concepts: tuple[str, ...]
    base: str
    """As `--base` takes it."""
    preset: str
    kept: tuple[str, ...] = ()
    """Prompts to keep beside the base's own list."""
    guard: tuple[str, ...] = ()
    """Prompts that no update touches, or a number alone: so many, chosen."""
    anchor: str = ""
    """What should appear instead; chosen unless given, `none` for the empty prompt."""
    out: str = ""
    """Name of the folder to be made, in the workplace."""

    @classmethod
    def read(
        cls, workplace: Workplace, concepts: str, kept: str, guard: str, anchor: str, preset: str, base: str, out: str
    ) -> TrainingPlan:
        """Return the plan that the inputs of a page describe, one thing a line.

        Raises:
            EsdLoraError: If there is nothing to erase, or the eraser's name is taken.
        """
        names = _lines(concepts)
        if not names:
            raise EsdLoraError("there is nothing to erase. Write a concept, such as a cat; several, one a line.")
        name = workplace.new_output(out) if out.strip() else fresh_output(workplace.folder / eraser_name(names)).name
        return cls(names, workplace.place(base), preset, _lines(kept), _lines(guard), anchor.strip(), name)

    def arguments(self) -> list[str]:
        """Return what stands behind `esd-lora` on the command line."""
        words = ["train", self.preset, f"--base={self.base}"]
        words += [f"--concept={name}" for name in self.concepts]
        words += [f"--guard={text}" for text in self.guard]
        words += [f"--anchor={self.anchor}"] if self.anchor else []
        words += [f"--set={key}={_in_a_line(value)}" for key, value in self._overrides().items()]
        return [*words, f"--out={self.out}"]

    def recipe(self) -> Recipe:
        """Return the recipe that the command line makes of it.

        Raises:
            EsdLoraError: With every fault of it.
        """
        from esd_lora.recipe_files import load_recipe

        instead = "" if self.anchor == "none" else self.anchor or None
        fields: dict[str, Any] = {"concepts": [{"name": name, "anchor": instead} for name in self.concepts], "base": self.base}
        if self.guard:
            number = len(self.guard) == 1 and self.guard[0].isdecimal()
            fields["guard"] = int(self.guard[0]) if number else self.guard
        return load_recipe(self.preset, self._overrides(), **fields)

    def explain(self, workplace: Workplace) -> tuple[Estimate, list[str]]:
        """Return what the training will take, and what it chooses and why.

        Raises:
            EsdLoraError: If the recipe has faults, or the base cannot be loaded.
        """
        from esd_lora.estimates.choices import explain_choices
        from esd_lora.estimates.training import estimate_training

        recipe = self.recipe()
        with workplace.base_in_use(self.base) as base:
            choices = explain_choices(recipe, base)
            return estimate_training(recipe, base), choices.lines()

    def _overrides(self) -> dict[str, Any]:
        """Return the recipe's fields for which the command line has no option of its own."""
        return {"neighbours": {"vocabulary": list(self.kept), "count": len(self.kept)}} if self.kept else {}


def presets_for(base: str) -> list[str]:
    """Return the presets that train on a base, the usual one first.

    Raises:
        EsdLoraError: If the base is of no known family, or its index cannot be read or fetched.
    """
    from esd_lora.bases.presets import preset_for
    from esd_lora.recipe_files import DEFAULT_PRESET

    usual = preset_for(base)
    return [usual, EVERYWHERE, *([SMALL_ALONE] if usual == DEFAULT_PRESET else [])]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def _in_a_line(value: Any) -> str:
    """Return a value as YAML in one line."""
    import json

    return json.dumps(value, ensure_ascii=False)
