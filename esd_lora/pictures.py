"""Painting pictures with a loaded base, and laying them out to look at."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from esd_lora.bases.notices import quiet_libraries
from esd_lora.erasers.eraser import SAMPLES
from esd_lora.errors import EsdLoraError
from esd_lora.progress import advance, stage

if TYPE_CHECKING:
    from esd_lora.bases.base import Base
    from esd_lora.trajectory import Condition, Encode

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Formats of pictures that are opened. Each is decoded within this process; EPS, for one, would start Ghostscript."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of the names of pictures."""
MOST_PIXELS = 2**26
"""Pixels of the largest picture that is opened; a photograph of 60 megapixels is smaller."""
_BATCH = 32
_DECODED = 2**20
"""Most pixels that the VAE decodes at once, 4 pictures of 512 x 512. Stable Diffusion's takes 3.1 kB a pixel in float32."""


_FRAME = 1000 // 16
"""Milliseconds that a frame of a video is shown: 16 a second, which Wan 2.1 was trained with."""


class Sampling(TypedDict, total=False):
    """How a picture is painted, where it is not as the base does by default."""

    steps: int | None
    """Denoising steps; the base's default unless given."""
    guidance: float | None
    """Classifier-free guidance scale; the base's default unless given."""
    negative_prompt: str | None
    """Takes the place of the empty prompt in guidance; a model without guidance against a prompt refuses it."""
    width: int | None
    """Pixels, a multiple of what the model takes; the base's native side unless given."""
    height: int | None
    """The same of the other side."""
    scheduler: str | None
    """One of `schedulers.SCHEDULERS`; the base's own unless given."""
    clip_skip: int | None
    """Last layers of CLIP that prompts skip, a negative one none; all layers are read unless given."""
    frames: int | None
    """Length of a video, where the base makes videos; one unless given, a picture."""


class Painting(Sampling, total=False):
    """How pictures are painted, and where their text comes from."""

    encode: Encode | None
    """Returns the condition of prompts where the base's text encoders are gone."""
    opposite: Condition | None
    """Condition of the negative prompt, [1, ...], where they are; that of the empty prompt unless given."""
    batch: int
    """Most pictures at once, which bounds memory; fewer where they are larger than 64 x 64 latents. Where they have more than
    `_DECODED` pixels together, they are denoised together and decoded one by one."""


