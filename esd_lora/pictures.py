"""Painting pictures with a loaded base, and laying them out to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import trange

from esd_lora.families import Base

_BATCH = 32


def paint(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    desc: str | None = None,
) -> list[Image.Image]:
    """Paints one picture for each prompt, with the base as it stands (adapters included).

    Every picture starts from noise of its own seed, drawn on the CPU, so the same prompt and seed give the same picture
    whatever else is asked for in the call.

    Args:
        base: From `load_base`.
        prompts: N prompts.
        seeds: N seeds.
        steps: Denoising steps; the base's habit unless given.
        guidance: Classifier-free guidance scale; the base's habit unless given.
        negative_prompt: Takes the place of the empty prompt in guidance.
        desc: Label of a progress bar; without one there is none.
    """
    pictures: list[Image.Image] = []
    for first in trange(0, len(prompts), _BATCH, desc=desc, unit="batch", disable=desc is None):
        part = list(prompts[first : first + _BATCH])
        pictures += base.pipe(
            part,
            negative_prompt=[negative_prompt] * len(part) if negative_prompt else None,
            num_inference_steps=steps or base.steps,
            guidance_scale=base.guidance if guidance is None else guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[first : first + _BATCH]],
        ).images
    return pictures


def grid(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str], *, tile: int = 128) -> Image.Image:
    """Lays pictures out in labelled rows and columns.

    Args:
        rows: Row label to that row's pictures, one a column.
        columns: Column labels, wrapped above each column.
        tile: Side of a tile in pixels; small pictures are enlarged without blurring.
    """
    font = ImageFont.load_default(13)
    left = 12 + max((int(font.getlength(label)) for label in rows), default=0)
    lines = [wrap(label, max(8, tile // 7)) or [""] for label in columns]
    top = 8 + 16 * max((len(label) for label in lines), default=1)
    sheet = Image.new("RGB", (left + len(columns) * (tile + 4), top + len(rows) * (tile + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, label in enumerate(lines):
        draw.multiline_text((left + x * (tile + 4), 4), "\n".join(label), fill="black", font=font, spacing=3)
    for y, (label, pictures) in enumerate(rows.items()):
        draw.text((6, top + y * (tile + 4) + tile // 2 - 8), label, fill="black", font=font)
        for x, picture in enumerate(pictures):
            resample = Image.Resampling.NEAREST if picture.width <= tile else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((tile, tile), resample), (left + x * (tile + 4), top + y * (tile + 4)))
    return sheet
