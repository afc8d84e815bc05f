# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The esd-lora authors
"""The nodes: each takes a model and files by name, and returns a patched copy of the model with a note of what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths  # pyright: ignore[reportMissingImports]

from .errors import EraserError, printable
from .files import LoraFile, read_lora
from .gating import factor, nearness
from .patches import Updates, differing, patched, stack, text_updates_of, updates_of
from .strengths import Strength, parse_blocks

SLOTS = 5
"""Erasers in one Stack erasers; several such nodes in a row add up just as exactly."""
NONE = "none"
"""What a slot of Stack erasers says that is not used."""
_BLOCKS = (
    "Factors by part of the model on top of the strength, as diffusers names it: mid=0.5,up.1=0. A longer path counts before a"
    " shorter one: down=0.5,down.2.attentions=1."
)
_MODEL = ("MODEL", {"tooltip": "The model that the eraser was made for, or a fine-tune of it."})
_CLIP = ("CLIP", {"tooltip": "Only for files that change the text encoder: styles, and erasers of scope text-encoder."})


def _strength(what: str) -> tuple[str, dict[str, Any]]:
    tooltip = f"{what} 1 is as trained, 0 off; below 0 the concept is amplified."
    return "FLOAT", {"default": 1.0, "min": -2.0, "max": 2.0, "step": 0.05, "tooltip": tooltip}


def _blocks() -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": "", "tooltip": _BLOCKS}


def _files() -> list[str]:
    """Return the names of the files in models/loras, and wherever else ComfyUI looks for LoRA files."""
    return folder_paths.get_filename_list("loras")


def _read(name: str) -> LoraFile:
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise EraserError(f"{name} is not in models/loras: put the eraser there and press R.")
    return read_lora(path, name)


def _stamp(*names: str | None) -> str:
    """Return what changes when a file does, so that an eraser trained anew is read anew."""
    paths = [folder_paths.get_full_path("loras", name) for name in names if name and name != NONE]
    return str([path and Path(path).stat().st_mtime_ns for path in paths])


class _Applied:
    """Updates of some files, gathered for a model and its text encoders, with a note on each."""

    def __init__(self, model: Any, clip: Any):
        self.model, self.clip = model, clip
        self.notes: list[str] = []
        self._members: list[Updates] = []
        self._texts: list[Updates] = []

    def add(self, file: LoraFile, strength: Strength, why: str = "") -> None:
        """Add a file at a strength.

        Args:
            file: An eraser, or any plain LoRA.
            strength: Everywhere and by block.
            why: What the note says before it.

        Raises:
            EraserError: If it does not fit the model.
        """
        updates, missing = updates_of(self.model, file, strength)
        texts, untouched = text_updates_of(self.clip, file, strength.weight)
        self._members.append(updates)
        self._texts.append(texts)
        blocks = "".join(f", {block} x {value:g}" for block, value in strength.blocks.items())
        note = f"{file.name}: {why}{file.effect(strength.weight)}, at strength {strength.weight:g}{blocks}"
        note += f" ({len(updates)} weights changed)" if updates or not texts else ""
        if texts:
            note += f", with {len(texts)} weights of the text encoder"
        if untouched:
            remedy = "connect its CLIP" if self.clip is None else "they are of another one"
            note += f"; {len(untouched)} layers of the text encoder are left out: {remedy}"
        if missing:
            note += f"; {len(missing)} layers fit no weight of this model and are left out"
        changed, compared = differing(self.model, file.header) if file.header else (0, 0)
        if changed and file.header:
            note += f"; {changed} of {compared} weights compared are not those of {file.header.base}, which it was trained on"
            note += ": look at what it erases here"
        self.notes.append(printable(f"{note}."))

    def result(self) -> tuple[Any, Any, str]:
        """Return model, CLIP and note; what nothing is added to is handed on as it is."""
        updates, texts = stack(self._members), stack(self._texts)
        model = patched(self.model, updates) if updates else self.model
        return model, patched(self.clip, texts) if texts else self.clip, "\n".join(self.notes)


class LoadEraser:
    """Applies one eraser, or any plain LoRA, to a model."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {
            "model": _MODEL,
            "eraser": (_files(), {"tooltip": "From models/loras: esd-lora's own file, or one under kohya's names."}),
            "strength": _strength("Strength of the eraser."),
            "blocks": _blocks(),
        }
        return {"required": required, "optional": {"clip": _CLIP}}

    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("MODEL", "CLIP", "note")
    OUTPUT_TOOLTIPS = ("The model with the concept erased.", "The CLIP that was connected.", "What was done, in a sentence.")
    FUNCTION = "load"
    CATEGORY = "esd-lora"
    DESCRIPTION = "Loads an eraser of esd-lora as it is, or a LoRA file under kohya's names, with a strength by block."

    @classmethod
    def IS_CHANGED(cls, eraser: str | None = None, **_: Any) -> str:
        return _stamp(eraser)

    def load(self, model: Any, eraser: str, strength: float, blocks: str, clip: Any = None) -> tuple[Any, Any, str]:
        """Return the model with the eraser on it, the CLIP, and a note.

        Args:
            model: ComfyUI's `ModelPatcher`.
            eraser: Name of a file in models/loras.
            strength: -2 to 2.
            blocks: Such as `mid=0.5,up.1=0`.
            clip: ComfyUI's `CLIP`.

        Raises:
            EraserError: If the file cannot be read or does not fit.
        """
        applied = _Applied(model, clip)
        applied.add(_read(eraser), Strength(strength, parse_blocks(blocks)))
        return applied.result()


