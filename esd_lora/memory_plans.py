"""Whether a training fits a card: what each of its phases takes, planned from a base's configurations before it is loaded.

Weights are counted by their number and dtype. What passes through them (activations, gradients, pictures) is counted by doing
it on the meta device (`memory.counting`). `fit` looks for the setting that changes least and fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esd_lora.adapter import add_adapter, remove_adapter
from esd_lora.bases.base import MOST_TEXT, Base
from esd_lora.bases.loading import choose_device, choose_dtype
from esd_lora.bases.outlines import outline_base
from esd_lora.bases.quantizing import QUANTIZED, quantized_layers
from esd_lora.errors import EsdLoraError
from esd_lora.memory import counting
from esd_lora.pictures import pictures_at_once
from esd_lora.recipe import AUTO, Recipe, TrainSpec
from esd_lora.teacher import latent_shapes
from esd_lora.trajectory import Condition
from esd_lora.watching import MOST_SHOWN

GIB = 2**30
_CONTEXT = GIB // 2
"""Bytes that CUDA's context and the kernels' workspaces take. An allowance: there was no card to measure it on."""
_LOST = 1.1
"""Times as much as is planned is taken, by blocks that do not fill up. An allowance, too."""
_TEXTS_AT_ONCE = 64
"""Most prompts whose encoding is on the card where all of them wait on the CPU: those with a pseudo-word."""
IN_TURN = "text, encoders in turn"
"""Phase of text whose encoders have no room beside each other."""
_UNPACKED = {"int8": 8, "nf4": 2}
"""Bytes for each weight of the one layer that is dequantized at a time."""
_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a quantized weight; nf4 has a scale of a byte for 64 of them, and one of four bytes for 256 scales."""
_ROW = {"int8": 5, "nf4": 0}
"""Bytes beside every row of weights: scale and zero."""


class Setting(NamedTuple):
    """What a training may change to take less memory."""

    dtype: str
    """What the frozen denoiser is held in: `float32`, `bfloat16`, `float16`, `int8`, `nf4`."""
    gradient_checkpointing: bool
    """Field of `TrainSpec`: the same results in a third more time."""
    walk_batch: int
    """Field of `TrainSpec`: the same results, up to rounding, in more time."""

    def describe(self) -> str:
        """Return the setting in words."""
        return (
            f"{self.dtype}, {'' if self.gradient_checkpointing else 'no '}gradient checkpointing, walk_batch {self.walk_batch}"
        )

    def applied(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the setting, but for the dtype, which is no part of one."""
        changes = {"gradient_checkpointing": self.gradient_checkpointing, "walk_batch": self.walk_batch}
        return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


class MemoryPlan(NamedTuple):
    """What a training takes of a card."""

    setting: Setting
    phases: dict[str, int]
    """Bytes of tensors at most, by phase: `text` or `IN_TURN`, `closed form`, `walk`, `step`, `painting`, as far as there are
    any."""

    def describe(self) -> str:
        """Return the setting and what it takes in words."""
        largest = max(self.phases, key=lambda name: self.phases[name])
        return f"{self.setting.describe()}: {self.needed / GIB:.1f} GiB planned, most for {largest}"

    @property
    def needed(self) -> int:
        """Bytes that the card must have."""
        return with_allowances(max(self.phases.values()))


def read_size(text: str) -> int:
    """Return the bytes of a card's size as people say it, in gibibytes: `12GB`, `12`, `11.5 GiB`.

    Raises:
        EsdLoraError: If it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB|G)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise EsdLoraError(f"card size {text!r}: expected gigabytes, such as 12GB.")
    return round(float(match[1]) * GIB)


def free_memory(device: str = "auto") -> int:
    """Return the bytes that are free on a device.

    Raises:
        EsdLoraError: If it is no CUDA card, whose memory is its own.
    """
    place = choose_device(device)
    if place.type != "cuda":
        raise EsdLoraError(f"device {place} is no card with memory of its own: say what to fit, such as --fit 12GB.")
    return torch.cuda.mem_get_info(place)[0]


def fit_recipe(recipe: Recipe, room: int, dtype: str | None = None) -> tuple[Recipe, MemoryPlan]:
    """Return a recipe with the setting that fits a card, for the base that it names, and what is planned of it.

    Args:
        recipe: What to train; its base is not loaded, only its configurations are read.
        room: Bytes of the card.
        dtype: That the denoiser is held in; chosen unless given.

    Raises:
        EsdLoraError: As `fit` does, or if there is no such base.
    """
    if recipe.adapts_text:
        raise EsdLoraError("memory is planned for adapters on the denoiser alone: leave out --fit with scope text-encoder.")
    whole = dtype if dtype is not None and dtype not in QUANTIZED else "bfloat16"
    base = outline_base(recipe.base, config=recipe.base_config, dtype=choose_dtype(torch.device("cpu"), whole))
    plan = fit(base, recipe, room, (dtype,) if dtype else (whole, *QUANTIZED))
    return plan.setting.applied(recipe), plan