def picture_paths(folder: Path) -> list[Path]:
    """Return the pictures that lie in a folder, by name; none where there is no folder."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


def open_picture(file: Path, formats: tuple[str, ...] = FORMATS, *, behind: str | None = None) -> Image.Image:
    """Return a picture in RGB, turned as the camera was held; the one place where a picture of whatever origin is decoded.

    Args:
        file: Its content decides what it is, not its name.
        formats: What it may be.
        behind: Colour behind what is transparent; without one that is whatever the file has there.

    Raises:
        EsdLoraError: If it is something else, damaged, or larger than `MOST_PIXELS`, which is seen before it is decoded.
    """
    too_large = f"{file} has more than {MOST_PIXELS:,} pixels, the most that a picture may have. Make it smaller, or remove it."
    try:
        if _canvas(file) > MOST_PIXELS:
            raise EsdLoraError(too_large)
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=formats) as image:
            if image.width * image.height > MOST_PIXELS:
                raise EsdLoraError(too_large)
            turned = ImageOps.exif_transpose(image)
            if behind and turned.has_transparency_data:
                seen = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", seen.size, behind), seen)
            return turned.convert("RGB")
    except EsdLoraError:
        raise
    except Image.DecompressionBombError as error:
        raise EsdLoraError(too_large) from error
    except Exception as error:  # Pillow's decoders raise whatever they meet in a damaged file
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "its content is none of them" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise EsdLoraError(
            f"{file} cannot be read as a picture, {' or '.join(formats)} ({reason}). Mend or remove it."
        ) from error


def _canvas(file: Path) -> int:
    """Return how many pixels the canvas of an extended WEBP has, for which memory is taken as soon as it is opened; else 0."""
    with file.open("rb") as opened:
        head = opened.read(30)
    if head[:4] != b"RIFF" or head[8:16] != b"WEBPVP8X":
        return 0
    width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
    return width * height


def paint(base: Base, prompts: Sequence[str], seeds: Sequence[int], **painting: Unpack[Painting]) -> list[Image.Image]:
    """Paint one picture for each prompt, with the base as it stands (adapters included); of a video its middle frame.

    Args:
        base: From `load_base`.
        prompts: N prompts.
        seeds: N seeds.
        painting: See `Painting`.

    Raises:
        EsdLoraError: As `film` does.
    """
    return [still(frames) for frames in film(base, prompts, seeds, **painting)]


def still(frames: Sequence[Image.Image]) -> Image.Image:
    """Return the middle frame of a video, which stands for it wherever one picture is looked at."""
    return frames[len(frames) // 2]


def film(base: Base, prompts: Sequence[str], seeds: Sequence[int], **painting: Unpack[Painting]) -> list[list[Image.Image]]:
    """Paint the frames of one video for each prompt, with the base as it stands (adapters included); a picture is one frame.

    Every video starts from noise of its own seed, drawn on the CPU, so the same prompt and seed give the same video whatever
    else stands in the call.

    Args:
        base: From `load_base`.
        prompts: N prompts.
        seeds: N seeds.
        painting: See `Painting`.

    Raises:
        EsdLoraError: If the base takes no negative prompt, or no picture of such a size or video of such a length, or not by
            such a scheduler.
    """

    def count(_pipe: Any, _step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        advance(len(part))
        return kwargs

    videos: list[list[Image.Image]] = []
    width, height = size = base.picture_size(painting.get("width"), painting.get("height"))
    steps, guidance, frames = painting.get("steps") or base.steps, painting.get("guidance"), painting.get("frames") or 1
    guidance = base.guidance if guidance is None else guidance
    negative_prompt, encode, opposite = painting.get("negative_prompt"), painting.get("encode"), painting.get("opposite")
    if negative_prompt:
        base.require_negative_prompts(guidance)
    base = base.skipping(painting.get("clip_skip"))
    if encode is None and (base.clip_skip or base.names_words(prompts)):
        encode, opposite = base.encode, base.encode_opposite(negative_prompt) if negative_prompt else None
    at_once = pictures_at_once(base, painting.get("batch", _BATCH), size, frames)
    length = {"num_frames": frames} if base.family.frames_per_latent else {}
    with stage(f"painting {len(prompts)} pictures", len(prompts) * steps, "step"):
        for first in range(0, len(prompts), at_once):
            part = list(prompts[first : first + at_once])
            text: dict[str, Any] = {"prompt": part}
            if negative_prompt:
                text["negative_prompt"] = [negative_prompt] * len(part)
            if encode:
                text = _embeds_kwargs(base, encode([*part, ""]), opposite)
            pixels = len(part) * frames * width * height
            scheduled = base.scheduled_by(painting.get("scheduler"))
            with base.vae_in_place(), scheduled, _bounded_decoding(base.pipe.vae, pixels), quiet_libraries():
                painted, *_ = base.pipe(
                    **{**base.family.guidance_kwargs(guidance, len(part)), **text},
                    height=height,
                    width=width,
                    **base.family.call_kwargs(base.pipe) | length,
                    num_inference_steps=steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[first : first + at_once]],
                    callback_on_step_end=count,
                    output_type="pil",
                    return_dict=False,
                )
                videos += painted if base.family.frames_per_latent else [[picture] for picture in painted]
    return videos


@contextmanager
def _bounded_decoding(vae: Any, pixels: int) -> Generator[None]:
    """Have a VAE decode one picture at a time inside a `with` block, if all at once have too many pixels."""
    if pixels <= _DECODED or vae.use_slicing:
        yield
        return
    vae.enable_slicing()
    try:
        yield
    finally:
        vae.disable_slicing()


def pictures_at_once(base: Base, batch: int = _BATCH, size: tuple[int, int] | None = None, frames: int = 1) -> int:
    """Return how many pictures `paint` paints side by side.

    Args:
        base: From `load_base`.
        batch: Most of them.
        size: Width and height in pixels, as `Base.picture_size` returns them; the native ones unless given.
        frames: Of videos.
    """
    shape = base.latent_shape((size[1], size[0]) if size else None, frames)
    return max(1, min(batch, _BATCH * 64 * 64 // math.prod(shape[1:])))


def even_batches(count: int, most: int) -> list[range]:
    """Return the batches in which things are painted that several ranks may share: about equal, and from half of `most` up.

    They do not depend on the number of ranks, for a picture's last bit may depend on how many are painted beside it.

    Args:
        count: Number of things.
        most: Largest number in a batch.
    """
    parts = max(1, count // -(-most // 2))
    return [range(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def _embeds_kwargs(base: Base, condition: Condition, opposite: Condition | None) -> dict[str, Any]:
    """Return what the pipeline's call takes instead of N prompts and N negative ones.

    Args:
        base: From `load_base`.
        condition: Of the prompts, and of the empty one behind them.
        opposite: Of the negative prompt, if it is not the empty one.
    """
    prompted: Condition = {name: value[:-1] for name, value in condition.items()}
    against: Condition = {}
    for name, value in condition.items():
        null = value[-1:] if opposite is None else opposite[name].to(value.device)
        against[name] = null.expand(len(value) - 1, *null.shape[1:])
    negative = {f"negative_{name}": value for name, value in base.family.call_condition(against).items()}
    kwargs = {"negative_prompt": None, **base.family.call_condition(prompted), **negative}
    known = signature(base.pipe.__call__).parameters
    return {name: value for name, value in kwargs.items() if name in known}


def grid(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str], *, tile: int = 128) -> Image.Image:
    """Lay pictures out in labelled rows and columns.

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
            fitted = ImageOps.contain(picture, (tile, tile), resample)
            middle = (tile - fitted.width) // 2, (tile - fitted.height) // 2
            sheet.paste(fitted, (left + x * (tile + 4) + middle[0], top + y * (tile + 4) + middle[1]))
    return sheet


