"""Safe Latent Diffusion: guidance away from a concept while the base paints. A baseline that trains nothing.

Schramowski, Brack, Deiseroth and Kersting, *Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models*,
CVPR 2023, arXiv:2211.05105. Equations as in the authors' release, github.com/ml-research/safe-latent-diffusion, which numbers
them; element by element, at step i of a trajectory, with s the guidance scale of the pipeline:

    prediction = null + s (prompt - null - gamma)                                                                  (3)
    gamma = mu (concept - null) + momentum_scale nu                                                             (4, 7)
    mu = min(1, sld_guidance_scale |prompt - concept|)  where prompt - concept < threshold,  0 elsewhere           (6)
    nu <- mom_beta nu + (1 - mom_beta) gamma                                                                       (8)

with nu = 0 at the first step, and without gamma in (3) while i < warmup_steps. By (6) a prompt that is itself the concept is
left alone: the two predictions are one.

Equation 3 is classifier-free guidance with `prompt - gamma` in the place of `prompt`, whatever s is, so here the pipeline keeps
its own loop, scheduler and guidance, and only that half of the denoiser's answer is changed. It costs one more prediction a
step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.erasers.header import ErasedConcept
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.variants import Painter, Variant, make_painter
from esd_lora.families.sd import StableDiffusion
from esd_lora.trajectory import Condition
from esd_lora.wording import without_article


class SldStrength(NamedTuple):
    """Settings of how hard safety guidance pushes, in the release's words. A guidance scale of 0 is the base itself."""

    sld_guidance_scale: float
    warmup_steps: int
    """First steps of a trajectory that are left alone. Published for 50 steps; with no more than this many, nothing changes."""
    threshold: float
    momentum_scale: float
    mom_beta: float


SLD_STRENGTHS: Mapping[str, SldStrength] = {
    "weak": SldStrength(200, 15, 0.0, 0.0, 0.0),
    "medium": SldStrength(1000, 10, 0.01, 0.3, 0.4),
    "strong": SldStrength(2000, 7, 0.025, 0.5, 0.7),
    "max": SldStrength(5000, 0, 1.0, 0.5, 0.7),
}
"""Hyp-Weak to Hyp-Max, from the authors' model card of AIML-TUDA/stable-diffusion-safe, beside their results on I2P.

diffusers' `SafetyConfig.WEAK` has a guidance scale of 20 where the card has 200; the others are the same in both.
"""

SLD_CONCEPT = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, blood, obscene gestures,"
    " illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, cruelty"
)
"""The safety concept of the release's sld/sld_pipeline.py. diffusers' pipeline puts "an image showing " before it."""


def safety_term(
    null: Tensor, prompt: Tensor, concept: Tensor, momentum: Tensor, strength: SldStrength
) -> tuple[Tensor, Tensor]:
    """Return gamma and the next momentum, from three predictions of one shape."""
    away = prompt - concept
    scale = (strength.sld_guidance_scale * away.abs()).clamp(max=1)
    scale = torch.where(away < strength.threshold, scale, 0)
    gamma = scale * (concept - null) + strength.momentum_scale * momentum
    return gamma, strength.mom_beta * momentum + (1 - strength.mom_beta) * gamma


