"""A base model in memory, with one way to encode, predict and compare weights, whatever its family."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esd_lora.bases.learnt_words import Embeddings, spelt_out, unpack
from esd_lora.bases.notices import quiet_libraries, warn_of_cuts
from esd_lora.bases.quantizing import dequantized
from esd_lora.bases.schedulers import make_scheduler
from esd_lora.bases.stored import open_stored
from esd_lora.erasers.eraser import Eraser, hash_weight
from esd_lora.erasers.fitting import check_kind, compare_weights
from esd_lora.erasers.tensor_files import all_finite
from esd_lora.errors import EsdLoraError
from esd_lora.families.family import ModelFamily
from esd_lora.progress import advance, stage
from esd_lora.recipe import TEXT_SCOPE
from esd_lora.trajectory import Condition, Encode, concatenate, move, pick

_CLIP_LAYER = re.compile(r"^text_encoder\w*\..*\.layers\.\d+\.(self_attn|mlp)\.")
MOST_TEXT = 2**28
"""Bytes of encoded prompts that stay on a card; beside T5 a prompt takes megabytes."""


@dataclass
class Base:
    """A loaded base model: the diffusers pipeline, its family, and where it came from."""

    pipe: Any
    """The diffusers pipeline."""
    family: ModelFamily
    id: str
    """Name, path or Hub id that it was loaded by."""
    revision: str | None = None
    """Commit on the Hub."""
    source: Path | None = None
    """Directory or file that the weights were read from."""
    keep: tuple[str, ...] = ()
    """The base's own keep list: prompts of things an eraser should leave alone."""
    steps: int = 30
    """Denoising steps of a picture by default."""
    guidance: float = 7.5
    """Classifier-free guidance scale of a picture by default."""
    destination: torch.device | None = None
    """Device of the denoiser, where it waits on the CPU until every prompt is encoded; `None` where it waits for nothing."""
    quantized: str | None = None
    """Kind of `quantizing.QUANTIZED` that the denoiser is held in; `None` where it is whole."""
    clip_skip: int | None = None
    """Last layers of CLIP that prompts skip, from `skipping`."""
    words: dict[str, Embeddings] = field(default_factory=dict[str, Embeddings])
    """Learnt words by the placeholder that stands for them in prompts (`learnt_words`)."""

    @property
    def model(self) -> Any:
        """The denoiser: a diffusers U-Net or transformer."""
        return getattr(self.pipe, self.family.denoiser)

    @property
    def adaptable(self) -> dict[str, nn.Module]:
        """What an adapter can lie on: the denoiser, and CLIP's text encoders; as `ModelFamily.adaptable` has them."""
        return self.family.adaptable(self.pipe)

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """Yield path and module of everything that an adapter can lie on."""
        for place, model in self.adaptable.items():
            for path, module in model.named_modules():
                yield place + path, module

    def modules(self, scope: str) -> Mapping[str, nn.Module]:
        """Return the layers that a scope means, of the denoiser or of the text encoders, by path.

        Raises:
            EsdLoraError: As `ModelFamily.modules` does, if no adapter can lie on this family's text encoders, or if prompts
                skip all of their layers.
        """
        if scope != TEXT_SCOPE:
            return self.family.modules(self.model, scope)
        if not self.family.clip_encoders:
            raise EsdLoraError(
                f"scope {scope!r} is for models whose text comes from CLIP alone, Stable Diffusion and SDXL: that of base"
                f" {self.id!r} (family {self.family.name!r}) comes from T5 or a language model, which other models share and"
                " on which diffusers loads no LoRA. Take scope xattn."
            )
        reads_last_layer = "pooled_prompt_embeds" in self.family.condition_shapes(self.pipe)
        if self.clip_skip == self.family.most_skipped(self.pipe) and not reads_last_layer:
            raise EsdLoraError(
                f"clip_skip {self.clip_skip} skips every layer of the text encoder of base {self.id!r}, so that nothing of"
                f" scope {scope!r} is read. Skip fewer."
            )
        # The projection behind CLIP's last layer is no part of its layers, and diffusers' loader knows it not.
        return {path: m for path, m in self.named_modules() if _CLIP_LAYER.search(path) and isinstance(m, nn.Linear)}

    @property
    def device(self) -> torch.device:
        """Where prompts are encoded, and where the denoiser is, or will be once they are."""
        return self.destination or self.model.device

    @property
    def held_in(self) -> str:
        """Name of what the denoiser's weights are held in: `float32`, `bfloat16`, `int8` and so on."""
        return self.quantized or str(self.model.dtype).removeprefix("torch.")

    @property
    def prediction_type(self) -> str:
        """`epsilon`, `v_prediction` or `flow`."""
        return self.family.prediction_type(self.pipe)

    def skipping(self, clip_skip: int | None) -> Base:
        """Return the base with prompts that skip the last layers of CLIP, as its pipeline's call has them with `clip_skip`.

        Args:
            clip_skip: Number of layers; with `None` it is the base itself.

        Raises:
            EsdLoraError: If its text is not CLIP's alone, or there are fewer layers.
        """
        if clip_skip is None:
            return self
        most = self.family.most_skipped(self.pipe)
        if not 1 <= clip_skip <= most:
            can = f"from 1 to {most} there" if most else "none where text does not come from CLIP alone"
            raise EsdLoraError(f"clip_skip {clip_skip}: base {self.id!r} can skip {can}. Give another, or leave it out.")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Base)}
        return Base(**{**fields, "clip_skip": clip_skip})  # one that remembers texts knows others

    def latent_shape(self, size: tuple[int, int] | None = None, frames: int = 1) -> tuple[int, ...]:
        """Return channels, height and width of one image's latents; channels, frames, height and width of one video's.

        Args:
            size: Height and width in pixels, rounded to what the model takes; its native size unless given.
            frames: Of the video, as `require_frames` has them.

        Raises:
            EsdLoraError: If the base makes no video of so many frames.
        """
        self.require_frames(frames)
        family, multiple = self.family, self.family.multiple
        sides = family.native_size(self.pipe)
        if size is not None:
            sides = [max(1, round(s / family.pixels_per_latent(self.pipe) / multiple)) * multiple for s in size]
        depth = () if family.frames_per_latent is None else ((frames - 1) // family.frames_per_latent + 1,)
        return family.channels(self.pipe), *depth, *sides

    def require_frames(self, frames: int) -> None:
        """Refuse a length that the base makes no video of; one frame is a picture, which every base makes.

        Args:
            frames: Of the video.

        Raises:
            EsdLoraError: With what it makes.
        """
        each = self.family.frames_per_latent
        if each is None and frames != 1:
            raise EsdLoraError(f"{frames} frames: base {self.id!r} makes pictures, not videos. Leave the frames out.")
        if each and (frames - 1) % each:
            near = (frames - 1) // each * each + 1
            raise EsdLoraError(
                f"{frames} frames: base {self.id!r} makes videos of 1, {1 + each}, {1 + 2 * each}, ... frames. Take {near} or"
                f" {near + each}."
            )

    def picture_size(self, width: int | None = None, height: int | None = None) -> tuple[int, int]:
        """Return width and height of a picture in pixels: the given ones, or the base's native side.

        Raises:
            EsdLoraError: If one is no multiple of what the model takes, or more than it can place.
        """
        scale, native = self.family.pixels_per_latent(self.pipe), self.family.native_size(self.pipe)
        most, multiple = self.family.largest_side(self.pipe), scale * self.family.multiple
        for name, side in (("width", width), ("height", height)):
            if side is not None and (side < multiple or side % multiple):
                near = max(1, side // multiple) * multiple
                raise EsdLoraError(
                    f"{name} {side}: base {self.id!r} draws multiples of {multiple} pixels. Take {near} or {near + multiple}."
                )
            if side is not None and most is not None and side > most * scale:
                raise EsdLoraError(f"{name} {side}: base {self.id!r} draws up to {most * scale} pixels. Take fewer.")
        return width or native[1] * scale, height or native[0] * scale

    def require_negative_prompts(self, guidance: float) -> None:
        """Refuse a negative prompt where nothing would read it.

        Args:
            guidance: The scale of classifier-free guidance, against whose other side it would stand.

        Raises:
            EsdLoraError: If the base has no such side, or the scale takes none.
        """
        if not self.family.takes_negative_prompt(self.pipe):
            raise EsdLoraError(
                f"base {self.id!r} takes no negative prompt: its guidance is distilled into it, or against the empty"
                " prompt alone. Leave it out."
            )
        if guidance <= (unguided := self.family.unguided):
            raise EsdLoraError(
                f"guidance {guidance:g} is against no prompt, so a negative one changes nothing. Leave it out, or guide by more"
                f" than {unguided:g}."
            )

    @contextmanager
    def scheduled_by(self, name: str | None) -> Generator[None]:
        """Have pictures painted by another scheduler with the same noise schedule for the length of a `with` block.

        Args:
            name: As for `schedulers.scheduler_name`; `None` leaves the base's own.

        Raises:
            EsdLoraError: If it is unknown, or not one for such a model.
        """
        own = self.pipe.scheduler
        if name is not None:
            if self.family.needs_own_scheduler(self.pipe):
                raise EsdLoraError(f"base {self.id!r} is painted by its own scheduler alone: leave {name} out.")
            self.pipe.scheduler = make_scheduler(name, own, self.prediction_type)
        try:
            yield
        finally:
            self.pipe.scheduler = own

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the denoiser's prediction, as a `trajectory.Denoiser`: made in the model's dtype, given in float32 or better.

        Args:
            x_t: [N, channels, height, width], of videos [N, channels, frames, height, width].
            t: [N].
            condition: Of N prompts, from `encode`.
        """
        prediction = self.family.predict(self.pipe, x_t.to(self.model.dtype), t, condition)
        return prediction.to(torch.promote_types(prediction.dtype, torch.float32))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], guidance: float = 1.0) -> Condition:
        """Return the condition of N prompts, in the denoiser's dtype.

        Args:
            prompts: The empty one stands for the other side of classifier-free guidance.
            guidance: Scale that a guidance-distilled model takes as an input; other models have no such input.
        """
        return self.encode_with_gradient(prompts, guidance)

    def encode_with_gradient(self, prompts: Sequence[str], guidance: float = 1.0) -> Condition:
        """Return what `encode` does, with the gradients of learnt words and of an adapter on the text encoders."""
        rows = {self.family.encode: list(range(len(prompts)))}
        if self.clip_skip:  # what guidance is against skips nothing
            rows = {self._encode_skipping: [i for i, prompt in enumerate(prompts) if prompt]}
            rows[self.family.encode] = [i for i, prompt in enumerate(prompts) if not prompt]
        parts = [self._encode_by(encode, [prompts[i] for i in own]) for encode, own in rows.items() if own]
        order = torch.tensor([i for own in rows.values() for i in own], device=self.device).argsort()
        condition = concatenate(*parts) if len(parts) == 1 else pick(concatenate(*parts), order)
        if self.family.takes_guidance(self.pipe):
            condition["guidance"] = torch.full((len(prompts),), guidance, device=self.device)
        return condition

    def _encode_skipping(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        assert self.clip_skip is not None
        return self.family.encode_skipping(pipe, prompts, self.clip_skip)

    @torch.no_grad()
    def directions(self, texts: Sequence[str], encode: Encode | None = None) -> Tensor:
        """Return where texts lie as the text encoder sees them, [N, values] of length 1: their cosines are similarities.

        What every text has in common, padding above all, is the output for a text without words, and is subtracted. That is
        encoded here even where guidance is against zeros instead (SDXL), from which all texts lie in one direction.

        Args:
            texts: N prompts or names.
            encode: From `remembering`, where it knows the texts already, none of them empty.
        """
        unknown = ["", *(() if encode else texts)]
        embeds = self._encode_by(self._encode_skipping if self.clip_skip else self.family.encode_text, unknown)
        embeds = embeds["prompt_embeds"].float().flatten(1)
        outputs = encode(texts)["prompt_embeds"].float().flatten(1) if encode else embeds[1:]
        return torch.nn.functional.normalize(outputs - embeds[:1], dim=1)

    def _encode_by(self, encode: Callable[[Any, Sequence[str]], Condition], prompts: Sequence[str]) -> Condition:
        """Return the condition of prompts by one of the family's encoders, in the denoiser's dtype."""
        parts: list[Condition] = []
        most = self.family.encoded_at_once
        with stage("encoding text", len(prompts), "prompt"), quiet_libraries():
            for i in range(0, len(prompts), most):
                with spelt_out(self.pipe, self.words, prompts[i : i + most]) as texts:
                    parts.append(encode(self.pipe, texts))
                advance(min(most, len(prompts) - i))
        dtype = self.model.dtype  # text encoders may have another
        condition = {
            name: value.to(self.device, dtype if value.is_floating_point() else None)
            for name, value in concatenate(*parts).items()
        }
        for value in condition.values():
            if value.is_floating_point() and not all_finite(value):
                cause = self.damaged_module() or f"they compute beyond {str(dtype)[6:]}: load the base in float32"
                raise EsdLoraError(f"the text encoders of base {self.id!r} make NaN or infinity of prompts: {cause}.")
        return condition

    def warn_of_cuts(self, prompts: Iterable[str]) -> None:
        """Warn of prompts that are too long for CLIP, where text comes from it, as `notices.warn_of_cuts` does."""
        names = (name.replace("text_encoder", "tokenizer") for name in self.family.clip_encoders)
        warn_of_cuts([tokenizer for name in names if (tokenizer := getattr(self.pipe, name))], prompts)

    def as_read(self, encode: Encode) -> Encode:
        """Return an encoder that returns what `encode` does, its text as the layers that read it get it.

        Padding that a mask leaves out, which nothing reads after them, is zeros.
        """

        def read(prompts: Sequence[str]) -> Condition:
            condition = self.family.as_read(self.pipe, encode(prompts))
            for mask in (value for name, value in condition.items() if name.endswith("mask")):
                condition = {**condition, "prompt_embeds": condition["prompt_embeds"] * mask.bool()[..., None]}
            return condition

        return read

    def remembering(self, guidance: float = 1.0) -> Encode:
        """Return a function that encodes as `encode` does, and no prompt twice.

        What it remembers takes no room on a card, and what it returns is on the CPU where it would take more than `MOST_TEXT`.

        Args:
            guidance: As for `encode`.
        """
        known: dict[str, Condition] = {}

        def encode(prompts: Sequence[str]) -> Condition:
            if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]:
                encoded = self.encode(new, guidance)
                encoded = move(encoded, torch.device("cpu"))
                known.update({prompt: pick(encoded, slice(i, i + 1)) for i, prompt in enumerate(new)})
            condition = concatenate(*(known[prompt] for prompt in prompts))
            large = sum(value.nbytes for value in condition.values()) > MOST_TEXT
            return condition if large else move(condition, self.device)

        return encode

    def damaged_module(self) -> str | None:
        """Return the first module of the denoiser or of the text encoders whose weights hold NaN or infinity, adapters aside.

        Returns:
            Its path with the component, and what to do: `unet.conv_in holds NaN or infinity; fetch the base again`.
        """
        encoders = [name for name in self.pipe.components if name.startswith("text_encoder")]
        for name in (self.family.denoiser, *encoders):
            component = getattr(self.pipe, name)
            for path, weight in component.named_parameters() if component is not None else ():
                if "lora_" not in path and not all_finite(dequantized(weight).detach()):
                    module = path.rpartition(".")[0].removesuffix(".base_layer")
                    return f"{name}.{module} holds NaN or infinity; fetch the base again"
        return None

    def free_text_encoders(self) -> None:
        """Drop the text encoders, once every prompt is encoded, and place a denoiser that waited for that."""
        in_turn = False
        for name in [name for name in self.pipe.components if name.startswith("text_encoder")]:
            in_turn |= hasattr(getattr(self.pipe, name), "_hf_hook")
            setattr(self.pipe, name, None)
        if in_turn:
            gc.collect()  # the hooks that had them come in turn hold them in a circle
        self.place_denoiser()

    def place_denoiser(self) -> None:
        """Place a denoiser that waits for prompts to be encoded; beside the text encoders, where they are needed for longer."""
        if self.destination is not None:
            self.model.to(self.destination)
            self.destination = None

    @torch.no_grad()
    def encode_opposite(self, negative_prompt: str) -> Condition:
        """Return the condition [1, ...] of a negative prompt, as the pipeline puts it on the other side of guidance."""
        return self._encode_by(self.family.encode_opposite, [negative_prompt])

    def encode_last(self, prompts: Iterable[str]) -> Encode | None:
        """Encode the last prompts that a base is loaded for and drop its text encoders, if its denoiser waits for that.

        Args:
            prompts: Beside the empty one, which guidance needs.

        Returns:
            A function from these prompts to their condition; `None` where nothing waits, and the text encoders stay.
        """
        if self.destination is None:
            return None
        encode = self.remembering()
        encode([*dict.fromkeys(prompts), ""])
        self.free_text_encoders()
        return encode

    @contextmanager
    def vae_in_place(self) -> Generator[None]:
        """Have the VAE beside the denoiser for the length of a `with` block; where it was elsewhere, it goes back."""
        vae = self.pipe.vae
        before = None if vae is None else vae.device
        if vae is None or before == self.model.device:
            yield
            return
        vae.to(self.model.device)
        try:
            yield
        finally:
            vae.to(before)

    def know_words_of(self, erasers: Iterable[Eraser]) -> None:
        """Learn the words that erasers were made with, so that prompts may name them by their placeholders."""
        for shown in (concept.shown for eraser in erasers for concept in eraser.header.concepts):
            if shown:
                self.words |= {placeholder: unpack(word) for placeholder, word in shown.words.items()}

    def names_words(self, prompts: Iterable[str]) -> bool:
        """Return whether one of the prompts has a learnt word in it, which only `encode` reads."""
        return any(placeholder in prompt for prompt in prompts for placeholder in self.words)

    def require_bare(self) -> None:
        """Refuse a base that carries adapters: the teacher would predict with them, and they would be taken off with ours.

        Raises:
            EsdLoraError: With their names.
        """
        carried = [name for model in self.adaptable.values() for name in getattr(model, "peft_config", ())]
        if carried:
            raise EsdLoraError(
                f"base {self.id!r} already carries adapter {', '.join(map(repr, dict.fromkeys(carried)))}. Unload it first"
                " (pipe.unload_lora_weights()), or merge it into a base of its own (esd-lora merge)."
            )

    def require_whole(self, purpose: str) -> None:
        """Refuse a quantized denoiser.

        Args:
            purpose: What cannot be done with one.

        Raises:
            EsdLoraError: With what to load instead.
        """
        if self.quantized:
            raise EsdLoraError(
                f"base {self.id!r} is loaded in {self.quantized}, and {purpose} needs its weights as they are. Load it in"
                " bfloat16 or float32 (--dtype)."
            )

    def weights(self, modules: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield path and base weight of every module that `modules` names; of a quantized one what it stands for."""
        layers = dict(self.named_modules())
        for path in modules:
            layer = layers.get(path)
            layer = getattr(layer, "base_layer", layer)
            if layer is None:
                raise EsdLoraError(f"base {self.id!r} has no layer {path}: the eraser was made for another model.")
            yield path, dequantized(layer.weight)

    def own_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of every weight of the denoiser, without those of adapters."""
        for name, value in self.model.state_dict().items():
            if "lora_" not in name:
                yield name.replace(".base_layer", ""), dequantized(value)

    def check(self, eraser: Eraser) -> None:
        """Refuse an eraser of another family, prediction type or layer shape; warn when the base's weights differ.

        Raises:
            EsdLoraError: With what differs.
        """
        check_kind(eraser, self.family.name, self.prediction_type, self.id)
        for path, weight in self.weights(eraser.pairs):
            if tuple(weight.shape) != eraser.pairs[path].shape:
                raise EsdLoraError(
                    f"eraser of {eraser.names} changes {path} of shape {eraser.pairs[path].shape}, base {self.id!r} has"
                    f" {tuple(weight.shape)} there. Use it on the model it was trained for."
                )
        compare_weights(eraser, self.hashes(eraser.pairs), self.id)

    def hashes(self, modules: Mapping[str, Any]) -> dict[str, str]:
        """Return `eraser.hash_weight` of the weight of every module that `modules` names, by path.

        Loading in bfloat16 or less drops bits that the hash is of, so there weights are looked up where they were read from.
        """
        if (self.model.dtype == torch.bfloat16 or self.quantized) and self.source is not None:
            return {path: hash_weight(weight) for path, weight in open_stored(self.source).weights(modules)}
        return {path: hash_weight(weight) for path, weight in self.weights(modules)}
