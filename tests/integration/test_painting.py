"""Painting an evaluation: one batch is written while the next is painted, and nobody can tell from what is left."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL.Image import Image, new

from esd_lora import pictures
from esd_lora.bases.base import Base
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation import scoring
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.picture_files import painted_file
from esd_lora.evaluation.scoring import paint_missing
from esd_lora.evaluation.variants import Painter, Variant, bare
from esd_lora.pictures import even_batches, paint, png

CASES = [Case(f"all-{i}", "general", prompt, seed=i) for i, prompt in enumerate(["a cat", "a dog", "a car"] * 3)]
BATCH = 2
PARTS = [CASES[part.start : part.stop] for part in even_batches(len(CASES), 2 * BATCH)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_BATCH", 2 * BATCH)


def painting(paint: Painter) -> list[Variant]:
    return [Variant("mine", {}, lambda: nullcontext(paint))]


def plain(cases: Sequence[Case]) -> list[Image]:
    return [new("RGB", (8, 8), (case.seed, 0, 0)) for case in cases]


def names(folder: Path) -> list[str]:
    """What lies below a folder, hidden files too."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_files_are_those_of_painting_and_writing_in_turn(base: Base, tmp_path: Path) -> None:
    paint_missing(tmp_path, [bare(base, 2, 7.5)], CASES, progress=False)
    assert [len(part) for part in PARTS] == [BATCH, BATCH, BATCH, BATCH + 1]
    for part in PARTS:
        images = paint(base, [case.prompt for case in part], [case.seed for case in part], steps=2, guidance=7.5)
        for case, image in zip(part, images, strict=True):
            assert painted_file(tmp_path, "base", case.id).read_bytes() == png(image)
    assert names(tmp_path) == [f"{case.id}.png" for case in CASES]


def test_no_more_than_two_batches_are_held(tmp_path: Path) -> None:
    written: list[int] = []

    def counted(cases: Sequence[Case]) -> list[Image]:
        written.append(len(names(tmp_path)))
        return plain(cases)

    paint_missing(tmp_path, painting(counted), CASES, progress=False)
    assert len(written) == len(PARTS)
    assert all(count >= BATCH * (batch - 1) for batch, count in enumerate(written)), "but for the last, all are written"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, EsdLoraError("no"), MemoryError])
def test_what_is_painted_is_written_whatever_stops_it(stop: type[BaseException] | BaseException, tmp_path: Path) -> None:
    def stopped(cases: Sequence[Case]) -> list[Image]:
        if cases[0].seed == 2 * BATCH:
            raise stop
        return plain(cases)

    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        paint_missing(tmp_path, painting(stopped), CASES, progress=False)
    assert names(tmp_path) == [f"{case.id}.png" for case in CASES[: 2 * BATCH]]


@pytest.mark.parametrize("last", [False, True])
def test_full_disk_stops_the_painting(last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that writes is told of it; whoever called hears it, and no half picture is left."""
    full = len(CASES) - 1 if last else 3
    painted: list[str] = []
    write_bytes = Path.write_bytes

    def filling(path: Path, content: Any) -> int:
        if f"all-{full}." in path.name:
            write_bytes(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    def noted(cases: Sequence[Case]) -> list[Image]:
        painted.extend(case.id for case in cases)
        return plain(cases)

    monkeypatch.setattr(Path, "write_bytes", filling)
    with pytest.raises(EsdLoraError, match=rf"output .*all-{full}\.png cannot be written: No space left on device"):
        paint_missing(tmp_path, painting(noted), CASES, progress=False)
    assert names(tmp_path) == [f"{case.id}.png" for case in CASES[:full]]
    assert len(painted) == (len(CASES) if last else 6), "one batch beyond the one that could not be written"
    monkeypatch.undo()
    paint_missing(tmp_path, painting(plain), CASES, progress=False)
    assert names(tmp_path) == [f"{case.id}.png" for case in CASES]


def test_large_pictures_are_decoded_one_by_one(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seeds = ["a cat", "a dog", "a car"], [0, 1, 2]
    decoded: list[int] = []
    decode = base.pipe.vae._decode

    def counted(latents: Any, *args: Any, **kwargs: Any) -> Any:
        decoded.append(len(latents))
        return decode(latents, *args, **kwargs)

    monkeypatch.setattr(base.pipe.vae, "_decode", counted)
    together = paint(base, prompts, seeds, steps=1)
    pixels = 3 * together[0].width * together[0].height
    monkeypatch.setattr(pictures, "_DECODED", pixels)
    assert [image.tobytes() for image in paint(base, prompts, seeds, steps=1)] == [image.tobytes() for image in together]
    monkeypatch.setattr(pictures, "_DECODED", pixels - 1)
    apart = paint(base, prompts, seeds, steps=1)
    assert decoded == [3, 3, 1, 1, 1]
    for one, other in zip(apart, together, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1
    assert not base.pipe.vae.use_slicing

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(base.pipe.vae, "_decode", broken)
    with pytest.raises(KeyboardInterrupt):
        paint(base, prompts, seeds, steps=1)
    assert not base.pipe.vae.use_slicing
    base.pipe.vae.enable_slicing()  # whoever set it keeps it
    monkeypatch.setattr(base.pipe.vae, "_decode", decode)
    paint(base, prompts, seeds, steps=1)
    assert base.pipe.vae.use_slicing
    base.pipe.vae.disable_slicing()
