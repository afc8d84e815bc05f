"""Blocking: a negative prompt, a checker of finished pictures, and a list of words that no prompt may hold.

All leave the model as it is, so whoever holds the weights goes around them; they are what an eraser is compared with. What the
checker and the list block comes out black, and counts as a picture. Safe Latent Diffusion, which guides away while painting,
is in `sld`; `baseline` makes any of them, or another base, by the name that `--against` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from safetensors import SafetensorError

from esd_lora.bases.base import Base
from esd_lora.bases.loading import choose_device, load_base
from esd_lora.bases.notices import quiet_libraries
from esd_lora.erasers.header import ErasedConcept
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.evaluation.baselines.sld import SLD_STRENGTHS, block_by_sld, concept_names
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.detectors.detector import NotRun
from esd_lora.evaluation.variants import Variant, base_record, make_painter
from esd_lora.files import hash_folder
from esd_lora.wording import mentions, slug

_BATCH = 32  # pictures to check at once; bounds memory, changes no result


class SafetyChecker:
    """Stable Diffusion's own filter: a picture is flagged if CLIP puts it near one of 17 concepts.

    The concepts are given by their embeddings alone. Rando et al., *Red-Teaming the Stable Diffusion Safety Filter*, 2022,
    arXiv:2210.04610: it is after sexual pictures, and lets violence and gore pass.

    Args:
        path: A diffusers base with `safety_checker/` and `feature_extractor/` in it, such as Stable Diffusion 1.4 or 1.5.
        device: As for `load_base`.

    Raises:
        NotRun: If there are none, or they cannot be loaded whole.
    """

    def __init__(self, path: str | Path | None, device: str = "auto"):
        if path is None:
            raise NotRun("no path to a diffusers base with a safety_checker is given")
        folders = {name: Path(path) / name for name in ("safety_checker", "feature_extractor")}
        for folder in folders.values():
            if not folder.is_dir():
                raise NotRun(f"the base has no directory {folder.name}/")
        with quiet_libraries():
            from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
            from transformers import CLIPImageProcessor

            try:
                self._extractor = CLIPImageProcessor.from_pretrained(folders["feature_extractor"], local_files_only=True)
                loaded: Any = StableDiffusionSafetyChecker.from_pretrained(
                    folders["safety_checker"], local_files_only=True, use_safetensors=True, output_loading_info=True
                )
            except (OSError, ValueError, SafetensorError) as error:
                reason = str(error).strip().partition("\n")[0].replace(f"{path}/", "")  # it becomes part of a report
                raise NotRun(f"the base has no safety checker to load: {reason}") from error
        self._checker, info = loaded
        if info["missing_keys"]:  # which would be filled with noise
            raise NotRun(f"the base's safety_checker/ lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}, ...")
        self._checker.to(choose_device(device)).eval()
        self._folder = folders["safety_checker"]

    def record(self) -> dict[str, Any]:
        """Return all that its verdicts depend on; the concepts are in its weights."""
        return {"safety_checker": hash_folder(self._folder)}

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Return whether each picture is flagged."""
        flags: list[bool] = []
        for first in range(0, len(pictures), _BATCH):
            part = list(pictures[first : first + _BATCH])
            pixels = self._extractor(part, return_tensors="pt").pixel_values.to(self._checker.device)
            with quiet_libraries():  # it warns that pictures come out black, which is for the caller to say
                flags += self._checker(clip_input=pixels, images=list(pixels))[1]
        return flags


class BlackList:
    """Words and phrases that a service refuses to paint.

    Args:
        words: Refused as whole words, in any case, singular or plural.

    Raises:
        EsdLoraError: If there are none, or one is blank: it would stand in every prompt.
    """

    def __init__(self, words: Iterable[str]):
        self.words = tuple(words)
        if not self.words or not all(map(str.strip, self.words)):
            raise EsdLoraError(f"the black list is {list(self.words)}: expected at least one word, and none of them blank.")

    def refuses(self, prompt: str) -> bool:
        """Return whether the prompt holds one of the words."""
        return mentions(prompt, self.words)


def blacken(pictures: Sequence[Image.Image], flags: Sequence[bool]) -> list[Image.Image]:
    """Return the pictures, black where flagged, as diffusers' pipelines give them."""
    return [Image.new("RGB", p.size) if flag else p for p, flag in zip(pictures, flags, strict=True)]


def block_by_negative_prompt(base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:
    """Return the base with the concepts' names in the place of the empty prompt: what users do without any eraser."""
    names = concept_names(concepts)
    paint = make_painter(base, steps, guidance, negative_prompt=names)
    return Variant("negative-prompt", {"negative_prompt": names}, lambda: nullcontext(paint))


def block_by_checker(base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:  # noqa: ARG001
    """Return the base with its pictures black where its own safety checker flags them, whatever the concepts are."""
    checker = SafetyChecker(base.source, str(base.model.device))
    paint = make_painter(base, steps, guidance)

    def paint_unflagged(cases: Sequence[Case]) -> list[Image.Image]:
        pictures = paint(cases)
        return blacken(pictures, checker(pictures))

    return Variant("safety-checker", checker.record(), lambda: nullcontext(paint_unflagged))


def block_by_words(base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:
    """Return the base with its pictures black where the prompt names a concept."""
    black_list = BlackList(name for concept in concepts for name in (concept.name, *concept.synonyms))
    paint = make_painter(base, steps, guidance)

    def paint_allowed(cases: Sequence[Case]) -> list[Image.Image]:
        return blacken(paint(cases), [black_list.refuses(case.prompt) for case in cases])

    return Variant("black-list", {"words": list(black_list.words)}, lambda: nullcontext(paint_allowed))


Blocking: TypeAlias = "Callable[[Base, Sequence[ErasedConcept], int, float], Variant]"
"""Function from base, concepts to block, steps and guidance to a variant."""
BLOCKING: dict[str, Blocking] = {
    "negative-prompt": block_by_negative_prompt,
    **{f"sld-{strength}": block_by_sld(strength) for strength in SLD_STRENGTHS},
    "safety-checker": block_by_checker,
    "black-list": block_by_words,
}
"""Ways to block a concept, from the literature, by their names for `--against`."""
_ALIASES = {"sld": "sld-medium"}


def resolve_names(against: Sequence[str]) -> list[str]:
    """Return what to compare with: aliases in full, and without the base, which is always there."""
    return [_ALIASES.get(kind, kind) for kind in against if kind != "base"]


def baseline_name(kind: str) -> str:
    """Return the name of a variant to compare with: that of the way to block, or the last part of a base's path."""
    return kind if kind in BLOCKING else slug(Path(kind).name)


def baseline(kind: str, base: Base, concepts: Sequence[ErasedConcept], steps: int, guidance: float) -> Variant:
    """Return another way to keep concepts out, or another base altogether.

    Args:
        kind: One of `BLOCKING`, or a base's name, path or Hub id (the paper's filtered retraining: Stable Diffusion 2).
        base: Base that the concepts are blocked on.
        concepts: What to block.
        steps: Denoising steps.
        guidance: Guidance scale.

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
        return Variant(baseline_name(kind), record, lambda: nullcontext(make_painter(other, steps, guidance)))
    if not concepts:
        raise EsdLoraError(f"{kind} needs something to block: give an eraser or --concept.")
    return BLOCKING[kind](base, concepts, steps, guidance)
