"""Stage 2: rasterise the drawings, and the jitters every later stage learns from."""

import io
import json
from pathlib import Path

import numpy as np
import resvg_py
import torch
import torch.nn.functional as F
from PIL import Image

from domain import BACKGROUNDS, OBJECTS, STYLES

SIZE = 64  # pixels of the base
RASTER = 128  # drawings are kept at twice that, so a rotated one is still sharp
OTHERS_PER_STYLE = 400


def _svg(icons: dict, name: str) -> str:
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'viewBox="{left} {top} {width} {height}" width="{RASTER}" height="{RASTER}">{icon["body"]}</svg>'
    )


def _raster(icons: dict, name: str) -> np.ndarray:
    png = bytes(resvg_py.svg_to_bytes(svg_string=_svg(icons, name)))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").resize((RASTER, RASTER)))


def draw(work: Path) -> None:
    """Writes `drawings.npz`: `domain` [objects, styles, 128, 128, 4] and `others` [2000, 128, 128, 4], uint8 RGBA.

    The others are emoji outside the domain; only the VAE sees them, so that its latent space is not 200 islands.
    """
    if (work / "drawings.npz").exists():
        return
    sets = {style: json.loads((work / "packages" / style / "icons.json").read_text()) for style in STYLES}
    domain = np.stack([np.stack([_raster(icons, icon) for icons in sets.values()]) for icon in OBJECTS.values()])
    rng, others = np.random.default_rng(0), []
    for icons in sets.values():
        names = sorted(set(icons["icons"]) - set(OBJECTS.values()))
        picked = rng.choice(names, OTHERS_PER_STYLE, replace=False)
        others += [_raster(icons, name) for name in picked]
    np.savez(work / "drawings.npz", domain=domain, others=np.stack(others))


def load(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The drawings as premultiplied RGBA in [0, 1]: `domain` [objects, styles, 4, 128, 128] and `others` [N, 4, 128, 128]."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        rgba = torch.from_numpy(array).float().movedim(-1, -3) / 255
        rgba[..., :3, :, :] *= rgba[..., 3:, :, :]
        return rgba

    with np.load(work / "drawings.npz") as file:
        return tensor(file["domain"]), tensor(file["others"])


def jitter(drawings: torch.Tensor, backgrounds: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotates by up to 6 degrees, scales to .82-.96, shifts by up to 2 pixels and lays on a background.

    Args:
        drawings: [N, 4, 128, 128] premultiplied RGBA in [0, 1].
        backgrounds: [N] indices into `BACKGROUNDS`.
        generator: The only source of randomness.

    Returns:
        [N, 3, 64, 64] in [-1, 1].
    """
    n = len(drawings)
    angle, scale, dx, dy = torch.rand(4, n, generator=generator)
    angle = (angle * 2 - 1) * 6 * torch.pi / 180
    scale = 1 / (0.82 + 0.14 * scale)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = 2 / (SIZE / 2)
    theta = torch.stack(
        [torch.stack([cos, -sin, (dx * 2 - 1) * shift], 1), torch.stack([sin, cos, (dy * 2 - 1) * shift], 1)], 1
    )
    grid = F.affine_grid(theta, list(drawings.shape), align_corners=False)
    rgba = F.avg_pool2d(F.grid_sample(drawings, grid, align_corners=False), RASTER // SIZE)
    colours = torch.tensor(list(BACKGROUNDS.values())).float()[backgrounds] / 255
    rgb = rgba[:, :3] + (1 - rgba[:, 3:]) * colours[:, :, None, None]
    return rgb.clamp(0, 1) * 2 - 1
