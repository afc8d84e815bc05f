"""Similarity of a picture to another: what the base paints for the same prompt and seed, or the nearest of some originals."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors.detector import NotRun, Picture, Score, package_record
from esd_lora.evaluation.picture_files import hash_by_name, open_pictures
from esd_lora.files import hash_file


class Ssim:
    """Structural similarity, 1 for the same picture: the most like of some originals, or the base's picture.

    Wang et al., *Image Quality Assessment: From Error Visibility to Structural Similarity*, 2004, as torchmetrics computes it:
    a Gaussian of sigma 1.5, the three colours averaged. A picture of another size is resized to that of the other. Without
    originals and without the base's picture there is no value.

    Args:
        originals: A folder of pictures that must not come back; the base's picture is compared unless given.
        device: Where to run it.

    Raises:
        NotRun: If torchmetrics is not installed.
        EsdLoraError: If the folder holds no pictures.
    """

    def __init__(self, originals: str | Path | None = None, device: str = "cpu"):
        self._package = package_record("torchmetrics", "metrics")
        self._device, self._originals = device, _originals(originals)

    def record(self) -> dict[str, Any]:
        return {**self._package, "originals_sha256": hash_by_name(self._originals)}

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        return [_score_nearest("ssim", picture, self._originals, self._measure, max) for picture in pictures]

    def _measure(self, image: Image.Image, other: Image.Image) -> float:
        from torchmetrics.functional.image import structural_similarity_index_measure

        ssim = structural_similarity_index_measure(_pixels(image, self._device), _pixels(other, self._device), data_range=1.0)
        assert isinstance(ssim, Tensor)
        return ssim.item()


class Lpips:
    """Perceptual distance, 0 for the same picture: to the nearest of some originals, or to the base's picture.

    Zhang et al., *The Unreasonable Effectiveness of Deep Features as a Perceptual Metric*, CVPR 2018, with AlexNet (version 0.1
    of richzhang/PerceptualSimilarity): the network's weights are torchvision's, its linear heads come with torchmetrics, whose
    own LPIPS needs torchvision. A picture of another size is resized to that of the other. Without originals and without
    the base's picture there is no value.

    Args:
        path: The file `alexnet-owt-7be5be79.pth` of download.pytorch.org/models.
        originals: A folder of pictures that must not come back; the base's picture is compared unless given.
        device: Where to run it.

    Raises:
        NotRun: If torchmetrics is not installed or no path is given.
        EsdLoraError: If the file does not hold AlexNet, the folder no pictures, or a picture has a side under 31 pixels.
    """

    _taps = (1, 4, 7, 9, 11)  # the ReLUs, whose outputs are compared
    _smallest = 31  # pixels, of which the last ReLU sees one

    def __init__(self, path: str | Path | None = None, originals: str | Path | None = None, device: str = "cpu"):
        self._package = package_record("torchmetrics", "metrics")
        if not path:
            raise NotRun("no AlexNet is given; set `path` to alexnet-owt-7be5be79.pth of download.pytorch.org/models")
        self._path, self._device, self._originals = Path(path), device, _originals(originals)
        self._net = _alexnet(self._path).to(self._device)
        heads_file = distribution("torchmetrics").locate_file("torchmetrics/functional/image/lpips_models/alex.pth")
        self._heads_path = Path(str(heads_file))
        heads = torch.load(self._heads_path, map_location=self._device, weights_only=True)
        self._heads: list[Tensor] = [heads[f"lin{i}.model.1.weight"] for i in range(len(self._taps))]

    def record(self) -> dict[str, Any]:
        weights = {"alexnet": hash_file(self._path), "heads": hash_file(self._heads_path)}
        return {**self._package, "weights_sha256": weights, "originals_sha256": hash_by_name(self._originals)}

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        return [_score_nearest("lpips", picture, self._originals, self._measure, min) for picture in pictures]

    def _measure(self, image: Image.Image, other: Image.Image) -> float:
        pairs = zip(self._features(image), self._features(other), self._heads, strict=True)
        return sum((functional.conv2d((a - b) ** 2, head).mean().item() for a, b, head in pairs), 0.0)

    def _features(self, image: Image.Image) -> list[Tensor]:
        """Return the output of each ReLU, as unit vectors over the channels."""
        if min(image.size) < self._smallest:
            size = f"{image.width} x {image.height} pixels"
            raise EsdLoraError(f"lpips was given a picture of {size}, expected {self._smallest} or more a side.")
        shift, scale = (
            torch.tensor(values, device=self._device)[:, None, None]
            for values in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        )
        x = (2 * _pixels(image, self._device) - 1 - shift) / scale
        features: list[Tensor] = []
        for i, layer in enumerate(self._net):
            x = layer(x)
            if i in self._taps:
                features.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return features


def _alexnet(path: Path) -> nn.Sequential:
    """Return the convolutions of torchvision's AlexNet, layer by layer as there, since the file numbers them so."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )
    if not path.is_file():
        raise EsdLoraError(f"there is no file {path}. Expected torchvision's alexnet-owt-7be5be79.pth.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({name.removeprefix("features."): x for name, x in state.items() if name.startswith("features.")})
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, AttributeError) as error:
        raise EsdLoraError(f"{path} does not hold AlexNet. Expected torchvision's alexnet-owt-7be5be79.pth.") from error
    return net.eval().requires_grad_(False)


def _originals(folder: str | Path | None) -> dict[Path, Image.Image]:
    return open_pictures(Path(folder)) if folder else {}


def _score_nearest(
    metric: str,
    picture: Picture,
    originals: Mapping[Path, Image.Image],
    measure: Callable[[Image.Image, Image.Image], float],
    best: Callable[..., str],
) -> Score:
    """Score a picture beside the nearest of the originals, or beside the base's where there are none."""
    others = {path.name: image for path, image in originals.items()} or {"before": picture.before}
    measured = {
        name: measure(_resized(picture.image, other.size), other) for name, other in others.items() if other is not None
    }
    if not measured:
        return Score({})
    nearest = best(measured, key=measured.__getitem__)
    return Score({metric: measured[nearest]}, {"original": nearest} if originals else {})


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _pixels(image: Image.Image, device: str) -> Tensor:
    """Return a picture as [1, 3, height, width] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).to(device).permute(2, 0, 1)[None].float() / 255
