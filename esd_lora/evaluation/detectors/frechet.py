"""Distance of two sets of pictures: the Frechet distance between Gaussians fitted to their features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors.classify import EfficientNetLite0
from esd_lora.evaluation.detectors.detector import NotRun
from esd_lora.files import hash_file


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the distance of two sets of features: |m - n|^2 + Tr(A + B - 2 (A B)^(1/2)), with means m, n, covariances A, B.

    Heusel et al., *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium*, NeurIPS 2017,
    arXiv:1706.08500. The trace of the root of A B is that of the root of A^(1/2) B A^(1/2), which is symmetric: its eigenvalues
    are real, and what rounding turns negative counts as 0 (`scipy.linalg.sqrtm` of A B is inexact where it is singular, as
    with fewer pictures than features). With few pictures the distance is too large (Chong and Forsyth, *Effectively Unbiased
    FID and Inception Score*, CVPR 2020); compare only sets of one size.

    Args:
        first: Features [N, d].
        second: Features [M, d].

    Raises:
        EsdLoraError: If there are fewer than two pictures in a set, which have no covariance.
    """
    for features in (first, second):
        if len(features) < 2:
            raise EsdLoraError(
                f"a Frechet distance was asked for with a set of {len(features)} pictures. Expected 2 or more in each."
            )
    first, second = first.astype(np.float64), second.astype(np.float64)
    a, b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    between = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return max(float(between + np.trace(a) + np.trace(b) - 2 * shared), 0.0)


class EfficientNetFeatures:
    """Features that EfficientNet-Lite0 decides by, 1280 a picture. Never call a distance of these FID: that is Inception's.

    Args:
        device: Where to run it.

    Raises:
        NotRun: If the package of the weights is not installed.
    """

    metric = "Frechet distance on EfficientNet-Lite0 features"

    def __init__(self, device: str = "cpu"):
        self._net = EfficientNetLite0(device)

    def record(self) -> dict[str, Any]:
        return {"metric": self.metric, **self._net.record()}

    def __call__(self, images: Sequence[Image]) -> np.ndarray:
        """Return features [N, 1280] of N pictures."""
        return np.array([self._net.features(self._net.prepare(image))[0].cpu().numpy() for image in images])


class InceptionFeatures:
    """Features of the Inception network of 2015, which FID is made of, as NVIDIA translated it to TorchScript.

    The script takes whole pictures of 8 bits and resizes them itself, and gives 2048 numbers a picture when called with
    `return_features=True` (NVlabs/stylegan3, `metrics/frechet_inception_distance.py`).

    Args:
        path: The file `inception-2015-12-05.pt` of NVIDIA's stylegan2-ada-pytorch, `pretrained/metrics`.
        device: Where to run it.

    Raises:
        NotRun: If no path is given.
        EsdLoraError: If the file is no TorchScript.
    """

    metric = "FID"

    def __init__(self, path: str | Path | None = None, device: str = "cpu"):
        if not path:
            raise NotRun("no Inception is given; set `path` to inception-2015-12-05.pt of NVIDIA's stylegan2-ada-pytorch")
        self._path, self._device = Path(path), device
        if not self._path.is_file():
            raise EsdLoraError(f"there is no file {self._path}. Expected NVIDIA's inception-2015-12-05.pt.")
        try:
            self._net = torch.jit.load(self._path, map_location=self._device).eval()
        except RuntimeError as error:
            raise EsdLoraError(f"{self._path} is no TorchScript. Expected NVIDIA's inception-2015-12-05.pt.") from error

    def record(self) -> dict[str, Any]:
        weights = hash_file(self._path)
        return {"metric": self.metric, "package": "torch", "version": torch.__version__, "weights_sha256": weights}

    def __call__(self, images: Sequence[Image]) -> np.ndarray:
        """Return features [N, 2048] of N pictures."""
        return np.array([self._features(image) for image in images])

    @torch.no_grad()
    def _features(self, image: Image) -> np.ndarray:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
        return self._net(pixels.to(self._device), return_features=True)[0].cpu().numpy()
