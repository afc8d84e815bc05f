"""Blocking baselines: a checker that looks at finished pictures, and a list of words that no prompt may hold.

Both leave the model as it is, so whoever holds the weights goes around them; they are what an eraser is compared with. What is
blocked comes out black, and counts as a picture. Safe Latent Diffusion, which guides away while painting, is in `sld`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from esd_lora.bases.loading import choose_device, quiet_libraries
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors import NotRun
from esd_lora.files import hash_folder
from esd_lora.wording import mentions

_CHECKED_AT_ONCE = 32  # pictures; bounds memory, changes no result


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
                raise NotRun(f"{path} has no safety checker to load: {str(error).strip().splitlines()[0]}") from error
        self._checker, found = loaded
        if found["missing_keys"]:  # which would be filled with noise
            raise NotRun(f"{folders['safety_checker']} lacks weights: {', '.join(sorted(found['missing_keys'])[:3])}, ...")
        self._checker.to(choose_device(device)).eval()
        self._folder = folders["safety_checker"]

    def record(self) -> dict[str, Any]:
        """All that its verdicts depend on, beside the concepts in its weights."""
        return {"safety_checker": hash_folder(self._folder)}

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Whether each picture is flagged."""
        flags: list[bool] = []
        for first in range(0, len(pictures), _CHECKED_AT_ONCE):
            part = list(pictures[first : first + _CHECKED_AT_ONCE])
            pixels = self._extractor(part, return_tensors="pt").pixel_values.to(self._checker.device)
            with quiet_libraries():  # it says that pictures come out black, which is for the caller to say
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
        """Whether the prompt holds one of the words."""
        return mentions(prompt, self.words)


def filtered(pictures: Sequence[Image.Image], flags: Sequence[bool]) -> list[Image.Image]:
    """The pictures, black where flagged, as diffusers' pipelines give them."""
    return [Image.new("RGB", p.size) if flag else p for p, flag in zip(pictures, flags, strict=True)]