class StackErasers:
    """Applies several erasers at once, exactly: the sum of what each alone would add."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required: dict[str, Any] = {"model": _MODEL}
        for slot in range(1, SLOTS + 1):
            required[f"eraser_{slot}"] = ([NONE, *_files()], {"tooltip": "A file from models/loras, or none."})
            required[f"weight_{slot}"] = _strength(f"Strength of eraser {slot}.")
            required[f"blocks_{slot}"] = _blocks()
        return {"required": required, "optional": {"clip": _CLIP}}

    RETURN_TYPES = LoadEraser.RETURN_TYPES
    RETURN_NAMES = LoadEraser.RETURN_NAMES
    OUTPUT_TOOLTIPS = ("The model with all concepts erased.", "The CLIP that was connected.", "What was done, a line each.")
    FUNCTION = "stack"
    CATEGORY = "esd-lora"
    DESCRIPTION = "Adds up to five erasers exactly: their ranks stand side by side, and nothing is cut. For more, chain it."

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        return _stamp(*(inputs.get(f"eraser_{slot}") for slot in range(1, SLOTS + 1)))

    def stack(self, model: Any, clip: Any = None, **slots: Any) -> tuple[Any, Any, str]:
        """Return the model with all erasers on it, the CLIP, and a note.

        Args:
            model: ComfyUI's `ModelPatcher`.
            clip: ComfyUI's `CLIP`.
            slots: `eraser_1`, `weight_1`, `blocks_1` and so on.

        Raises:
            EraserError: If a file cannot be read or does not fit.
        """
        applied, seen = _Applied(model, clip), set[str]()
        for slot in range(1, SLOTS + 1):
            name = slots.get(f"eraser_{slot}", NONE)
            if name != NONE:
                strength = Strength(slots[f"weight_{slot}"], parse_blocks(slots[f"blocks_{slot}"]))
                applied.add(_read(name), strength, "once more, so both strengths add up: " if name in seen else "")
                seen.add(name)
        applied.notes = applied.notes or ["Nothing is stacked: choose an eraser."]
        return applied.result()


class GateByPrompt:
    """Applies one eraser for the prompts that name what it removes or come near it, and leaves the model alone for others."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        threshold = "Similarity from which the eraser is on; it is fully on at 1. At a threshold of 1 names alone turn it on."
        names = "Further names of what is erased, with commas between. Needed for files that are no erasers of esd-lora."
        prompt = "The prompt that the picture is painted with: connect the text that goes to CLIP Text Encode."
        required = {
            "model": _MODEL,
            "clip": ("CLIP", {"tooltip": "The text encoder of the checkpoint, which compares prompt and concept."}),
            "prompt": ("STRING", {"default": "", "multiline": True, "tooltip": prompt}),
            "eraser": (_files(), {"tooltip": "From models/loras; its header says what it removes."}),
            "strength": _strength("Strength where the gate is fully open."),
            "blocks": _blocks(),
            "threshold": ("FLOAT", {"default": 0.95, "min": 0.01, "max": 1.0, "step": 0.01, "tooltip": threshold}),
            "names": ("STRING", {"default": "", "tooltip": names}),
        }
        return {"required": required}

    RETURN_TYPES = LoadEraser.RETURN_TYPES
    RETURN_NAMES = LoadEraser.RETURN_NAMES
    OUTPUT_TOOLTIPS = ("The model, with the eraser on it or not.", "The CLIP that was connected.", "Similarity, and on or off.")
    FUNCTION = "gate"
    CATEGORY = "esd-lora"
    DESCRIPTION = "Turns an eraser on for prompts near its concepts alone; any other prompt gets the model as it was."

    @classmethod
    def IS_CHANGED(cls, eraser: str | None = None, **_: Any) -> str:
        return _stamp(eraser)

    def gate(
        self, model: Any, clip: Any, prompt: str, eraser: str, strength: float, blocks: str, threshold: float, names: str
    ) -> tuple[Any, Any, str]:
        """Return the model, with the eraser on it if the prompt is near its concepts, the CLIP, and a note.

        Args:
            model: ComfyUI's `ModelPatcher`.
            clip: ComfyUI's `CLIP`.
            prompt: Of the picture.
            eraser: Name of a file in models/loras.
            strength: -2 to 2, where the gate is fully open.
            blocks: Such as `mid=0.5,up.1=0`.
            threshold: Above 0 and up to 1.
            names: Further names, with commas between.

        Raises:
            EraserError: If the file cannot be read or does not fit, or nothing says what it removes.
        """
        file = _read(eraser)
        concepts = file.header.concepts if file.header else ()
        known = [name for concept in concepts for name in (concept.name, *concept.synonyms)]
        known += [name.strip() for name in names.split(",") if name.strip()]
        if not known:
            raise EraserError(f"{eraser} does not say what it removes: write that into names, such as: cat, kitten.")
        near = nearness(clip, prompt, known)
        on = factor(near.similarity, threshold)
        heard = f"the prompt names {near.name!r}" if near.named else f"of the prompt {near.words!r} is nearest to {near.name!r}"
        measured = f"{heard} (similarity {near.similarity:.3f}, threshold {threshold:g})"
        applied = _Applied(model, clip)
        applied.add(file, Strength(strength * on, parse_blocks(blocks)), f"{measured}: on at {on:.0%}, ")
        if not on:
            applied.notes = [f"{eraser}: {measured}: off, and the model stays as it was."]
        return applied.result()