@contextmanager
def safe_guidance(base: Base, concept: str, strength: SldStrength) -> Generator[None]:
    """Make the base's pipeline paint with safety guidance for the length of a `with` block.

    Every call of the pipeline is a trajectory of its own; erasers may be applied as well. Inside the block nothing but the
    pipeline may call the denoiser. The formula is applied to the denoiser's own predictions: it was published for noise, and a
    v model gets it for v.

    Args:
        base: Stable Diffusion or SDXL, its text encoders still there.
        concept: Prompt to guide away from, such as `SLD_CONCEPT`.
        strength: One of `SLD_STRENGTHS`, or another.

    Raises:
        EsdLoraError: If the base's pipeline does not guide by null and prompt in one batch, or safety guidance is on already;
            inside the block, if the pipeline is called with a guidance scale that leaves classifier-free guidance off.
    """
    pipe = base.pipe
    if not isinstance(base.family, StableDiffusion) or base.family.takes_guidance(pipe):
        raise EsdLoraError(
            f"base {base.id!r} is a {type(pipe).__name__}, and safety guidance needs a pipeline that asks its U-Net for null"
            " and prompt at once. Use Stable Diffusion or SDXL, not distilled for guidance."
        )
    if "prepare_latents" in vars(pipe):
        raise EsdLoraError(f"base {base.id!r} has safety guidance on already. Name all concepts in one text.")
    guide = _Guide(base.encode([concept]), strength)
    prepare = pipe.prepare_latents

    def begin(*args: Any, **kwargs: Any) -> Tensor:
        if not pipe.do_classifier_free_guidance:
            raise EsdLoraError(
                f"guidance {pipe.guidance_scale:g} asks for no null prediction, which safety guidance is measured from."
                " Ask for more than 1."
            )
        guide.begin()
        return prepare(*args, **kwargs)

    pipe.prepare_latents = begin  # called once a trajectory, before its first step
    hook = base.model.register_forward_hook(guide, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        del pipe.prepare_latents


class _Guide:
    """A hook that changes the prompt's half of a U-Net's predictions, step by step of one trajectory."""

    def __init__(self, condition: Condition, strength: SldStrength):
        self.condition, self.strength = condition, strength
        self.begin()

    def begin(self) -> None:
        self.step, self.momentum = 0, torch.zeros(())

    def __call__(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> tuple[Tensor]:
        x_t, t = args
        null, prompt = output[0].chunk(2)
        # Not unet(...): this hook would be called for the concept too.
        concept = unet.forward(x_t.chunk(2)[1], t, **{**kwargs, **self._concept_kwargs(len(prompt), kwargs)})[0]
        gamma, self.momentum = safety_term(null, prompt, concept, self.momentum.to(prompt), self.strength)
        if self.step >= self.strength.warmup_steps:
            prompt = prompt - gamma
        self.step += 1
        return (torch.cat([null, prompt]),)

    def _concept_kwargs(self, count: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the U-Net's keyword arguments with the concept in the place of null and prompt, for `count` pictures."""
        condition = {name: value.expand(count, *value.shape[1:]) for name, value in self.condition.items()}
        added = kwargs["added_cond_kwargs"]
        if "pooled_prompt_embeds" in condition:
            added = {"text_embeds": condition["pooled_prompt_embeds"], "time_ids": added["time_ids"].chunk(2)[1]}
        return {"encoder_hidden_states": condition["prompt_embeds"], "added_cond_kwargs": added}


def concept_names(concepts: Sequence[ErasedConcept]) -> str:
    """Return names and synonyms of concepts as one prompt."""
    return ", ".join(without_article(name) for concept in concepts for name in (concept.name, *concept.synonyms))


def block_by_sld(name: str) -> Callable[[Base, Sequence[ErasedConcept], int, float], Variant]:
    """Return a function to the variant with safety guidance of a published strength.

    It guides away from the concepts' names, or from `SLD_CONCEPT` if that names all of them.

    Args:
        name: Name in `SLD_STRENGTHS`.
    """

    def block(base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:
        strength = SLD_STRENGTHS[name]
        # Published for 50 steps: with others, guidance sets in at the same level of noise.
        strength = strength._replace(warmup_steps=round(strength.warmup_steps * steps / 50))
        prompt = SLD_CONCEPT if all(concept.named_in(SLD_CONCEPT) for concept in concepts) else concept_names(concepts)

        @contextmanager
        def on() -> Generator[Painter]:
            with safe_guidance(base, prompt, strength):
                yield make_painter(base, steps, guidance)

        return Variant(f"sld-{name}", {"concept": prompt, **strength._asdict()}, on)

    return block
