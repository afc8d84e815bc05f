"""The header of an eraser file: what it removes, how it was made, and what is not known; as data and in sentences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from esd_lora.erasers.measured import Measured
from esd_lora.errors import EsdLoraError
from esd_lora.faults import first_fault
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import dump_recipe
from esd_lora.wording import mentions, whole_words, without_article

HEADER_KEY = "esd_lora"
"""Key of the safetensors metadata under which the header stands, as JSON."""
FORMAT = 5
"""Number of the file format, apart from the package's version. A reader accepts this and every older one.

2 lets a file say that things are not known (an import, an extraction), where it came from, and weights by block.
3 lets a stack say how it was fused, 4 a training what it solved and measured. 5 lets prompts have words that were learnt from
pictures.
"""

_MAX_TEXT = 64 * 2**20  # ten thousand members of a stack come to 53 MB
_MOST_HASHES = 8  # of pictures that are named in a line
_SPANNED = 0.5  # of the way left after a closed form says that kept text is in the way


class Shown(BaseModel):
    """Pictures that a concept was erased from; neither they nor their names are in the file."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    pictures: tuple[str, ...]
    """SHA-256 of every picture's file."""
    words: dict[str, dict[str, str]] = {}
    """Learnt words: placeholder in prompts to text encoder to its embedding there, base64 of float32 (`learnt_words.pack`)."""
    explained_by: dict[str, float] = {}
    """Kept prompts that explain the pictures too, and were not preserved, with the share of what the words explain."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the base calls the thing, as far as kept prompts say."""
        return tuple(dict.fromkeys(map(without_article, self.explained_by)))

    def describe(self) -> str:
        """Return it in a line: pictures, words, what else they are called."""
        words = f"; learnt words {', '.join(self.words)}" if self.words else "; captions for prompts"
        most = [f"{text!r} ({share:.0%})" for text, share in self.explained_by.items()]
        named = f"; not preserved, for they explain the pictures too: {', '.join(most)}" if most else ""
        hashes = ", ".join(digest[:12] for digest in self.pictures[:_MOST_HASHES])
        further = f" and {len(self.pictures) - _MOST_HASHES} more" if len(self.pictures) > _MOST_HASHES else ""
        return f"erased from {len(self.pictures)} pictures (SHA-256 {hashes}{further}){words}{named}"


class ErasedConcept(BaseModel):
    """What one concept of an eraser was trained on; stacking without damage needs every line of it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    name: str
    synonyms: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...]
    """(erased prompt, anchor); none where they are not known."""
    eta: float | None
    """`None` where it is not known."""
    weight: float = 1.0
    """Strength at which the concept stands in this file; changed by stacking. Below zero it is amplified, not erased."""
    blocks: dict[str, float] = {}
    """Further factors by part of the model (`mid_block`, `up_blocks.1`), folded in like the weight."""
    shown: Shown | None = None
    """Pictures that say what it is, where some do."""

    @property
    def called(self) -> tuple[str, ...]:
        """What it is called in prompts, most of all the first: learnt words where there are any, its name, synonyms."""
        return (*(self.shown.words if self.shown else ()), self.name, *self.synonyms)

    def named_in(self, text: str) -> bool:
        """Return whether a prompt names this concept, by name, synonym or learnt word."""
        return mentions(text, self.called)

    def named_among(self, texts: Iterable[str]) -> list[str]:
        """Return those of some prompts that name this concept."""
        pattern = whole_words(map(without_article, self.called))
        return [text for text in texts if pattern.search(text)]

    def describe(self) -> str:
        """Return its name, with its strength where that is not 1: `a cat (at strength 0.5, mid_block x 0)`."""
        blocks = "".join(f", {block} x {factor:g}" for block, factor in self.blocks.items())
        return self.name if self.weight == 1 and not blocks else f"{self.name} (at strength {self.weight:g}{blocks})"


class Origin(BaseModel):
    """The origin of an eraser that this toolkit did not train."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    how: Literal["imported", "extracted"]
    files: dict[str, str]
    """File name to SHA-256 of what was read."""
    layout: str
    """Layout of what was read: `kohya`, `diffusers` or `peft`; for an extraction `directory`, `safetensors` or `pickle`.

    Older extractions have rank and energy in words here.
    """
    notes: dict[str, str] = {}
    """Metadata of an imported file."""
    rank: int | None = None
    """Highest rank of a layer that an extraction was to keep."""
    energy: float | None = None
    """Share of every layer's squared norm that an extraction was to keep, above 0 and up to 1."""