def with_allowances(size: int) -> int:
    """Return the bytes that a card must have for tensors of some bytes: CUDA takes some, and the allocator loses some."""
    return round(_CONTEXT + _LOST * size)


def fit(base: Base, recipe: Recipe, room: int, dtypes: Sequence[str] = ("bfloat16", *QUANTIZED)) -> MemoryPlan:
    """Return the plan of the setting that changes least of those that fit a card.

    Args:
        base: From `outlines`, in the dtype of what is not quantized.
        recipe: What to train; its own setting is tried first.
        room: Bytes of the card.
        dtypes: That the denoiser may be held in, the most exact first.

    Raises:
        EsdLoraError: If none fits; with what the smallest takes.
    """
    plan: MemoryPlan | None = None
    for plan in plans(base, recipe, dtypes, room):
        if plan.needed <= room:
            return plan
    if plan is None:
        raise EsdLoraError("there is no dtype to plan for: give one of float32, bfloat16, float16, int8, nf4.")
    raise EsdLoraError(
        f"base {base.id!r} does not fit {room / GIB:.1f} GiB: with {plan.describe()}. Take a larger card, or a lower"
        " train.resolution."
    )


def plans(base: Base, recipe: Recipe, dtypes: Sequence[str], room: float = math.inf) -> Iterator[MemoryPlan]:
    """Yield the plans of settings, from the recipe's own to the smallest.

    Args:
        base: From `outlines`, in the dtype of what is not quantized.
        recipe: What to train.
        dtypes: That the denoiser may be held in, the most exact first.
        room: Bytes of the card; with too few, text encoders come to it one at a time.

    Raises:
        EsdLoraError: If the base's family does not say of what shape encoded prompts are.
    """
    if not base.family.condition_shapes(base.pipe):
        raise EsdLoraError(f"the family {base.family.name!r} does not say what its text is like: no memory can be planned.")
    spec = recipe.train
    together, in_turn = _text_phases(base)
    text = {"text": together} if with_allowances(together) <= room else {IN_TURN: in_turn}
    parameters = add_adapter(base, base.family.modules(base.model, recipe.scope), recipe.lora, 0)
    try:
        trained = sum(map(_size, parameters))
        step, walk, painting = (
            cache(partial(_step, base, spec)),
            cache(partial(_walk, base, spec)),
            cache(partial(_paint, base)),
        )
        for dtype in dtypes:
            held = _denoiser(base, dtype) + trained + _texts(base)
            points = _points(base, recipe)
            for setting in dict.fromkeys(
                Setting(dtype, checkpointing, batch)
                for checkpointing, batch in ((spec.gradient_checkpointing, spec.walk_batch), (True, spec.walk_batch), (True, 1))
            ):
                phases = dict(text)
                if recipe.closed_form:
                    phases["closed form"] = held
                if spec.steps:
                    unpacked = _largest(base, dtype)
                    phases["walk"] = held + 2 * points + unpacked + walk(setting.walk_batch)
                    state = trained // 2 if spec.optimizer.endswith("8bit") else 2 * trained
                    phases["step"] = held + points + unpacked + state + step(setting.gradient_checkpointing)
                if spec.preview_every and base.pipe.vae is not None:
                    vae = sum(map(_size, base.pipe.vae.parameters()))
                    phases["painting"] = held + points + 2 * trained + vae + painting(setting.walk_batch)
                yield MemoryPlan(setting, phases)
    finally:
        remove_adapter(base)


def _denoiser(base: Base, dtype: str) -> int:
    """Return the bytes of the frozen denoiser's weights, without adapters."""
    quantized = {id(layer.weight) for _, layer in _quantized(base, dtype)}
    total = 0.0
    for name, weight in base.model.named_parameters():
        if id(weight) in quantized:
            total += _BYTES[dtype] * weight.numel() + _ROW[dtype] * len(weight)
        elif "lora_" not in name:
            total += weight.numel() * (weight.itemsize if dtype in QUANTIZED else getattr(torch, dtype).itemsize)
    return round(total)


def _quantized(base: Base, dtype: str) -> list[tuple[str, nn.Linear]]:
    """Return the layers of a denoiser with an adapter that are quantized without one."""
    if dtype not in QUANTIZED:
        return []
    layers = quantized_layers(base.model, base.family)
    return [(path, layer) for path, layer in layers if not re.search(r"\.lora_[AB]\.", path)]


def _largest(base: Base, dtype: str) -> int:
    return max((_UNPACKED[dtype] * layer.weight.numel() for _, layer in _quantized(base, dtype)), default=0)


