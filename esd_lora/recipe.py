"""The recipe: everything that decides what an eraser becomes, as one frozen, fully checked document.

Hyper-parameters have no defaults here: `recipes/*.yaml` is their only home. A recipe says `extends: fast` and adds what
is its own. Fields whose default is "nothing" (no anchor, no preserved prompts) do have defaults.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.objectives import OBJECTIVES
from esd_lora.optimizers import OPTIMIZERS
from esd_lora.registry import Registry
from esd_lora.wording import mentions
from esd_lora.yaml_files import allowed_code

SCOPES = ("xattn", "xattn-kv", "selfattn", "noxattn", "full")
"""Which layers get an adapter, by the literature's names: ESD-x, UCE and MACE's K/V, self-attention, ESD-u, ESD-all."""
JOINT_SCOPE = "joint-qk"
"""Queries and keys of blocks in which text and image tokens meet in one attention: the layers that GEM trains."""
TEXT_SCOPE = "text-encoder"
"""Layers of the text encoders that stand before the denoiser, and none of its own."""
REGEX_SCOPE = "re:"
"""Marks a scope that is a regular expression, searched for in every layer's path: `re:mid_block.*to_v$`."""
_MAX_SCOPE = 1000
_MAX_LESSONS = 100_000
_MAX_LETTERS = 10_000_000  # of all lessons of a concept


AUTO = "auto"
"""Stands where a number is to be measured on the base in front of the training; see `calibration`."""
Auto: TypeAlias = Literal["auto"]
_REFRESH_EVERY = 30  # steps that trajectories of a student remain near enough to its own
_MOST_STEPS = 450  # of a training that ends when its probe is content


class _Frozen(BaseModel):
    # The docstrings below the fields are what editors show: recipes/schema.json holds them.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class PromptPair(_Frozen):
    """One line of a prompt pool: what to erase, and what should appear instead.

    A plain string stands for a pair without an anchor of its own.
    """

    prompt: str
    """The prompt to erase."""
    anchor: str | None = None
    """What should appear instead; `None` takes the concept's anchor."""


def _pair(value: object) -> object:
    return {"prompt": value} if isinstance(value, str) else value