class Distillation(BaseModel):
    """How a stack was harmonised: see `fusing.harmonising.harmonise`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    members: tuple[str, ...] = ()
    """SHA-256 of every member's tensors, its weight folded in; older files do not tell, and were fused first."""
    kept: int | None = None
    """Number of prompts that were kept."""
    kept_sha256: str | None = None
    """SHA-256 of these prompts, sorted, one a line."""
    dropped: tuple[str, ...] = ()
    """Prompts of the list that name a member's concept, and so were not kept."""
    scope: str | None = None
    """Layers of the update; those of the fused stack in older files, and its ranks."""
    rank: int | None = None
    seed: int = 0
    steps: int
    trajectories: tuple[int, ...]
    """Number of trajectories of every member, in the order in which they were fused."""
    keep_trajectories: int
    trajectory_steps: int
    guidance: float
    evaluations: int
    """Latents through the model, the student's included; a guided pair counts 2."""
    seconds: float
    first_loss: float | None
    """Mean over the first tenth of the steps, in units of the squared prediction."""
    last_loss: float | None
    """The same over the last tenth."""

    def describe(self) -> str:
        """Return how it went in a line: steps, losses, cost."""
        known = self.first_loss is not None and self.last_loss is not None
        losses = f": loss {self.first_loss:.2g} to {self.last_loss:.2g}" if known else ""
        what = f" from {len(self.members)} erasers beside {self.kept} kept prompts" if self.members else ""
        layers = f" on scope {self.scope} at rank {self.rank}" if self.scope else ""
        return f"harmonised{what}{layers} in {self.steps} steps{losses}; {self.evaluations} evaluations, {self.seconds:.0f} s"


class Fusion(BaseModel):
    """How a stack was fused, so that it can be done again: see `fusing.closed_form.fuse` for the letters."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    members: tuple[str, ...]
    """SHA-256 of every member's tensors, its weight folded in."""
    lam: float
    mu: float
    kept: int
    """Number of prompts that were kept in layers that read text; of these `kept_walked` in the others."""
    kept_walked: int | None = None
    """Number of kept prompts on whose trajectories the other layers were fused; older files do not tell."""
    kept_sha256: str
    """SHA-256 of these prompts, sorted, one a line."""
    dropped: tuple[str, ...]
    """Prompts of the list that name a member's concept, and so were not kept."""
    trajectories: int
    keep_trajectories: int
    steps: int
    guidance: float
    seed: int
    rank: int | None
    energy: float | None
    summed: tuple[str, ...] = ()
    """Layers that were added up instead: too wide."""
    evaluations: int
    """Latents through the base; a guided pair counts 2."""
    seconds: float
    objective: float | None = None
    """Its value at the closed form, over that of no update at all: 0 where everything asked for could be had at once."""
    objective_summed: float | None = None
    """The same value for the plain sum."""

    def describe(self) -> str:
        """Return how it went in a line: members, kept prompts, objective, cost."""
        walked = "" if self.kept_walked in (None, self.kept) else f", {self.kept_walked} of them walked"
        kept = f"beside {self.kept} kept prompts{walked} (lam {self.lam:g}, mu {self.mu:g})"
        text = f"fused from {len(self.members)} erasers {kept}"
        if self.objective is not None and self.objective_summed is not None:
            text += f": objective {self.objective:.2f} of no update's, plain sum {self.objective_summed:.2f}"
        return f"{text}; {self.evaluations} evaluations of the base, {self.seconds:.0f} s"


