"""Fit of a picture to its prompt, by CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors.detector import NotRun, Picture, Score, package_record
from esd_lora.files import hash_folder


class ClipScore:
    """100 times the cosine between a picture's embedding and its prompt's, at least 0.

    Hessel et al., *CLIPScore: A Reference-free Evaluation Metric for Image Captioning*, EMNLP 2021, arXiv:2104.08718, with 100
    for the paper's 2.5, as in torchmetrics and most papers on erasing. Prompts longer than the model reads are cut.

    Args:
        path: A folder with a CLIPModel and its processor as transformers saves them.
        device: Where to run it.

    Raises:
        NotRun: If no path is given.
        EsdLoraError: If there is no whole CLIP at the path.
    """

    def __init__(self, path: str | Path | None = None, device: str = "cpu"):
        if not path:
            raise NotRun("no CLIP is given; set `path` to the folder of a CLIPModel of transformers")
        self._path, self._device = Path(path), device
        self._package = package_record("transformers", "metrics")
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        if not self._path.is_dir():
            raise EsdLoraError(f"there is no folder {self._path}. Expected one with a CLIPModel of transformers.")
        try:
            # Pillow's resizing everywhere: transformers takes torchvision's where there is one, and the numbers would differ.
            self._prepare: Any = AutoImageProcessor.from_pretrained(self._path, local_files_only=True, backend="pil")
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self._path, local_files_only=True)
            loaded: Any = CLIPModel.from_pretrained(self._path, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise EsdLoraError(
                f"no CLIP can be loaded from {self._path} ({str(error).partition(chr(10))[0]})."
                " Expected a folder with config.json, preprocessor_config.json, model.safetensors and the tokenizer's files."
            ) from error
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise EsdLoraError(
                f"the CLIP in {self._path} lacks {len(missing)} weights, {missing[0]} first, and would guess."
                " Expected a whole CLIPModel, with its text and its vision part."
            )
        self._model = model.eval().requires_grad_(False).to(self._device)

    def record(self) -> dict[str, Any]:
        return {**self._package, "weights_sha256": hash_folder(self._path)}

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        return [Score({"clip": self._measure(picture)}) for picture in pictures]

    def _measure(self, picture: Picture) -> float:
        longest = self._model.config.text_config.max_position_embeddings
        text = self._tokenizer([picture.prompt], truncation=True, max_length=longest, return_tensors="pt")
        pixels = self._prepare(picture.image.convert("RGB"), return_tensors="pt")
        output = self._model(**text.to(self._device), **pixels.to(self._device))  # both embeddings have length 1
        return max(100 * (output.image_embeds * output.text_embeds).sum().item(), 0.0)
