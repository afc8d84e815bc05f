"""Behind one call, every diffusion model: what a family must say about itself.

The rest of the toolkit knows a denoiser only as `predict(x_t, t, condition)`. A family says how prompts become a
condition, how the denoiser is called, and which layers a scope means. A new one is a subclass in a file of its own and a
line in `families/__init__.py`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor, nn

from esd_lora.errors import EsdLoraError
from esd_lora.recipe import REGEX_SCOPE
from esd_lora.trajectory import Condition, Scheduler


class ModelFamily(ABC):
    """One architecture. Stateless: the models themselves live in the diffusers pipeline that is passed in."""

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    """`_class_name` of the diffusers pipelines this family covers."""
    denoiser: ClassVar[str]
    """Component that gets the adapter, and prefix of its LoRA keys: `unet` or `transformer`."""
    scopes: ClassVar[Mapping[str, str]]
    """Scope to a regular expression searched for in the path of every linear and convolution."""

    text_layers: ClassVar[str | None] = None
    """A regular expression for the paths of layers that read `prompt_embeds` itself, whatever `x_t` and `t` are."""
    multiple: ClassVar[int] = 8
    """Sides of latents must be multiples of this: what down-sampling or patches ask for."""

    @abstractmethod
    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        """The condition of N prompts, under the names the pipeline's call gives them (`prompt_embeds`, ...).

        The empty prompt stands for whatever the pipeline puts opposite the prompt in classifier-free guidance.
        """

    @abstractmethod
    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's own prediction (noise, v or flow) at `x_t` [N, channels, height, width] and `t` [N]."""

    def reads_text(self, module: str) -> bool:
        """Whether a layer reads `prompt_embeds` itself, so that no denoising is needed to know its inputs."""
        return self.text_layers is not None and re.search(self.text_layers, module) is not None

    def channels(self, pipe: Any) -> int:
        """Channels of latents."""
        return getattr(pipe, self.denoiser).config.in_channels

    def side(self, pipe: Any) -> int:
        """Height and width of latents at the model's native size."""
        return getattr(pipe, self.denoiser).config.sample_size

    def takes_guidance(self, pipe: Any) -> bool:
        """Whether the denoiser reads a guidance scale as an input: guidance-distilled models."""
        return getattr(getattr(pipe, self.denoiser).config, "time_cond_proj_dim", None) is not None

    def default_sampling(self, pipe: Any) -> tuple[int, float]:
        """Denoising steps and guidance of a picture unless asked otherwise: the pipeline's own defaults."""
        defaults = signature(pipe.__call__).parameters
        return defaults["num_inference_steps"].default, defaults["guidance_scale"].default

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:  # noqa: ARG002
        """What the pipeline's call is told beside prompt, size, steps and guidance."""
        return {}

    def sigmas(self, steps: int) -> list[float] | None:  # noqa: ARG002
        """Noise levels that the pipeline hands to a flow scheduler before shifting; `None` leaves them to the scheduler."""
        return None

    def prediction_type(self, pipe: Any) -> str:
        """`epsilon`, `v_prediction` or `flow`, read from the base and never guessed."""
        return prediction_type({"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config})

    def scheduler(self, pipe: Any, steps: int, shape: Sequence[int], device: Any = None) -> Scheduler:
        """A fresh first-order deterministic scheduler with the base's own noise schedule and grid, its timesteps set.

        DDIM for noise and v models (the paper's sampler), Euler for flow models (their pipelines' own).

        Args:
            pipe: The pipeline whose scheduler's configuration is taken over: spacing, offset, shift, prediction type.
            steps: Length of a whole trajectory.
            shape: Of one image's latents; models with dynamic shifting shift by the number of patches.
            device: Of the latents.
        """
        config = pipe.scheduler.config
        if self.prediction_type(pipe) != "flow":
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler

            # Latents lie outside [-1, 1]: DDIM's default of clipping is for pixels.
            ddim: Any = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
            ddim.set_timesteps(steps, device=device)
            return ddim
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        euler: Any = FlowMatchEulerDiscreteScheduler.from_config(
            config, shift=config.get("shift", config.get("flow_shift", 1.0))
        )
        own = euler.config
        patches = shape[-2] * shape[-1] // 4
        lengths = own["base_image_seq_len"], own["max_image_seq_len"]
        mu = calculate_shift(patches, *lengths, own["base_shift"], own["max_shift"]) if own["use_dynamic_shifting"] else None
        euler.set_timesteps(steps, device=device, sigmas=self.sigmas(steps), mu=mu)
        return euler

    def modules(self, model: nn.Module, scope: str) -> Mapping[str, nn.Module]:
        """The layers of `model` that `scope` means, by path.

        Raises:
            EsdLoraError: If the scope matches no layer of this model.
        """
        # The update of a grouped convolution is no product of two factors, so there is no LoRA for it.
        layers = {
            path: m
            for path, m in model.named_modules()
            if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
        }
        rule = scope.removeprefix(REGEX_SCOPE) if scope.startswith(REGEX_SCOPE) else self.scopes[scope]
        chosen = {path: m for path, m in layers.items() if re.search(rule, path)}
        if not chosen:
            usable = [name for name, rule in self.scopes.items() if any(re.search(rule, path) for path in layers)]
            patterns = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".N", path) for path in layers))
            shown = ", ".join(patterns[:30]) + (", ..." if len(patterns) > 30 else "")
            raise EsdLoraError(
                f"scope {scope!r} matches none of the {len(layers)} linear and convolution layers of this {self.name} model."
                f" Scopes with layers here: {', '.join(usable) or 'none'}. Layers (N any number): {shown}."
            )
        return chosen


def prediction_type(scheduler: Mapping[str, Any]) -> str:
    """`epsilon`, `v_prediction` or `flow`, from a scheduler's configuration with its `_class_name`."""
    kind = scheduler.get("prediction_type", "epsilon")
    flow = kind == "flow_prediction" or str(scheduler.get("_class_name", "")).startswith("FlowMatch")
    return "flow" if flow else kind