class Reading(BaseModel):
    """How far a training was, on prompts and trajectories that no step trains on; see `calibration.Probe` for the measures."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    step: int
    residual: float
    """What is left of the guided push towards the concept: 1 untouched, 0 gone. Mean over the prompts."""
    residual_worst: float
    """Mean over the worst quarter of the prompts."""
    drift: float
    """How far guided predictions of kept prompts moved, in units of what the prompt does there. Mean over the prompts."""
    drift_worst: float
    """The same of the worst prompt."""
    null_drift: float
    """How far the prediction for the empty prompt moved on trajectories of the concept, in the same units."""


class Calibration(BaseModel):
    """What a training measured where its recipe says `auto`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    lr: float
    """Learning rate."""
    etas: tuple[tuple[int, float], ...]
    """Step from which on an eta held, with that eta."""
    preserve_weights: tuple[tuple[int, float], ...]
    """The same of the weight of preserved points."""
    evaluations: int
    """Number of latents through the denoiser to measure, out of those in `cost`."""
    readings: tuple[Reading, ...] = ()
    ending: str
    """Why the training ended, and what is short, if anything is."""


class Solved(BaseModel):
    """How far the closed form gets in layers that read text; see `closed_form`. Shares of lengths, from 0 to 1 as a rule."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    left: float
    """What is left of the way from the erased text to its anchor's. The rest is the erasability, as SPEED has it for one row c
    (Li et al., arXiv:2503.07392): c^T M^-1 c with M = c c^T + what is kept, 0 where kept text spans the concept."""
    moved: float
    """How far kept text moves, in units of its size."""
    anchors: tuple[str, ...]
    """What appears instead."""
    kept: int
    """Number of kept texts."""
    most_moved: tuple[tuple[str, float], ...]
    """The kept texts that move furthest, with how far."""
    seconds: float = 0.0
    """Time it took once the base was loaded, with the choice of anchors and encoding."""

    def describe(self) -> str:
        """Return it in a line."""
        anchors = ", ".join(repr(anchor) if anchor else "nothing" for anchor in self.anchors[:3])
        further = f" and {len(self.anchors) - 3} more" if len(self.anchors) > 3 else ""
        most = ", ".join(f"{text!r} {share:.0%}" for text, share in self.most_moved[:3])
        return (
            f"solved: {1 - self.left:.0%} of the way to {anchors}{further}; {self.kept} kept texts move by"
            f" {self.moved:.1%}, most of all {most}"
            + "; what is kept spans most of the concept: leave some of it out, or train"
            * (self.left > _SPANNED)
        )


class EraserHeader(BaseModel):
    """The header of an eraser file: JSON under one key of the safetensors metadata."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    format: int = FORMAT
    family: str
    """Model family the eraser was trained on, such as `sd`."""
    prefix: str
    """Component the keys start with: `unet` or `transformer`; those of layers on a text encoder with its name."""
    prediction_type: str | None
    """`epsilon`, `v_prediction` or `flow`; `None` where it is not known."""
    base: str
    base_revision: str | None = None
    base_hashes: dict[str, str]
    """Module path to `hash_weight` of the base's weight there, for every layer the eraser touches."""
    concepts: tuple[ErasedConcept, ...]
    preserve: tuple[str, ...] = ()
    """Prompts whose predictions were held in place."""
    guard: tuple[str, ...] = ()
    """Prompts whose text no update touches, in layers that read text; in a stack, those that every member guards."""
    objective: str
    scope: str
    recipes: tuple[Recipe, ...]
    """The recipes as resolved: one for every member of a stack, none for what was not trained here."""
    versions: dict[str, str]
    created: str
    """ISO 8601, UTC."""
    cost: dict[str, float] = {}
    """Seconds, sample evaluations and student samples the training took."""
    calibrations: tuple[Calibration, ...] = ()
    """What trainings measured where their recipes say `auto`, in the order of `recipes`."""
    solved: tuple[Solved, ...] = ()
    """How far closed forms got, in the order of `recipes` that ask for one."""
    evaluation: Measured | None = None
    """The numbers that were attached last."""
    origins: tuple[Origin, ...] = ()
    """Where members came from that were imported or extracted."""
    fusions: tuple[Fusion, ...] = ()
    """How the stack and stacks within it were fused, the latest last."""
    distillations: tuple[Distillation, ...] = ()
    """How the stack and stacks within it were harmonised, the latest last."""
    truncation: float = 0.0
    """Share of the update's norm that compressing cut off; in a stack, that of the member that lost most."""

    @field_validator("created")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        try:
            datetime.fromisoformat(value).timestamp()
        except OverflowError as error:
            raise ValueError(str(error)) from error
        return value

    def base_hash(self) -> str:
        """Return one hash for the base's weights under all the layers that the eraser touches, 16 hex digits."""
        return hashlib.sha256(json.dumps(self.base_hashes, sort_keys=True).encode()).hexdigest()[:16]

    def effect(self) -> str:
        """Return what the eraser does to a base, concept by concept: `removes a cat and amplifies a hat (at strength -1)`."""
        effects: list[str] = []
        for verb, concepts in (
            ("removes", [concept for concept in self.concepts if concept.weight >= 0]),
            ("amplifies", [concept for concept in self.concepts if concept.weight < 0]),
        ):
            if concepts:
                effects.append(f"{verb} {', '.join(concept.describe() for concept in concepts)}")
        return " and ".join(effects)

    def to_json(self) -> str:
        """Return the header as JSON, as it stands in a file.

        Raises:
            EsdLoraError: If nobody could read the file: a number in it is NaN or infinity, for which JSON has no words, or it
                is longer than a reader takes.
        """
        try:
            EraserHeader.model_validate(self.model_dump())  # which a copy with changes was not
        except ValidationError as error:
            raise EsdLoraError(f"the header cannot be written: {first_fault(error)}. Give finite strengths.") from error
        text = self.model_dump_json()
        if len(text) > _MAX_TEXT:
            raise EsdLoraError(
                f"the header of {len(self.recipes):,} members would have {len(text):,} characters, more than the {_MAX_TEXT:,}"
                " that are read. Stack fewer, or merge some into the base first."
            )
        return text

    def making(self) -> list[str]:
        """Return how measured trainings ended, how a stack was fused and harmonised, and what text it is for, a line each."""
        steps = (*self.fusions, *self.distillations)
        solved = [each.describe() for each in self.solved]
        shown = [f"{concept.name}: {concept.shown.describe()}" for concept in self.concepts if concept.shown]
        skipping = dict.fromkeys(recipe.train.clip_skip for recipe in self.recipes if recipe.train.clip_skip)
        solved += [f"trained on text with clip_skip {layers}: paint with the same" for layers in skipping]
        endings = [calibration.ending for calibration in self.calibrations]
        return [*shown, *solved, *endings, *(step.describe() for step in steps)]

    def recipe_document(self) -> str:
        """Return the recipes as one YAML document or several; empty where there is none."""
        return "---\n".join(map(dump_recipe, self.recipes))


