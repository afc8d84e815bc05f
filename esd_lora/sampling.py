"""Generating pictures with erasers on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Unpack

from PIL.Image import Image

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import Strength, strengths_of
from esd_lora.files import reserve_directory, write_files
from esd_lora.formats.opening import open_eraser
from esd_lora.gating import Gate
from esd_lora.pictures import Sampling, even_batches, film, grid, pictures_at_once, png, still, webp
from esd_lora.ranks import is_main, merge, share

COMPARISON, STRENGTHS, GATES = "comparison.png", "strengths.png", "gates.json"
"""What `write_pictures` leaves beside the pictures."""


def generate(
    base: str | Path | Base,
    prompts: Sequence[str],
    *,
    erasers: Sequence[Eraser | str | Path] = (),
    weights: Sequence[float | Strength] | None = None,
    gate: Gate | None = None,
    seeds: Sequence[int] = (0,),
    **sampling: Unpack[Sampling],
) -> list[Image]:
    """Generate one picture for each prompt and seed, prompts first: `[p0 s0, p0 s1, ..., p1 s0, ...]`.

    Args:
        base: A base name, directory or Hub id, or a loaded base; of one that was loaded with `text_first`, the text encoders
            leave once the prompts are encoded.
        prompts: What to paint.
        erasers: Erasers or their paths, applied together as one exact stack.
        weights: Strength of each eraser, 1 by default.
        gate: Says for every prompt how far each eraser is on, on top of `weights`; without one all are on for all.
        seeds: Seeds of the noise; the same seed with and without erasers starts from the same noise.
        sampling: Steps, guidance, negative prompt, size and scheduler: see `pictures.Sampling`.

    Raises:
        EsdLoraError: If the base or an eraser cannot be loaded, they do not fit each other, or the base cannot paint so.
    """
    return sweep(base, prompts, (1.0,), erasers=erasers, weights=weights, gate=gate, seeds=seeds, **sampling)[1.0]


def generate_videos(
    base: str | Path | Base,
    prompts: Sequence[str],
    *,
    erasers: Sequence[Eraser | str | Path] = (),
    weights: Sequence[float | Strength] | None = None,
    gate: Gate | None = None,
    seeds: Sequence[int] = (0,),
    **sampling: Unpack[Sampling],
) -> list[list[Image]]:
    """Generate one video for each prompt and seed, and return its frames, in `generate`'s order; that has the middle ones.

    Args:
        base: As in `generate`, one that makes videos, such as Wan.
        prompts: What to paint.
        erasers: As in `generate`.
        weights: As in `generate`.
        gate: As in `generate`.
        seeds: As in `generate`.
        sampling: As in `generate`; `frames` is the length.

    Raises:
        EsdLoraError: As `generate` does.
    """
    return _sweep(base, prompts, (1.0,), erasers, weights, gate, seeds, sampling)[1.0]


def sweep(
    base: str | Path | Base,
    prompts: Sequence[str],
    strengths: Sequence[float],
    *,
    erasers: Sequence[Eraser | str | Path] = (),
    weights: Sequence[float | Strength] | None = None,
    gate: Gate | None = None,
    seeds: Sequence[int] = (0,),
    **sampling: Unpack[Sampling],
) -> dict[float, list[Image]]:
    """Generate the same pictures at several strengths of the whole stack; ranks, if there are several, share the batches.

    Args:
        base: As in `generate`.
        prompts: As in `generate`.
        strengths: Factors on top of `weights`: 0 the base, 1 the erasers as they are, beyond 1 stronger than trained, below 0
            the concepts amplified. 0 to 1.5 is usual.
        erasers: As in `generate`.
        weights: As in `generate`.
        gate: As in `generate`.
        seeds: As in `generate`.
        sampling: As in `generate`.

    Returns:
        Strength to pictures, in `generate`'s order.

    Raises:
        EsdLoraError: As `generate` does.
    """
    swept = _sweep(base, prompts, strengths, erasers, weights, gate, seeds, sampling)
    return {strength: [still(frames) for frames in videos] for strength, videos in swept.items()}


def _sweep(
    base: str | Path | Base,
    prompts: Sequence[str],
    strengths: Sequence[float],
    erasers: Sequence[Eraser | str | Path],
    weights: Sequence[float | Strength] | None,
    gate: Gate | None,
    seeds: Sequence[int],
    sampling: Sampling,
) -> dict[float, list[list[Image]]]:
    """Generate as `sweep` does, and return the frames of everything: a picture is one."""
    base = base if isinstance(base, Base) else load_base(base, text_first=True)
    base = base.skipping(sampling.get("clip_skip"))
    base.warn_of_cuts(prompts)
    members = [open_eraser(eraser, base.family.name) for eraser in erasers]
    base.know_words_of(members)
    member_strengths = strengths_of(members, weights)
    cases = [(prompt, seed) for prompt in prompts for seed in seeds]
    gates = {prompt: tuple(gate(prompt)) if gate else (1.0,) * len(members) for prompt in prompts}
    if any(member.changes_text for member in members):
        base.place_denoiser()  # prompts are encoded with the erasers on
    size, frames = base.picture_size(sampling.get("width"), sampling.get("height")), sampling.get("frames") or 1
    negative = sampling.get("negative_prompt")
    opposite = base.encode_opposite(negative) if negative and base.destination is not None else None
    encode = base.encode_last(prompts)
    batches: list[tuple[tuple[float, ...], float, list[int]]] = []
    for opening in dict.fromkeys(gates.values()):  # prompts for which the same erasers are on are painted together
        places = [i for i, (prompt, _) in enumerate(cases) if gates[prompt] == opening]
        parts = [
            [places[i] for i in part] for part in even_batches(len(places), pictures_at_once(base, size=size, frames=frames))
        ]
        batches += [(opening, strength, part) for strength in dict.fromkeys(strengths) for part in parts]
    painted: dict[tuple[float, int], list[Image]] = {}
    for opening, turns in groupby(share(batches), itemgetter(0)):
        on = [(e, s.after(Strength(factor))) for e, s, factor in zip(members, member_strengths, opening, strict=True) if factor]
        with applied(base, [e for e, _ in on], [s for _, s in on]) as fused:
            for strength, parts in groupby(turns, itemgetter(1)):
                fused.set_strength(strength)
                for _, _, part in parts:
                    texts, numbers = zip(*(cases[i] for i in part), strict=True)
                    videos = film(base, texts, numbers, encode=encode, opposite=opposite, **sampling)
                    painted |= {(strength, place): video for place, video in zip(part, videos, strict=True)}
    painted = merge(painted)
    return {strength: [painted[strength, place] for place in range(len(cases))] for strength in strengths}


def write_pictures(
    base: str | Path | Base,
    prompts: Sequence[str],
    out: str | Path,
    *,
    erasers: Sequence[Eraser | str | Path] = (),
    weights: Sequence[float | Strength] | None = None,
    gate: Gate | None = None,
    compare: bool = False,
    strengths: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    force: bool = False,
    **sampling: Unpack[Sampling],
) -> list[Path]:
    """Generate pictures into a folder: `000_seed0.png` and so on, by prompt and seed; beside a video's, `000_seed0.webp`.

    Args:
        base: As in `generate`.
        prompts: As in `generate`.
        out: Folder to make.
        erasers: As in `generate`.
        weights: As in `generate`.
        gate: As in `generate`; what it goes by is written into `gates.json`.
        compare: Whether to write `comparison.png`, the base's pictures above and the erased ones below.
        strengths: As in `sweep`; `strengths.png` gets a row for each, if there are any.
        seeds: As in `generate`.
        force: Write over an earlier run in the folder.
        sampling: As in `generate`.

    Returns:
        The pictures, and after them videos and sheets.

    Raises:
        EsdLoraError: As `generate` does, or if `out` is not empty and `force` is not set.
    """
    out = Path(out)
    names = [f"{i:03d}_seed{seed}.png" for i in range(len(prompts)) for seed in seeds]
    wanted = [1.0, *strengths, *([0.0] if compare else [])]
    read = [base.source or base.id if isinstance(base, Base) else base, *(e for e in erasers if not isinstance(e, Eraser))]
    with reserve_directory(out, force, read) if is_main() else nullcontext():
        videos = _sweep(base, prompts, wanted, erasers, weights, gate, seeds, sampling)
        pictures = {strength: [still(frames) for frames in each] for strength, each in videos.items()}
        files = {name: png(picture) for name, picture in zip(names, pictures[1.0], strict=True)}
        moving = {name: frames for name, frames in zip(names, videos[1.0], strict=True) if len(frames) > 1}
        files |= {f"{Path(name).stem}.webp": webp(frames) for name, frames in moving.items()}
        columns = [prompt for prompt in prompts for _ in seeds]
        if compare:
            files[COMPARISON] = png(grid({"base": pictures[0.0], "erased": pictures[1.0]}, columns))
        if strengths:
            labels = {0.0: "0 (base)"} | {value: f"{value:g} (amplified)" for value in strengths if value < 0}
            rows = {labels.get(value, f"{value:g}"): pictures[value] for value in strengths}
            files[STRENGTHS] = png(grid(rows, columns))
        sheets = [out / name for name in files]
        if gate:
            files[GATES] = json.dumps(gate.record(prompts), indent=1, ensure_ascii=False).encode()
        if is_main():
            write_files(out, files, replaces=(COMPARISON, STRENGTHS, GATES))
    return sheets
