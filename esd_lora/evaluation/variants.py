"""The models that paint an evaluation's pictures: the base, the base with erasers, and what else can keep a concept out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL.Image import Image

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.erasers.stacking import Strength
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.evaluation.blocking import BlackList, SafetyChecker, filtered
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.sld import SLD_CONCEPT, SLD_STRENGTHS, safe_guidance
from esd_lora.evaluation.suite_files import ROLES, Role
from esd_lora.pictures import paint
from esd_lora.wording import slug, without_article

Painter = Callable[[Sequence[Asked]], list[Image]]
Blocking: TypeAlias = "Callable[[Base, Sequence[ErasedConcept], int, float], Variant]"
"""Makes a variant of base, concepts to block, steps and guidance."""


class Variant(NamedTuple):
    """One model to compare."""

    name: str
    record: dict[str, Any]
    """All that its pictures depend on, beside the base, prompts, seeds and sampler."""
    on: Callable[[], AbstractContextManager[Painter]]
    """Makes the model paint for the length of a `with` block."""
    roles: tuple[Role, ...] = ROLES
    """Of the prompts that it paints."""


def painter(base: Base, steps: int, guidance: float, **asked: Any) -> Painter:
    """Paints with a base as it stands, every picture with guidance of its own where its prompt says so."""

    def painted(some: Sequence[Asked]) -> list[Image]:
        pictures: list[Image] = [Image()] * len(some)
        for scale in dict.fromkeys(one.guidance for one in some):
            places = [i for i, one in enumerate(some) if one.guidance == scale]
            prompts, seeds = [some[i].prompt for i in places], [some[i].seed for i in places]
            found = paint(base, prompts, seeds, steps=steps, guidance=guidance if scale is None else scale, **asked)
            for place, picture in zip(places, found, strict=True):
                pictures[place] = picture
        return pictures

    return painted


def bare(base: Base, steps: int, guidance: float) -> Variant:
    """The base as it is."""
    return Variant("base", {}, lambda: nullcontext(painter(base, steps, guidance)))


def erased(
    base: Base,
    erasers: Sequence[Eraser],
    weights: Sequence[Strength],
    steps: int,
    guidance: float,
    name: str = "erased",
) -> Variant:
    """The base with erasers on."""
    members = [
        {"concepts": eraser.names, "sha256": hash_tensors(eraser.state_dict()), "weight": weight, "blocks": dict(blocks)}
        for eraser, (weight, blocks) in zip(erasers, weights, strict=True)
    ]

    @contextmanager
    def on() -> Generator[Painter]:
        with applied(base, erasers, weights):
            yield painter(base, steps, guidance)

    return Variant(name, {"erasers": members}, on)


def variant_name(kind: str) -> str:
    """What pictures of a model to compare with are called: the name of a way to block, or the last part of a base's path."""
    return kind if kind in BLOCKING else slug(Path(kind).name)


def blocked(kind: str, base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:
    """Another way to keep concepts out, or another base altogether.

    Args:
        kind: One of `BLOCKING`, or a base's name, path or Hub id (the paper's filtered retraining: Stable Diffusion 2).
        base: What the concepts are blocked on.
        concepts: To block.
        steps: Denoising steps.
        guidance: Of a picture.

    Raises:
        EsdLoraError: If it is neither, or there is nothing to block.
        NotRun: If it is the safety checker, and the base has none.
    """
    if kind not in BLOCKING:
        near = did_you_mean(kind, BLOCKING)
        if near and not Path(kind).exists():
            raise EsdLoraError(f"no way to compare with is called {kind!r}{near}. Known: {', '.join(BLOCKING)}, or a base.")
        other = load_base(kind, device=str(base.model.device), dtype=base.model.dtype)
        record = {"base": base_record(other)}
        return Variant(variant_name(kind), record, lambda: nullcontext(painter(other, steps, guidance)))
    if not concepts:
        raise EsdLoraError(f"{kind} needs something to block: give an eraser or --concept.")
    return BLOCKING[kind](base, concepts, steps, guidance)


def _negative_prompt(base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:
    """The concepts' names in the place of the empty prompt: what users do without any eraser."""
    names = _names(concepts)
    paint = painter(base, steps, guidance, negative_prompt=names)
    return Variant("negative-prompt", {"negative_prompt": names}, lambda: nullcontext(paint))


def _sld(strength: str) -> Blocking:
    """Safe Latent Diffusion at a published strength, away from its own concept if that names what was erased."""

    def variant(base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:
        published = SLD_STRENGTHS[strength]
        # Published for 50 steps: with others, guidance sets in at the same level of noise.
        chosen = published._replace(warmup_steps=round(published.warmup_steps * steps / 50))
        concept = SLD_CONCEPT if all(one.named_in(SLD_CONCEPT) for one in concepts) else _names(concepts)

        @contextmanager
        def on() -> Generator[Painter]:
            with safe_guidance(base, concept, chosen):
                yield painter(base, steps, guidance)

        return Variant(f"sld-{strength}", {"concept": concept, **chosen._asdict()}, on)

    return variant


def _safety_checker(base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:  # noqa: ARG001
    """Pictures as the base paints them, black where its own safety checker flags them."""
    checker = SafetyChecker(base.source, str(base.model.device))
    paint = painter(base, steps, guidance)

    def checked(some: Sequence[Asked]) -> list[Image]:
        pictures = paint(some)
        return filtered(pictures, checker(pictures))

    return Variant("safety-checker", checker.record(), lambda: nullcontext(checked))


def _black_list(base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:
    """Pictures as the base paints them, black where the prompt names a concept."""
    words = BlackList([name for concept in concepts for name in (concept.name, *concept.synonyms)])
    paint = painter(base, steps, guidance)

    def refused(some: Sequence[Asked]) -> list[Image]:
        return filtered(paint(some), [words.refuses(one.prompt) for one in some])

    return Variant("black-list", {"words": list(words.words)}, lambda: nullcontext(refused))


def _names(concepts: Sequence[ErasedConcept]) -> str:
    return ", ".join(without_article(name) for concept in concepts for name in (concept.name, *concept.synonyms))


BLOCKING: dict[str, Blocking] = {
    "negative-prompt": _negative_prompt,
    **{f"sld-{strength}": _sld(strength) for strength in SLD_STRENGTHS},
    "safety-checker": _safety_checker,
    "black-list": _black_list,
}
"""Ways to block a concept, from the literature, for `--against`."""


def base_record(base: Base) -> dict[str, Any]:
    """Which base it is: its id, and for every part that a picture goes through a hash of the weights."""
    parts = {name: part for name, part in sorted(base.pipe.components.items()) if isinstance(part, torch.nn.Module)}
    hashes = {name: _hash(part) for name, part in parts.items()}
    return {"id": base.id, "revision": base.revision, "weights": hashes, "dtype": str(base.model.dtype).removeprefix("torch.")}


def _hash(part: torch.nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names and bytes of weights, one at a time: they may fill the memory."""
    digest = hashlib.sha256()
    for name, tensor in part.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