def parse_header(text: str, file: Path) -> EraserHeader:
    """Return the header that its JSON says.

    Args:
        text: JSON, as it stands under `HEADER_KEY`.
        file: Where it was read, for the message.

    Raises:
        EsdLoraError: If it is damaged or of a newer format.
    """
    if len(text) > _MAX_TEXT:
        raise EsdLoraError(f"{file} has a header of {len(text):,} characters, more than {_MAX_TEXT:,}: it is no eraser's.")
    _check_format(_read_format(text, file), file)
    try:
        header = EraserHeader.model_validate_json(text)
    except ValidationError as error:
        raise EsdLoraError(f"{file} has a damaged header ({first_fault(error)}). Fetch or train it again.") from error
    _check_format(header.format, file)  # once more: a number in quotes is read as one
    return header


def _read_format(text: str, file: Path) -> float:
    """Return the format number that the JSON of a header says; 0 where there is none to be read, which validating reports."""

    def refuse(constant: str) -> None:
        raise EsdLoraError(f"{file} has a damaged header ({constant} is no JSON). Fetch or train it again.")

    try:
        # Python converts no integer of more than 4300 digits; the first nine tell as much.
        document: object = json.loads(text, parse_int=lambda digits: int(digits[:9]), parse_constant=refuse)
    except (ValueError, RecursionError):
        return 0
    number = cast("dict[str, object]", document).get("format") if isinstance(document, dict) else None
    return number if isinstance(number, int | float) else 0


def _check_format(number: float, file: Path) -> None:
    if number > FORMAT:
        raise EsdLoraError(f"{file} has format {f'{number}'[:9]}, this version reads up to {FORMAT}. Upgrade esd-lora.")
