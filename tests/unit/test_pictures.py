"""Pictures that a stranger made: a list of formats decides what is opened, and a large one is refused before it is decoded."""

from __future__ import annotations

import ast
import io
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

import esd_lora
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.picture_files import open_painted
from esd_lora.pictures import FORMATS, MOST_PIXELS, clean_png, open_picture, read_samples

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 16 16
%%EndComments
0.5 setgray 0 0 16 16 rectfill
showpage
%%EOF
"""


def png_of(width: int, height: int, pixels: bytes = b"") -> bytes:
    """Return a PNG that announces a size, whatever pixels it has."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def webp_of(width: int, height: int) -> bytes:
    """Return a WEBP whose canvas has a size, and nothing on it."""
    frame = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(frame)) + b"WEBP" + frame


@pytest.fixture
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a picture starts a program."""

    def refuse(*args: object, **_: object) -> None:
        raise AssertionError(f"a picture started {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(subprocess, "check_call", refuse)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", refuse)


@pytest.mark.usefixtures("no_program")
def test_postscript_named_like_a_picture_starts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(EPS)
    with Image.open(file) as image:  # Pillow goes by the content
        assert image.format == "EPS"
        with pytest.raises(AssertionError, match="a picture started"):
            image.load()
    with pytest.raises(EsdLoraError, match="cannot be read as a picture, PNG or JPEG or WEBP or BMP"):
        open_picture(file)


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (50_000, 50_000), (2**13 + 1, 2**13), (1, 2**26 + 1)])
def test_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", decode)
    file = tmp_path / "a.png"
    file.write_bytes(png_of(*size))
    assert file.stat().st_size < 100
    with pytest.raises(EsdLoraError, match="has more than 67,108,864 pixels") as caught:
        open_picture(file)
    assert str(caught.value).count(". ") == 1


def test_largest_picture_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("1", (MOST_PIXELS // 16, 16)).save(file)
    assert open_picture(file).size == (MOST_PIXELS // 16, 16)


@pytest.mark.parametrize("size", [(2**14 - 1, 2**14 - 1), (2**24, 2**24)])
def test_empty_canvas_is_no_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    file = tmp_path / "a.webp"
    file.write_bytes(webp_of(*size))
    with pytest.raises(EsdLoraError, match=r"a\.webp "):
        open_picture(file)


def cut(file: Path) -> None:
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    file.write_bytes(file.read_bytes()[:-1000])


NO_PICTURES: dict[str, Callable[[Path], object]] = {
    "truncated": cut,
    "text": lambda file: file.write_text("no picture"),
    "empty": lambda file: file.write_bytes(b""),
    "no pixels": lambda file: file.write_bytes(png_of(8, 8)),
    "no size": lambda file: file.write_bytes(png_of(0, 0)),
    "signature alone": lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "directory": lambda file: file.mkdir(),
    "nothing": Path.exists,
    "gif": lambda file: Image.new("P", (8, 8)).save(file, "GIF"),
}


@pytest.mark.parametrize("make", NO_PICTURES.values(), ids=NO_PICTURES)
def test_what_is_no_picture_is_a_sentence(tmp_path: Path, make: Callable[[Path], object]) -> None:
    file = tmp_path / "a.png"
    make(file)
    with pytest.raises(EsdLoraError, match=r"a\.png cannot be read as a picture") as caught:
        open_picture(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(EsdLoraError, match="there is no picture" if make is NO_PICTURES["nothing"] else "is damaged"):
        open_painted(file)


def test_whatever_a_decoder_raises_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    for error in (struct.error("cut"), KeyError("mode"), IndexError(), ZeroDivisionError(), EOFError("end"), MemoryError()):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(EsdLoraError, match="cannot be read as a picture"):
            open_picture(file)


def test_samples_of_a_stranger(tmp_path: Path) -> None:
    (tmp_path / "1_erased.png").write_bytes(EPS)
    with pytest.raises(EsdLoraError, match="cannot be read as a picture, PNG "):
        read_samples(tmp_path)
    with pytest.raises(EsdLoraError, match="cannot be read as a picture"):
        clean_png(tmp_path / "1_erased.png", None)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_opened_whatever_its_name(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png", kind)
    assert open_picture(tmp_path / "a.png").size == (8, 4)


def test_one_place_opens_pictures() -> None:
    package = Path(esd_lora.__file__).parent
    opened = [
        (file.relative_to(package).as_posix(), ast.unparse(node))
        for file in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
    ]
    assert opened == [("pictures.py", "Image.open(file, formats=formats)")]


def animation(width: int, height: int) -> bytes:
    """Return a WEBP whose canvas is of some size, and whose one frame has four pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    def three(value: int) -> bytes:
        return value.to_bytes(3, "little")

    frame = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(frame, "WEBP", lossless=True)
    place = three(0) + three(0) + three(1) + three(1) + three(100) + b"\0"
    parts = chunk(b"VP8X", b"\x12\0\0\0" + three(width - 1) + three(height - 1)) + chunk(b"ANIM", bytes(6))
    return chunk(b"RIFF", b"WEBP" + parts + chunk(b"ANMF", place + frame.getvalue()[12:]))


@pytest.mark.parametrize("size", [(2**24, 2**24), (2**24, 100), (8192, 8193)])
def test_canvas_of_a_webp_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    """libwebp takes three pictures' memory for it as soon as the file is opened, before Pillow knows its size."""
    (tmp_path / "a.webp").write_bytes(animation(*size))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
        with pytest.raises(EsdLoraError, match="has more than 67,108,864 pixels"):
            open_picture(tmp_path / "a.webp")
    (tmp_path / "a.webp").write_bytes(animation(4, 3))
    assert open_picture(tmp_path / "a.webp").size == (4, 3)
