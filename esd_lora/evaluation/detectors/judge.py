"""The judge of the built-in base: a small CNN that names the object and the style of a 64x64 image.

It is the measure of erasing in the demo, the tests and the benchmarks. It has no class for "none of these": an
image of nothing still gets the nearest name, so an erased concept can be counted as left by accident (about one in
forty), never the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import nn

from esd_lora.built_in import BASES, domain
from esd_lora.evaluation.cases import AND
from esd_lora.evaluation.detectors.detector import Picture, Score
from esd_lora.files import hash_file


class Verdict(NamedTuple):
    """Names of what one image shows, and how sure the judge is (softmax probabilities in [0, 1])."""

    object: str
    style: str
    object_confidence: float
    style_confidence: float


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    )


class JudgeNet(nn.Module):
    """Four convolutions, 64 -> 4 pixels, then one linear head for objects and one for styles."""

    def __init__(self, objects: int, styles: int, width: int = 24):
        super().__init__()
        self.body = nn.Sequential(
            _block(3, width), _block(width, 2 * width), _block(2 * width, 3 * width), _block(3 * width, 4 * width)
        )
        self.object_head = nn.Linear(4 * width * 16, objects)
        self.style_head = nn.Linear(4 * width * 16, styles)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [N, objects] and [N, styles] of images [N, 3, 64, 64] in [-1, 1]."""
        features = self.body(images).flatten(1)
        return self.object_head(features), self.style_head(features)


class Judge:
    """The trained judge of a built-in base.

    Args:
        base: Name of the built-in base it belongs to.
        device: Where to run it.
    """

    def __init__(self, base: str = "emoji", device: str = "cpu"):
        self.weights = BASES / base / "judge.safetensors"
        self.objects: list[str] = domain(base)["objects"]
        self.styles: list[str] = domain(base)["styles"]
        self.device = device
        self.net = JudgeNet(len(self.objects), len(self.styles)).eval().requires_grad_(False)
        self.net.load_state_dict(load_file(self.weights))
        self.net.to(device)

    def __call__(self, images: Sequence[Image]) -> list[Verdict]:
        """Return object and style of each image; images of another size are resized to 64x64."""
        verdicts: list[Verdict] = []
        for first in range(0, len(images), 256):
            part = [image.convert("RGB").resize((64, 64)) for image in images[first : first + 256]]
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in part])).to(self.device)
            objects, styles = self.net(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
            for object_row, style_row in zip(objects.softmax(1), styles.softmax(1), strict=True):
                i, j = int(object_row.argmax()), int(style_row.argmax())
                verdicts.append(Verdict(self.objects[i], self.styles[j], object_row[i].item(), style_row[j].item()))
        return verdicts


class JudgeDetector:
    """Scores whether the judge names what the prompt asks for.

    A label is an object, a style, or both ("cat + ink"); all of it must be right. `rest` is the same for what a target should
    show besides what was erased.

    Args:
        base: The built-in base whose judge it is.
        device: Where to run it.
    """

    def __init__(self, base: str = "emoji", device: str = "cpu"):
        self._base, self._judge = base, Judge(base, device)

    def record(self) -> dict[str, Any]:
        return {"judge": self._base, "weights_sha256": hash_file(self._judge.weights)}

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        scores: list[Score] = []
        for picture, verdict in zip(pictures, self._judge([picture.image for picture in pictures]), strict=True):
            names, labels = {verdict.object, verdict.style}, {"accuracy": picture.label, "rest": picture.rest}
            values = {metric: names.issuperset(label.split(AND)) for metric, label in labels.items() if label}
            confidence = [round(verdict.object_confidence, 4), round(verdict.style_confidence, 4)]
            scores.append(Score(values, {"seen": f"{verdict.object}, {verdict.style}", "confidence": confidence}))
        return scores