def heat_maps(maps: Mapping[str, Sequence[Sequence[float]]], labels: Sequence[str], *, last_column: str = "") -> Image.Image:
    """Lay matrices out side by side as heat maps: white at 0, red to 1 and above, blue below 0.

    Args:
        maps: Title to matrix, one row for each label; a matrix with one more column than labels gets `last_column` over it.
        labels: Labels of rows and columns, wrapped.
        last_column: Label of the extra column.
    """
    font, cell = ImageFont.load_default(12), 56
    names = [wrap(label, 14)[:2] or [""] for label in labels]
    left = 16 + max((int(font.getlength(line)) for name in names for line in name), default=0)
    top, bottom = 80, 12
    widths = [left + cell * max(map(len, matrix)) + 24 for matrix in maps.values()]
    sheet = Image.new("RGB", (sum(widths), top + cell * len(labels) + bottom), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for width, (title, matrix) in zip(widths, maps.items(), strict=True):
        draw.text((x + left, 8), title, fill="black", font=ImageFont.load_default(15))
        for column in range(max(map(len, matrix))):
            name = labels[column] if column < len(labels) else last_column
            short = "\n".join(line[:8] for line in wrap(name, 8)[:2])
            draw.multiline_text((x + left + column * cell + 4, top - 34), short, fill="black", font=font, spacing=2)
        for y, row in enumerate(matrix):
            place = (x + 6, top + y * cell + cell // 2 - 14)
            draw.multiline_text(place, "\n".join(names[y]), fill="black", font=font, spacing=2)
            for column, value in enumerate(row):
                shade = int(255 - 200 * min(1.0, abs(value)))
                corner = (x + left + column * cell, top + y * cell)
                fill = (255, shade, shade) if value >= 0 else (shade, shade, 255)
                draw.rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), fill=fill)
                draw.text((corner[0] + 10, corner[1] + cell // 2 - 8), f"{value:.2f}", fill="black", font=font)
        x += width
    return sheet


_PROMPT = "parameters"  # of a PNG's text, where A1111 and most viewers look for the prompt


def sample_files(prompts: Sequence[str], before: Sequence[Image.Image], erased: Sequence[Image.Image]) -> dict[str, bytes]:
    """Return pictures for a model card, `samples/1_base.png`, `samples/1_erased.png` and so on, each with its prompt inside."""
    return {
        f"samples/{i}_{name}.png": png(picture, prompt)
        for i, (prompt, *pair) in enumerate(zip(prompts, before, erased, strict=True), 1)
        for name, picture in zip(("base", "erased"), pair, strict=True)
    }


def read_samples(folder: Path) -> list[tuple[str, Path, Path | None]]:
    """Return what `sample_files` left: prompt, picture of the eraser, and of the base; nothing where there is no such folder.

    Raises:
        EsdLoraError: If a file is no PNG that can be read.
    """
    samples: list[tuple[str, Path, Path | None]] = []
    for i in range(1, SAMPLES + 1):
        erased, before = (folder / f"{i}_{name}.png" for name in ("erased", "base"))
        paths = [path for path in (erased, before) if path.is_file()]
        prompts: list[str] = []
        for path in paths:
            prompts.append(" ".join(str(open_picture(path, ("PNG",)).info.get(_PROMPT, "")).split()))
        if erased in paths:
            samples.append((prompts[0], erased, before if before in paths else None))
    return samples


def clean_png(path: Path, prompt: str | None) -> bytes:
    """Return a picture as a PNG with nothing in it but its pixels and its prompt."""
    clean = open_picture(path)
    clean.info.clear()
    return png(clean, prompt)


def data_uri(picture: Image.Image, side: int) -> str:
    """Return a picture as an address that holds it, for a page that asks for nothing: PNG, or JPEG of one that was large.

    Args:
        picture: Any picture; it may become smaller.
        side: Most pixels of its longer side.
    """
    kind, content = "png" if max(picture.size) < side else "jpeg", io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(content, kind)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def webp(frames: Sequence[Image.Image]) -> bytes:
    """Return the frames of a video as an animated WebP file, lossless."""
    content, (first, *others) = io.BytesIO(), frames
    first.save(content, "WEBP", save_all=True, append_images=others, duration=_FRAME, loop=0, lossless=True)
    return content.getvalue()


def png(picture: Image.Image, prompt: str | None = None) -> bytes:
    """Return a picture as a PNG file, with its prompt inside if there is one."""
    content, note = io.BytesIO(), PngImagePlugin.PngInfo()
    if prompt:
        note.add_itxt(_PROMPT, prompt)
    picture.save(content, "PNG", pnginfo=note)
    return content.getvalue()