def _concept(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _scope(value: str) -> str:
    if value.startswith(REGEX_SCOPE):
        # Recipes travel, in erasers' headers too: compiling must not take long, as ignoring case does.
        if len(value) > _MAX_SCOPE or re.search(r"\(\?[a-zA-Z-]*i", value):
            raise ValueError(f"expected a regular expression of up to {_MAX_SCOPE} characters, with no (?i)")
        try:
            re.compile(value.removeprefix(REGEX_SCOPE))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression ({error})") from error
    elif value not in (known := (*SCOPES, JOINT_SCOPE, TEXT_SCOPE)):
        raise ValueError(
            f"unknown scope{did_you_mean(value, known)}; known: {', '.join(known)}, or {REGEX_SCOPE} and a regular expression"
        )
    return value


def _aspect(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,3}:[1-9]\d{0,3}", value):
        raise ValueError("expected width:height, such as 3:2")
    return value


def _named(registry: Registry[Any]) -> AfterValidator:
    """Check a name in a registry, and that code was allowed by whoever reads a file; a header's recipe is data alone."""

    def check(value: str, info: ValidationInfo) -> str:
        try:
            registry.check(value, allowed_code(info))
        except EsdLoraError as error:
            raise ValueError(str(error)) from error
        return value

    return AfterValidator(check)


Scope = Annotated[str, AfterValidator(_scope)]
Aspect = Annotated[str, AfterValidator(_aspect)]


class Concept(_Frozen):
    """One thing to erase. A plain string stands for a concept of that name and nothing else."""

    name: str = Field(min_length=1, pattern=r"\S")
    """What the eraser removes, in words: `"cat"`, `"Van Gogh"`."""
    prompts: tuple[Annotated[PromptPair, BeforeValidator(_pair)], ...] = ()
    """The pool of prompts to erase; empty means the name itself. `{x}` stands for each word of `fill`."""
    fill: tuple[str, ...] = ()
    """Words that take the place of `{x}`, one after the other."""
    anchor: str | None = None
    """Anchor of every prompt without its own. `None` takes `erase_from` if there is one, else the paper's empty prompt."""
    erase_from: str | None = None
    """Prompt the student is trained on and `x_t` is drawn under, when it is not the erased prompt itself: erase "hat" from
    "cowboy" and a cowboy without a hat is left."""
    synonyms: tuple[str, ...] = ()
    """Other names of the concept; preserved prompts that contain one of them are dropped."""
    images: str | None = Field(default=None, min_length=1)
    """A folder of pictures of it, where it has no name that a base knows: the name is a label for people then. Words are learnt
    from the pictures and erased, or their captions are, where a `.txt` lies beside each."""

    @model_validator(mode="after")
    def _placeholders(self) -> Concept:
        pairs = self.prompts or (PromptPair(prompt=self.name),)
        texts = [self.anchor or "", self.erase_from or "", *(pair.prompt + (pair.anchor or "") for pair in pairs)]
        if any("{x}" in text for text in texts) and not self.fill:
            raise ValueError("prompts contain {x}, but fill lists no words to put there")
        lessons = len(pairs) * max(1, len(self.fill))
        letters = sum(len(text) * max(1, len(self.fill)) + text.count("{x}") * sum(map(len, self.fill)) for text in texts)
        if lessons > _MAX_LESSONS or letters > _MAX_LETTERS:
            raise ValueError(
                f"prompts times fill come to {lessons:,} prompts of {letters:,} characters; up to {_MAX_LESSONS:,} prompts of"
                f" {_MAX_LETTERS:,} characters in all can be trained on"
            )
        return self

    def lessons(self) -> list[tuple[str, str, str]]:
        """Return the pool as (prompt to erase from, erased prompt, anchor), templates filled in."""
        lessons: list[tuple[str, str, str]] = []
        for pair in self.prompts or (PromptPair(prompt=self.name),):
            anchor = next(text for text in (pair.anchor, self.anchor, self.erase_from, "") if text is not None)
            texts = (self.erase_from or pair.prompt, pair.prompt, anchor)
            for word in self.fill if any("{x}" in text for text in texts) else ("",):
                a, b, c = (text.replace("{x}", word) for text in texts)
                lessons.append((a, b, c))
        return lessons

    @property
    def unanchored(self) -> bool:
        """Whether some of its prompts say nothing of what should appear instead."""
        pairs = self.prompts or (PromptPair(prompt=self.name),)
        return self.anchor is None and self.erase_from is None and any(pair.anchor is None for pair in pairs)

    def pairs(self) -> list[tuple[str, str]]:
        """Return the pool as (erased prompt, anchor)."""
        return [(prompt, anchor) for _, prompt, anchor in self.lessons()]

    def named_in(self, text: str) -> bool:
        """Return whether a prompt names this concept, by name or synonym."""
        return mentions(text, (self.name, *self.synonyms))


class LoraSpec(_Frozen):
    """Shape of the low-rank update, `alpha / rank * up @ down`."""

    rank: int = Field(ge=1, le=1024)
    """Rank of the update of one layer; typically 1 to 32."""
    alpha: float = Field(gt=0)
    """Scale of the update times its rank. Layers of another rank get an alpha in proportion: one learning rate suits all."""
    conv_rank: int | None = Field(default=None, ge=1, le=1024)
    """Rank of convolutions; `rank` unless given."""
    ranks: dict[Scope, Annotated[int, Field(ge=1, le=1024)]] = Field(default={}, max_length=32)
    """Scope to the rank of its layers, where they are part of the recipe's scope; the last that matches a layer counts."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance of an input of `down` to be zeroed in a training step; typically 0 to 0.1."""
    rslora: bool = False
    """Scale by `alpha / sqrt(rank)` (Kalajdzievski, arXiv:2312.03732), which keeps high ranks learning."""

    @model_validator(mode="before")
    @classmethod
    def _no_dora(cls, values: Any) -> Any:
        if isinstance(values, dict) and {"dora", "use_dora"} & set(values):  # pyright: ignore[reportUnknownArgumentType]
            raise ValueError("DoRA rescales whole weights, so its updates neither stack nor fit a plain LoRA; use rslora")
        return values  # pyright: ignore[reportUnknownVariableType]


class Neighbours(_Frozen):
    """Preserved prompts picked from a vocabulary: those the text encoder puts nearest to what is erased."""

    vocabulary: tuple[str, ...] | str
    """Prompts to pick from, or a text file with one a line."""
    count: int = Field(ge=1)
    """How many for each concept; typically 10 to 50."""


class ClosedFormSpec(_Frozen):
    """How the layers that read text are solved before the first step; see `closed_form`."""

    keep: float = Field(ge=0)
    """Weight of kept text against erased text; 0.3 to 3."""
    push: float = Field(ge=0)
    """How far to go beyond an anchor that is only what the prompt says without the concept, eta at most; 0 to 1."""
    ridge: float = Field(gt=0)
    """Weight of the update's own size, in units of the mean square of kept text; 0.0001 to 0.01."""
    unlisted: float = Field(default=0.0, ge=0)
    """Weight of kept text with a pseudo-word in it, which stands for what is in no list; 0.1 to 1."""


class PictureSpec(_Frozen):
    """How a concept is erased that pictures show (`Concept.images`); see `from_pictures`."""

    words: int = Field(ge=1, le=16)
    """Words that are learnt where there are no captions, each from another half of the pictures; 2 to 4."""
    steps: int = Field(ge=1)
    """Optimiser steps for each, of 16 noised pictures; 50 for small models to 3000."""
    lr: float = Field(gt=0)
    """Learning rate, in units of the spread of the text encoder's table; 0.02 to 0.4."""
    share: float = Field(ge=0, le=1)
    """Share of the concept's trajectories whose points are noised pictures; the others are walked."""


class TrainSpec(_Frozen):
    """How the student meets the teacher. Typical values stand in `recipes/`, with the source of each."""

    steps: Annotated[int, Field(ge=0)] | Auto
    """Optimiser steps; `auto` goes on until the concept is gone from prompts that no step trains on, and then cools down. 0
    leaves it at the closed form."""
    lr: Annotated[float, Field(gt=0)] | Auto
    """Learning rate; `auto` is the one at which the first step goes a given part of the way to the targets."""
    lr_schedule: Literal["constant", "linear", "cosine"]
    """`linear` and `cosine` fall to a tenth of `lr`; with `steps: auto` it is constant and then falls in the cool-down."""
    warmup: int = Field(default=0, ge=0)
    """Steps in which the rate climbs to `lr`, evenly."""
    optimizer: Annotated[str, _named(OPTIMIZERS)] = "adam"
    """`adam`, `adamw` or another of torch's by name, `adam8bit`, `adamw8bit` (bitsandbytes), or your own `module:Class`, which
    runs with --allow-code."""
    optimizer_args: dict[str, Any] = {}
    """Further arguments of the optimiser: `{weight_decay: 0.01}`."""
    batch_size: int = Field(ge=1)
    """Noisy latents of erased prompts at a time."""
    preserve_batch: int = Field(ge=0)
    """Noisy latents of preserved prompts beside them."""
    accumulate: int = Field(default=1, ge=1)
    """Batches a step, their gradients averaged: the same as batches larger by this factor, in less memory."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""
    null_batch: int = Field(default=0, ge=0)
    """Noisy latents of either kind of trajectory at which the prediction for the empty prompt is held; where it moves, guidance
    cancels a part of the erasure. 0 holds it nowhere."""
    preserve_weight: Annotated[float, Field(ge=0)] | Auto
    """Weight of a preserved point in the loss, the empty prompt's too; an erased one has weight 1. `auto` begins with 1.5 and
    follows the drift of prompts that no step trains on, but for the empty prompt's."""
    x_t_from: Literal["student", "base"] | Auto
    """Who denoises the `x_t` trained on: the adapted model (paper, LECO) or the frozen one (authors' 2025 script). `auto` is
    the base, but the student where no layer of the scope reads text: what those layers do depends on `x_t` alone."""
    points: Literal["one", "all"]
    """Points kept of a trajectory: one at random (paper), or every one (replay buffer)."""
    trajectories: int = Field(ge=1)
    """Trajectories of erased prompts walked at each refresh; lessons take turns."""
    preserve_trajectories: int = Field(ge=0)
    """Trajectories of preserved prompts walked at each refresh."""
    refresh_every: Annotated[int, Field(ge=1)] | Auto
    """Optimiser steps between two refreshes of the buffer; 1 with `points: one` is the paper's loop. `auto` fills it once with
    the base's trajectories, and again every 30 steps with the student's, which change."""
    trajectory_steps: int = Field(ge=2, le=1000)
    """DDIM steps of a whole trajectory (paper: 50)."""
    preserve_steps: int | None = Field(default=None, ge=2, le=1000)
    """DDIM steps of a preserved prompt's trajectory, `trajectory_steps` unless given; few points of each of many prompts hold
    more than many points of a few."""
    guidance: float = Field(ge=0)
    """Classifier-free guidance of the trajectories (paper: 3); 1 for models distilled to a few steps."""
    distilled_guidance: float = Field(default=1.0, ge=0)
    """Scale that guidance-distilled models (Flux dev, LCM) read, teacher and student alike; others take none."""
    clip_skip: int | None = Field(default=None, ge=1)
    """Last layers of CLIP that prompts skip, as the pipeline's call of that name has it: train with what the model is used
    with. What guidance puts opposite skips none."""
    walk_batch: int = Field(default=32, ge=1)
    """Trajectories walked side by side. Bounds memory; each counts twice, for guidance."""
    resolution: int | None = Field(default=None, ge=8)
    """Side of a square picture in pixels; the model's native one unless given."""
    aspects: tuple[Aspect, ...] = ()
    """Aspect buckets as width:height, all of the area of `resolution`; steps take turns among them."""
    video_frames: int = Field(default=1, ge=1)
    """Frames of the videos that a base of videos is trained on: 1, 5, 9 and so on where four share a frame of latents. What a
    prompt asks for shows in one, which is cheapest. Bases of pictures have 1."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random: start of the LoRA, noise, stops, batches."""
    probe_every: int = Field(default=0, ge=0)
    """Steps between two erasure probes; 0 never probes."""
    stop_at: float | None = Field(default=None, gt=0)
    """Stop once the probe's erasure (0 untouched, 1 on target) reaches this."""
    patience: int = Field(default=0, ge=0)
    """Stop when this many probes in a row found erasure risen by less than 0.01 over the best; 0 never does."""
    preview_every: int = Field(default=0, ge=0)
    """Steps between two previews, base above and student below on the same seeds; 0 paints none."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between two checkpoints to resume from; 0 leaves one only on Ctrl-C."""

    @property
    def most_steps(self) -> int:
        """Number of optimiser steps, or with `auto` the most that there may be."""
        return _MOST_STEPS if self.steps == "auto" else self.steps

    @property
    def walk_every(self) -> int:
        """Optimiser steps between two refreshes of the buffer."""
        if self.refresh_every != "auto":
            return self.refresh_every
        return _REFRESH_EVERY if self.x_t_from == "student" else max(self.most_steps, 1)


class Recipe(_Frozen):
    """Everything that decides what an eraser becomes. `load_recipe` builds one from a name, a file or keywords."""

    base: str = Field(min_length=1)
    """A built-in base (`emoji`), a diffusers directory, a `.safetensors` checkpoint, or a Hub id (`owner/name@revision`)."""
    base_config: str | None = None
    """For a single-file base, a diffusers directory of the same architecture; SD 1.x, 2.x and SDXL need none."""
    concepts: tuple[Annotated[Concept, BeforeValidator(_concept)], ...] = Field(min_length=1)
    """What to erase, one or several."""
    scope: Scope
    """Layers that get an adapter: of the denoiser `xattn`, `xattn-kv`, `selfattn`, `noxattn`, `full`, `joint-qk` (where text
    and image meet in one attention: SD 3, Flux, Qwen-Image), or `re:` and a regular expression; or `text-encoder`, those of
    CLIP itself (Stable Diffusion, SDXL)."""
    objective: Annotated[str, _named(OBJECTIVES)]
    """From the teacher's predictions to the student's target: `esd`, `contrast`, or your own `module:function`, which runs with
    --allow-code."""
    eta: float | Auto
    """How far beyond the anchor the student is pushed away from the concept; 1 in the paper, 0 for the anchor alone.
    `auto` is 0 where something else replaces the concept; elsewhere it begins with 1, and rises where erasing stands still."""
    anchor: Auto | None = None
    """What should appear instead where no concept says it: `auto` chooses one of the preserved prompts, the one to which the
    closed form gets furthest and moves least on the way; nothing is the paper's empty prompt, as is an anchor `""`."""
    frames: Auto | tuple[Annotated[str, Field(pattern=r"\{\}")], ...] = ()
    """What may stand around a concept that is given by one prompt, `{}` in its place, to be erased there too; `auto` takes
    what stands around preserved prompts, and some that suit any picture."""
    preserve: Literal["default"] | tuple[str, ...] = ()
    """Prompts whose predictions must not move; `default` is the base's own keep list, or the package's."""
    avoid: tuple[str, ...] = ()
    """Names of what other erasers of a stack erase: no prompt that names one is preserved, or chosen as an anchor."""
    guard: Annotated[int, Field(ge=1, le=16)] | tuple[str, ...] = ()
    """Prompts, up to a few, whose text no update touches at all, in layers that read text; they are preserved too. A number
    guards that many of the preserved ones, those that erasing would move furthest."""
    neighbours: Neighbours | None = None
    """More of them, found in the text encoder's own space."""
    lora: LoraSpec
    """Shape of the update."""
    closed_form: ClosedFormSpec | None = None
    """Solve the layers that read text before the first step; without it, or where the scope has none, the update begins at
    zero."""
    pictures: PictureSpec | None = None
    """How what pictures show is erased; concepts with `images` need it."""
    train: TrainSpec
    """How the student meets the teacher."""

    @property
    def adapts_text(self) -> bool:
        """Whether the adapter lies on the text encoders, so that the student reads other text than the teacher."""
        return self.scope == TEXT_SCOPE

    @property
    def guarded(self) -> tuple[str, ...]:
        """The prompts to guard, none while they are to be chosen."""
        return self.guard if isinstance(self.guard, tuple) else ()

    @property
    def probed(self) -> bool:
        """Whether something is left to what a probe measures during the training."""
        return self.train.steps != 0 and AUTO in (self.eta, self.train.steps, self.train.preserve_weight)

    @property
    def measures(self) -> bool:
        """Whether any number is left to be measured."""
        return self.probed or (self.train.lr == AUTO and self.train.steps != 0)

    @model_validator(mode="after")
    def _changes_something(self) -> Recipe:
        if self.train.steps == 0 and self.closed_form is None:
            raise ValueError("train.steps is 0 and there is no closed_form: nothing would change. Give either")
        if self.train.steps == 0 and self.adapts_text:
            raise ValueError(f"train.steps is 0, and no layer in scope {TEXT_SCOPE} has a closed form: it has to be trained")
        if self.guard and self.adapts_text:
            raise ValueError(
                f"guard leaves prompts alone in layers that read text, and scope {TEXT_SCOPE} changes the text itself: put them"
                " into preserve"
            )
        return self

    @model_validator(mode="after")
    def _knows_how_to_learn(self) -> Recipe:
        if self.pictures is None and any(concept.images is not None for concept in self.concepts):
            raise ValueError("a concept has images, and nothing says how to learn from them: give pictures, or extend fast")
        return self

    @model_validator(mode="after")
    def _has_a_probe(self) -> Recipe:
        if self.probed and not self.train.probe_every:
            raise ValueError("eta, train.steps or train.preserve_weight is auto, which a probe decides: set train.probe_every")
        return self

    def for_layers(self, *, reading_text: bool) -> Recipe:
        """Return the recipe with the one who denoises `x_t`, where that depends on the layers.

        Args:
            reading_text: Whether any layer of the scope does.
        """
        if self.train.x_t_from != AUTO:
            return self
        return self.model_copy(
            update={"train": self.train.model_copy(update={"x_t_from": "base" if reading_text else "student"})}
        )

    def without_folders(self) -> Recipe:
        """Return the recipe as it may travel: pictures lie in folders of whoever trained with them."""
        concepts = tuple(
            concept if concept.images is None else concept.model_copy(update={"images": "pictures"})
            for concept in self.concepts
        )
        return self.model_copy(update={"concepts": concepts})

    def anchored(self, anchors: Mapping[str, str]) -> Recipe:
        """Return the recipe with anchors for the concepts that have none.

        Args:
            anchors: Name of a concept to what should appear instead.
        """
        concepts = tuple(
            concept.model_copy(update={"anchor": anchors[concept.name]}) if concept.name in anchors else concept
            for concept in self.concepts
        )
        return self.model_copy(update={"concepts": concepts})


def require_allowed(recipe: Recipe, allow_code: Collection[str]) -> None:
    """Refuse a recipe whose objective or optimiser is code that was not allowed; nothing is imported.

    Args:
        recipe: What to train; one from a header was checked as data alone.
        allow_code: Every `module:attribute` that may be imported.

    Raises:
        EsdLoraError: With how to allow it.
    """
    OBJECTIVES.check(recipe.objective, allow_code)
    OPTIMIZERS.check(recipe.train.optimizer, allow_code)