def _text_phases(base: Base) -> tuple[int, int]:
    """Return what encoding takes with all encoders on the card, and with one at a time.

    That is encoders, a batch of prompts through them, and prompts that are encoded already.
    """
    names = [name for name in base.pipe.components if name.startswith("text_encoder")]
    encoders = [encoder for encoder in (getattr(base.pipe, name) for name in names) if encoder is not None]
    tokens = base.family.condition_shapes(base.pipe)["prompt_embeds"][0]
    longest = base.family.call_kwargs(base.pipe).get("max_sequence_length", tokens)
    weights = [sum(map(_size, encoder.parameters())) for encoder in encoders]
    alone: list[int] = []
    with torch.no_grad(), counting() as count:
        outputs: list[object] = []
        for encoder, weight in zip(encoders, weights, strict=True):
            places = min(longest, getattr(encoder.config, "max_position_embeddings", longest))
            ids = torch.zeros(base.family.encoded_at_once, places, dtype=torch.long, device="meta")
            # Of CLIP pipelines ask for the last layer but one.
            inner = base.family.reads_hidden_states or type(encoder).__name__.startswith("CLIP")
            outputs.append(encoder(input_ids=ids, output_hidden_states=inner))
            alone.append(weight + count.peak)
    return sum(weights) + count.peak + _texts(base), max(alone) + _texts(base)


def _texts(base: Base) -> int:
    """Return the bytes of encoded prompts on the card: of each kept one and another beside it, if that is not too much."""
    size = base.model.dtype.itemsize * sum(map(math.prod, base.family.condition_shapes(base.pipe).values()))
    return size * (count if (count := 2 * len(base.keep)) * size <= MOST_TEXT else _TEXTS_AT_ONCE)


def _points(base: Base, recipe: Recipe) -> int:
    """Return the bytes of the points that buffers hold."""
    spec = recipe.train
    preserved = spec.preserve_trajectories if recipe.preserve or recipe.neighbours else 0
    count = spec.trajectories * spec.trajectory_steps + preserved * (spec.preserve_steps or spec.trajectory_steps)
    count = count if spec.points == "all" else spec.trajectories + preserved
    # x_t and target of a point; how far that is pushed, where eta is to be measured; x_t and target of the empty prompt.
    tensors = 2 + (recipe.eta == AUTO) + 2 * bool(spec.null_batch)
    return 4 * tensors * count * math.prod(latent_shapes(base, spec)[0])


def _walk(base: Base, spec: TrainSpec, walk_batch: int) -> int:
    """Return what one prediction of a guided walk takes."""
    most = max(spec.trajectories, spec.preserve_trajectories)
    count = min(walk_batch, most) * (1 if spec.guidance == 1 else 2)
    with torch.no_grad(), counting() as live:
        base.predict(*_latents(base, count, latent_shapes(base, spec)[0]))
    return live.peak


def _step(base: Base, spec: TrainSpec, checkpointing: bool) -> int:
    """Return what the student's forward and backward pass take, gradients included."""
    (base.model.enable_gradient_checkpointing if checkpointing else base.model.disable_gradient_checkpointing)()
    count = spec.batch_size + spec.preserve_batch + spec.null_batch
    try:
        with counting() as live:
            x_t, t, condition = _latents(base, count, latent_shapes(base, spec)[0])
            prediction = base.predict(x_t, t, condition)
            (prediction - torch.zeros_like(prediction)).square().flatten(1).mean(1).sum().backward()
            peak = live.peak
            for parameter in base.model.parameters():
                parameter.grad = None
        return peak
    finally:
        base.model.disable_gradient_checkpointing()


def _paint(base: Base, walk_batch: int) -> int:
    """Return what painting a preview takes beside weights: denoising it, or decoding it."""
    pictures = min(MOST_SHOWN, pictures_at_once(base, walk_batch))
    latents = _latents(base, pictures * (1 if base.family.takes_guidance(base.pipe) else 2), base.latent_shape())
    with torch.no_grad(), counting() as denoising:
        base.predict(*latents)
    with torch.no_grad(), counting() as decoding:
        base.pipe.vae.decode(base.family.vae_latents(latents[0][:pictures].to(base.model.dtype)))
    return max(denoising.peak, decoding.peak)


def _latents(base: Base, count: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, Condition]:
    """Return noisy latents, times and conditions for `Base.predict`, on the meta device."""
    with torch.device("meta"):
        shapes = base.family.condition_shapes(base.pipe)
        condition = {name: torch.zeros(count, *each, dtype=base.model.dtype) for name, each in shapes.items()}
        if base.family.takes_guidance(base.pipe):
            condition["guidance"] = torch.ones(count)
        return torch.zeros(count, *shape), torch.zeros(count), condition


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
