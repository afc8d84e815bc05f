"""Flux.1 dev and schnell: an MM-DiT on packed latents, distilled models both.

Dev takes the guidance scale as an input. Trainings tell it 1 (`train.distilled_guidance`), where it is nearest to a model
without guidance, and guide by two predictions as everywhere else; pictures are painted with the pipeline's own 3.5. Schnell
is distilled to four steps and takes no scale: walk it with `trajectory_steps: 4` and `guidance: 1`, for it never learned to
be guided. `xattn` is the text stream of the double blocks, as in `sd3`; single blocks mix both streams in one set of layers,
which count as `selfattn` and `noxattn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from esd_lora.families.family import ModelFamily
from esd_lora.families.sd3 import MM_DIT_SCOPES
from esd_lora.trajectory import Condition


class Flux(ModelFamily):
    """19 double blocks with 76 linears in the text stream, 38 single blocks."""

    name = "flux"
    pipelines = ("FluxPipeline",)
    denoiser = "transformer"
    scopes: ClassVar[Mapping[str, str]] = MM_DIT_SCOPES
    multiple = 2

    def channels(self, pipe: Any) -> int:
        return pipe.transformer.config.in_channels // 4  # a token is a patch of 2 x 2

    def side(self, pipe: Any) -> int:
        return pipe.default_sample_size

    def takes_guidance(self, pipe: Any) -> bool:
        return pipe.transformer.config.guidance_embeds

    def default_sampling(self, pipe: Any) -> tuple[int, float]:
        return super().default_sampling(pipe) if self.takes_guidance(pipe) else (4, 0.0)

    def call_kwargs(self, pipe: Any) -> dict[str, Any]:
        return {"max_sequence_length": 512 if self.takes_guidance(pipe) else 256}  # of T5: what each was trained with

    def sigmas(self, steps: int) -> list[float] | None:
        return [1 - i / steps for i in range(steps)]

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        text, pooled, _ = pipe.encode_prompt(list(prompts), device=pipe.transformer.device, **self.call_kwargs(pipe))
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        n, channels, height, width = x_t.shape
        text = condition["prompt_embeds"]
        packed = pipe.transformer(
            hidden_states=pipe._pack_latents(x_t, n, channels, height, width),
            timestep=t.to(x_t.dtype) / 1000,
            guidance=condition.get("guidance"),
            encoder_hidden_states=text,
            pooled_projections=condition["pooled_prompt_embeds"],
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(n, height // 2, width // 2, x_t.device, x_t.dtype),
            return_dict=False,
        )[0]
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(packed, height * scale, width * scale, scale)
