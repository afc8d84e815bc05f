"""Behind one call, every diffusion model: what a family says about itself.

The rest of the toolkit knows a denoiser only as `predict(x_t, t, condition)`. A family says how prompts become a
condition, how the denoiser is called, which layers a scope means, and under which names other programs know its layers and
models. A new one is a subclass in a file of its own and an entry in `families.FAMILIES`; nothing of a family stands elsewhere.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from esd_lora.errors import EsdLoraError
from esd_lora.families.ddim import make_ddim
from esd_lora.families.layer_names import KOHYA_PREFIX, OriginalLayer
from esd_lora.recipe import REGEX_SCOPE, TEXT_SCOPE
from esd_lora.trajectory import Condition, Scheduler

_LONGEST_SEARCH = 1.0  # seconds


class PublishedModel(NamedTuple):
    """A published model of a family, as other programs name it in the metadata of a LoRA file."""

    kohya: str
    """`ss_base_model_version` of kohya-ss/sd-scripts."""
    architecture: str
    """`modelspec.architecture` of Stability-AI/ModelSpec."""
    resolution: str
    """`modelspec.resolution`, in pixels."""
    text_width: int | None = None
    """Inputs of the layers that read text, where the family has models of several widths."""
    prediction_type: str | None = None
    """What it predicts, where that tells the family's models apart."""
    v2: bool = False
    """`ss_v2` of kohya-ss/sd-scripts: whether it is Stable Diffusion 2."""


class CheckpointKind(NamedTuple):
    """A kind of checkpoint in a single file, as A1111 and ComfyUI use them."""

    title: str
    """Name of the model as people call it: `SD 1.x`."""
    config: str | None = None
    """Name of its configurations in `bases/configs`, where they ship; the others are read with `--base-config`."""
    prediction_type: str | None = None
    """What the model predicts where the file does not say; `None` where that has to be measured."""
    v_side: int | None = None
    """Side of latents at native size if the model predicts v, where that is not the configuration's."""
    supported: bool = True
    """Whether it can be read as a base; if not, the title says in words what the file holds instead."""


class ModelFamily(ABC):
    """One architecture. Stateless: the models themselves live in the diffusers pipeline that is passed in."""

    name: ClassVar[str]
    """Name in recipes and headers: `sd`."""
    pipelines: ClassVar[tuple[str, ...]]
    """`_class_name` of the diffusers pipelines this family covers."""
    denoiser: ClassVar[str]
    """Component that gets the adapter, and prefix of its LoRA keys: `unet` or `transformer`."""
    scopes: ClassVar[Mapping[str, str]]
    """Scope to a regular expression searched for in the path of every linear and convolution: all of `recipe.SCOPES`, and
    `recipe.JOINT_SCOPE` where text and image tokens have layers of their own in one attention."""

    libraries: ClassVar[tuple[str, ...]] = ()
    """Modules of `diffusers.pipelines` that hold components of its pipelines, as an index names them beside diffusers and
    transformers: Kolors' text encoder is in `kolors`."""
    needs: ClassVar[tuple[str, str] | None] = None
    """A module that its pipelines need beyond what everyone has, and the extra of esd-lora that brings it."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Tags of a model card, under which the Hub lists models of the family."""
    fixed_prediction_type: ClassVar[str | None] = None
    """`flow` where every model of the family predicts the flow; `None` where the base has to be asked."""
    even_sigmas: ClassVar[bool] = False
    """Whether the pipeline hands evenly spaced noise levels to a flow scheduler, before it shifts them."""
    clip_encoders: ClassVar[tuple[str, ...]] = ()
    """Components that an adapter can lie on beside the denoiser: CLIP's text encoders, where all text comes from them.

    Elsewhere text comes from T5 or a language model as well, which many models share, and on which diffusers loads no LoRA.
    """
    clip_prefixes: ClassVar[tuple[str, ...]] = ()
    """What the names of their tensors begin with in single-file checkpoints, in the order of `clip_encoders`."""
    clip_in_kohya: ClassVar[tuple[str, ...]] = ()
    """The same of the names of their layers in kohya's files."""
    text_layers: ClassVar[str | None] = None
    """A regular expression for the paths of layers that read `prompt_embeds` itself, whatever `x_t` and `t` are.

    In some models as a norm leaves it: `as_read`.
    """
    pooled_layers: ClassVar[str | None] = None
    """The same for layers that read `pooled_prompt_embeds`."""
    text_widths: ClassVar[frozenset[int]] = frozenset()
    """Inputs of these layers in published models, where that tells the family from another with the same layers."""
    multiple: ClassVar[int] = 8
    """Sides of latents must be multiples of this: what down-sampling or patches ask for."""
    pipelines_load_loras: ClassVar[bool] = True
    """Whether its pipelines in diffusers have `load_lora_weights`; into the others a file is loaded by the denoiser."""
    reads_hidden_states: ClassVar[bool] = False
    """Whether its pipeline reads inner layers of a language model, all of whose outputs are held for that."""
    encoded_at_once: ClassVar[int] = 16
    """Prompts that are encoded at a time; bounds memory, changes no result."""
    unguided: ClassVar[float] = 1.0
    """The guidance scale of its pipeline's call at which it predicts for the prompt alone: 1, or 0 where guidance is added."""
    frames_per_latent: ClassVar[int | None] = None
    """How many frames of a video each frame of latents stands for, but the first, which is one; `None` where latents are a
    picture's and have no frames."""
    normalises_latents: ClassVar[bool] = False
    """Whether its pipeline shifts and scales latents by the mean and deviation of every channel that the VAE knows."""
    published: ClassVar[tuple[PublishedModel, ...]] = ()
    """Published models under the names of other programs; of those that fit, the first counts."""
    metadata_pattern: ClassVar[str | None] = None
    """A regular expression for what kohya's and ModelSpec's metadata call models of the family."""
    kohya_keeps_diffusers_names: ClassVar[bool] = False
    """Whether kohya's files name layers as diffusers does, and not as the original project."""
    checkpoints: ClassVar[tuple[CheckpointKind, ...]] = ()
    """Single-file checkpoints that can be read."""
    preset: ClassVar[str] = "sdxl/fast"
    """The recipe to train by where none is given: the family's own, or that of the next in size."""

    @abstractmethod
    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        """Return the condition of N prompts, under the names the pipeline's call gives its tensors (`prompt_embeds`, ...).

        The empty prompt stands for whatever the pipeline puts opposite the prompt in classifier-free guidance.
        """

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        """Return the condition of N prompts as `encode` does, but the empty one as any other prompt: a text without words."""
        return self.encode(pipe, prompts)

    def most_skipped(self, pipe: Any) -> int:  # noqa: ARG002
        """Return how many of CLIP's last layers prompts can skip (`clip_skip`); 0 where CLIP alone is not all that is read."""
        return 0

    def encode_skipping(self, pipe: Any, prompts: Sequence[str], clip_skip: int) -> Condition:  # noqa: ARG002
        """Return the condition of N prompts, the empty one as any other, as the pipeline's call has them with `clip_skip`.

        Args:
            pipe: The pipeline.
            prompts: N prompts.
            clip_skip: Up to `most_skipped`.
        """
        return self.encode_text(pipe, prompts)

    def encode_opposite(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        """Return the condition of N negative prompts, none of them empty, as the pipeline puts them opposite the prompt."""
        return self.encode(pipe, prompts)

    @abstractmethod
    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the denoiser's own prediction (noise, v or flow) at `x_t` [N, channels, height, width] and `t` [N].

        A video's latents have frames: [N, channels, frames, height, width].
        """

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002
        """Return the shape of one prompt's part of every tensor that `encode` returns, from the configurations alone.

        Nothing where a family does not say: then no memory is planned for its models.
        """
        return {}

    def prompt_tokens(self, pipe: Any) -> int:
        """Return the most tokens of a prompt that the pipeline's call reads by default, or a small model's tokenizer makes."""
        most = signature(pipe.__call__).parameters["max_sequence_length"].default
        tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)  # of a processor, where it is one
        return min(most, getattr(tokenizer, "model_max_length", most))

    def call_condition(self, condition: Condition) -> Mapping[str, Any]:
        """Return a condition as its pipeline's call takes it in the place of prompts: by default as it is."""
        return condition

    def text_read_by(self, module: str) -> str | None:
        """Return the name of the tensor of a condition that a layer itself reads, whatever `x_t` and `t` are, if it does."""
        for name, rule in (("prompt_embeds", self.text_layers), ("pooled_prompt_embeds", self.pooled_layers)):
            if rule is not None and re.search(rule, module):
                return name
        return None

    def reads_text(self, module: str) -> bool:
        """Return whether a layer reads `prompt_embeds` itself, so that no denoising is needed to know its inputs."""
        return self.text_read_by(module) == "prompt_embeds"

    def as_read(self, pipe: Any, condition: Condition) -> Condition:  # noqa: ARG002
        """Return a condition with its text as the layers that read it get it: normalised before them, in some models."""
        return condition

    def channels(self, pipe: Any) -> int:
        """Return the number of channels of latents."""
        return getattr(pipe, self.denoiser).config.in_channels

    def side(self, pipe: Any) -> int:
        """Return the height, and width, of latents at the model's native size, which the denoiser has or the pipeline."""
        config = getattr(pipe, self.denoiser).config
        return config.sample_size if "sample_size" in config else pipe.default_sample_size

    def native_size(self, pipe: Any) -> tuple[int, int]:
        """Return height and width of latents at the model's native size: a square of `side`, unless it has another."""
        return self.side(pipe), self.side(pipe)

    def pixels_per_latent(self, pipe: Any) -> int:
        """Return how many pixels of height, and of width, a latent stands for."""
        return pipe.vae_scale_factor

    def takes_guidance(self, pipe: Any) -> bool:
        """Return whether the denoiser reads a guidance scale as an input: guidance-distilled models."""
        return getattr(getattr(pipe, self.denoiser).config, "time_cond_proj_dim", None) is not None

    def takes_negative_prompt(self, pipe: Any) -> bool:
        """Return whether the pipeline puts a negative prompt opposite the prompt in classifier-free guidance."""
        return "negative_prompt" in signature(pipe.__call__).parameters

    def needs_own_scheduler(self, pipe: Any) -> bool:  # noqa: ARG002
        """Return whether pictures cannot be painted by any scheduler but the pipeline's own."""
        return False

    def largest_side(self, pipe: Any) -> int | None:  # noqa: ARG002
        """Return the largest height, and width, of latents; `None` where the model has no bound of its own."""
        return None

    def default_sampling(self, pipe: Any) -> tuple[int, float]:
        """Return denoising steps and guidance scale of a picture by default: those of the pipeline's call."""
        defaults = signature(pipe.__call__).parameters
        return defaults["num_inference_steps"].default, defaults["guidance_scale"].default

    def guidance_kwargs(self, scale: float, pictures: int) -> dict[str, Any]:  # noqa: ARG002
        """Return the keyword arguments by which the pipeline's call guides, where no negative prompt is given.

        Args:
            scale: Of classifier-free guidance, or the one that is distilled in.
            pictures: Number of prompts of the call.
        """
        return {"guidance_scale": scale}

    def vae_latents(self, latents: Tensor) -> Tensor:
        """Return latents [N, channels, height, width] in the shape that the pipeline hands to its VAE."""
        return latents

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:  # noqa: ARG002
        """Return keyword arguments of the pipeline's call beside prompt, size, steps and guidance."""
        return {}

    def latent_statistics(self, pipe: Any, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """Return mean and deviation by which its pipeline normalises latents, where the VAE's configuration does not have them.

        Args:
            pipe: The pipeline, with its VAE.
            shape: Channels, height and width of latents.

        Returns:
            Two tensors that latents [N, channels, height, width] are normalised by; `None` where the configuration says all.
        """
        return None

    def dynamic_shift(self, config: Mapping[str, Any], patches: int, steps: int) -> float:  # noqa: ARG002
        """Return the exponent by which a flow scheduler with dynamic shifting shifts its noise levels.

        Args:
            config: Of the scheduler.
            patches: Number of tokens of an image.
            steps: Length of a trajectory.
        """
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        lengths = config["base_image_seq_len"], config["max_image_seq_len"]
        return calculate_shift(patches, *lengths, config["base_shift"], config["max_shift"])

    def sigmas(self, steps: int) -> list[float] | None:
        """Return the noise levels that the pipeline hands to a flow scheduler before shifting; `None`: the scheduler's own."""
        return [1 - i / steps for i in range(steps)] if self.even_sigmas else None

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        """Return the place of every layer in the original project's model, by module path in diffusers.

        Args:
            names: Of a checkpoint's tensors, without prefix, where depths need not be the published ones.

        Returns:
            Every layer that a model of the family may have; nothing where single files and kohya's names follow no original.
        """
        return {}

    def kohya_names(self) -> Mapping[str, str]:
        """Return the names of layers in kohya's files, by module path; dots become underscores."""
        return {
            module: KOHYA_PREFIX + (module if self.kohya_keeps_diffusers_names else layer.name).replace(".", "_")
            for module, layer in self.original_layers().items()
        }

    def kohya_text_name(self, module: str) -> str:
        """Return the name in kohya's files of a layer on a text encoder.

        Args:
            module: Its path, which begins with one of `clip_encoders`.
        """
        component, _, path = module.partition(".")
        return dict(zip(self.clip_encoders, self.clip_in_kohya, strict=True))[component] + path.replace(".", "_")

    def published_model(self, text_width: int | None, prediction_type: str | None) -> PublishedModel | None:
        """Return the published model that an eraser fits; `None` where its layers do not tell.

        Args:
            text_width: Inputs of the layers that read text, if the eraser touches one.
            prediction_type: `epsilon`, `v_prediction` or `flow`, if it is known.
        """
        for model in self.published:
            if model.text_width in (None, text_width) and model.prediction_type in (None, prediction_type):
                return model
        return None

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:  # noqa: ARG002
        """Return what a single-file checkpoint holds, if it is of this family or a near relative.

        Args:
            shapes: Name to shape of every tensor in the file.
        """
        return None

    def prediction_type(self, pipe: Any) -> str:
        """Return `epsilon`, `v_prediction` or `flow`, read from the base's scheduler and never guessed."""
        return read_prediction_type({"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config})

    def stated_prediction_type(self, metadata: Mapping[str, str], tensors: Collection[str] = ()) -> str | None:
        """Return what a file says that its model predicts, or what the whole family does; `None` where neither tells.

        Args:
            metadata: Of a checkpoint or LoRA: ModelSpec's `modelspec.prediction_type`, kohya's `ss_v_parameterization`.
            tensors: Names of a checkpoint's tensors: `v_pred` is the marker that ComfyUI reads.
        """
        if self.fixed_prediction_type:
            return self.fixed_prediction_type
        stated = metadata.get("modelspec.prediction_type", "")
        if stated.startswith("v") or metadata.get("ss_v_parameterization") == "True" or "v_pred" in tensors:
            return "v_prediction"
        return "epsilon" if stated == "epsilon" else None

    def scheduler(self, pipe: Any, steps: int, shape: Sequence[int], device: Any = None) -> Scheduler:
        """Return a fresh first-order deterministic scheduler with the base's own noise schedule and grid, its timesteps set.

        DDIM for noise and v models (the paper's sampler), Euler for flow models (their pipelines' own). Turbo and Lightning
        models are spaced as their scheduler's configuration says, LCM as its sampler does.

        Args:
            pipe: The pipeline whose scheduler's configuration is taken over: spacing, offset, shift, prediction type.
            steps: Length of a whole trajectory.
            shape: Shape of one image's latents; models with dynamic shifting shift by the number of patches.
            device: Device of the latents.

        Raises:
            EsdLoraError: If the base's noise levels are neither a flow's nor a schedule of betas that DDIM knows, or it was
                distilled at fewer of them than `steps`.
        """
        config = pipe.scheduler.config
        if self.prediction_type(pipe) != "flow":
            return make_ddim(pipe.scheduler, steps, device)
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        changes: dict[str, Any] = {"shift": config.get("shift", config.get("flow_shift", 1.0))}
        if steps == 1:  # stretched to a terminal level, one point would be 0 / 0 in diffusers; it is the first of every grid
            changes["shift_terminal"] = None
        euler: Any = FlowMatchEulerDiscreteScheduler.from_config(config, **changes)
        patches, shifts = shape[-2] * shape[-1] // 4, euler.config["use_dynamic_shifting"]
        mu = self.dynamic_shift(euler.config, patches, steps) if shifts else None
        euler.set_timesteps(steps, device=device, sigmas=self.sigmas(steps), mu=mu)
        return euler

    def adaptable(self, pipe: Any) -> dict[str, nn.Module]:
        """Return the models that an adapter can lie on, each by what the paths of its layers begin with.

        Those of the denoiser stand alone; those of a text encoder begin with its name, as in the LoRA files of diffusers:
        `text_encoder.text_model.encoder.layers.0.mlp.fc1`.
        """
        models: dict[str, nn.Module] = {"": getattr(pipe, self.denoiser)}
        for name in self.clip_encoders:
            if (encoder := getattr(pipe, name)) is not None:
                # transformers 5 has CLIP's text model without the module around it that files have in their names.
                models[f"{name}." if hasattr(encoder, "text_model") else f"{name}.text_model."] = encoder
        return models

    def modules(self, model: nn.Module, scope: str) -> Mapping[str, nn.Module]:
        """Return the layers of the denoiser that `scope` means, by path.

        Raises:
            EsdLoraError: If the scope matches no layer of this model, or takes too long to tell.
        """
        if scope == TEXT_SCOPE:
            raise EsdLoraError(f"scope {scope!r} has no layer of the denoiser, and nothing else is worked on here.")
        # The update of a grouped convolution is no product of two factors, so there is no LoRA for it.
        layers = {
            path: m
            for path, m in model.named_modules()
            if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
        }
        rule = scope.removeprefix(REGEX_SCOPE) if scope.startswith(REGEX_SCOPE) else self.scopes.get(scope)
        if rule is None:
            raise EsdLoraError(
                f"scope {scope!r} is for models in whose blocks text and image tokens meet in one attention, Stable Diffusion"
                f" 3, Flux and Qwen-Image: family {self.name!r} has {', '.join(self.scopes)}. Take xattn."
            )
        chosen = {path: m for path, m in layers.items() if _matches(rule, path, scope)}
        if not chosen:
            usable = [name for name, rule in self.scopes.items() if any(re.search(rule, path) for path in layers)]
            patterns = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".N", path) for path in layers))
            shown = ", ".join(patterns[:30]) + (", ..." if len(patterns) > 30 else "")
            raise EsdLoraError(
                f"scope {scope!r} matches none of the {len(layers)} linear and convolution layers of this {self.name} model."
                f" Scopes with layers here: {', '.join(usable) or 'none'}. Layers (N any number): {shown}."
            )
        return chosen


def _matches(rule: str, path: str, scope: str) -> bool:
    """Return whether a scope's regular expression, which a stranger may have written, is found in the path of a layer."""
    import regex  # like `re`, and gives up in time

    try:
        return regex.search(rule, path, timeout=_LONGEST_SEARCH) is not None
    except (TimeoutError, regex.error) as error:
        reason = (
            "takes more than a second for one layer" if isinstance(error, TimeoutError) else f"cannot be searched for ({error})"
        )
        raise EsdLoraError(f"scope {scope!r} {reason}. Write it without repetitions within repetitions.") from error


def read_prediction_type(config: Mapping[str, Any]) -> str:
    """Return `epsilon`, `v_prediction` or `flow`, from a scheduler's configuration with its `_class_name`."""
    kind = config.get("prediction_type", "epsilon")
    flow = kind == "flow_prediction" or str(config.get("_class_name", "")).startswith("FlowMatch")
    return "flow" if flow else kind
