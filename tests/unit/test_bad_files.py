"""Files that a stranger made, on purpose or not: one sentence, and nothing half-done."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from esd_lora.bases.learnt_words import placeholder_of, unpack
from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.erasers.header import HEADER_KEY
from esd_lora.erasers.tensor_files import read_header, read_rows, read_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.formats.exporting import LAYOUTS, export
from esd_lora.formats.importing import import_lora
from esd_lora.formats.inspecting import diff, inspect_file
from esd_lora.wording import slug
from random_erasers import build_header, random_eraser

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
LONG = "a very long name of a concept, " * 40
NAMES = {
    "unicode": "猫 🐈 c'est ça",
    "very long": LONG,
    "path": "../../etc/passwd",
    "no letters": "?!",
    "control": "a\x00b\ncat",
}


def safetensors_file(file: Path, header: object, data: bytes = b"\0" * 4, length: int | None = None) -> Path:
    """A safetensors file made by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


DAMAGED = {
    "garbage": (b"\x93NUMPY and so on", b"", None),
    "header beyond the file": ({"a": ONE}, b"\0" * 4, 30_000_000),
    "header of an exabyte": ({"a": ONE}, b"\0" * 4, 2**60),
    "header of 100 MB": ({"a": ONE}, b"\0" * 4, 100_000_000),
    "overlapping tensors": ({"a": ONE, "b": ONE}, b"\0" * 4, None),
    "gap between tensors": ({"a": ONE, "b": {**ONE, "data_offsets": [8, 12]}}, b"\0" * 12, None),
    "offset beyond the file": ({"a": {**ONE, "shape": [2**30], "data_offsets": [0, 2**32]}}, b"\0" * 4, None),
    "negative offset": ({"a": {**ONE, "data_offsets": [-4, 0]}}, b"\0" * 4, None),
    "shape that overflows": ({"a": {**ONE, "shape": [2**40, 2**40]}}, b"\0" * 4, None),
    "unknown dtype": ({"a": {**ONE, "dtype": "F31"}}, b"\0" * 4, None),
    "data left over": ({"a": ONE}, b"\0" * 12, None),
    "data cut off": ({"a": ONE}, b"\0", None),
    "metadata that is no text": ({"__metadata__": {"x": 1}, "a": ONE}, b"\0" * 4, None),
    "header that is no JSON": (b"{not json}", b"", None),
    "a name twice": (b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}", b"\0" * 4, None),
    "deep nesting": (b'{"a":' + b"[" * 200_000, b"", None),
}
READERS = {"load": Eraser.load, "import": import_lora, "inspect": inspect_file, "header": read_header}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("header", "data", "length"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_told_in_a_sentence(
    tmp_path: Path, header: object, data: bytes, length: int | None, reader: object
) -> None:
    file = safetensors_file(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(EsdLoraError, match="damaged") as caught:
        reader(file)  # type: ignore[operator]
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("begins", [b"PK", b"\x80\x02", b"\x80\x04"])
def test_a_header_may_be_as_long_as_an_archive_or_a_pickle_begins(begins: bytes, tmp_path: Path) -> None:
    length = int.from_bytes(begins, "little")
    text = json.dumps({"x": ONE}).encode().ljust(length)
    file = safetensors_file(tmp_path / "x.safetensors", text)
    assert file.read_bytes().startswith(begins)
    assert read_tensors(file)[0]["x"].shape == (1,)


def test_metadata_may_be_null(tmp_path: Path) -> None:
    file = safetensors_file(tmp_path / "x.safetensors", {"__metadata__": None, "x": ONE})
    assert read_header(file).metadata == {}
    assert read_header(file).tensors.keys() == read_tensors(file)[0].keys() == {"x"}


@pytest.mark.parametrize("head", [b"PK\x03\x04", b"\x80\x02}q\x00", b"\x80\x04\x95"])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_pickle_under_a_safe_name(tmp_path: Path, head: bytes, reader: object) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(head + b"\0" * 100)
    with pytest.raises(EsdLoraError, match="is a pickle, not a safetensors file"):
        reader(file)  # type: ignore[operator]


def spoilt_file(tmp_path: Path, **changes: torch.Tensor) -> Path:
    """An eraser whose tensors were exchanged."""
    from safetensors.torch import save_file

    tensors = {**random_eraser({"conv": 2}, dtype=torch.float32).state_dict()}
    for name, tensor in changes.items():
        tensors[f"unet.conv.lora_{name}.weight"] = tensor
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, {HEADER_KEY: build_header().model_dump_json()})
    return file


SPOILT = {
    "NaN": ({"A": torch.full((2, 2, 3, 3), torch.nan)}, "NaN or infinity"),
    "infinity": ({"B": torch.full((3, 2, 1, 1), -torch.inf)}, "NaN or infinity"),
    "rank 0": ({"A": torch.ones(0, 2, 3, 3), "B": torch.ones(3, 0, 1, 1)}, "no update of rank 1 or more"),
    "no outputs": ({"B": torch.ones(0, 2, 1, 1)}, "no update of rank 1 or more"),
    "ranks that differ": ({"B": torch.ones(3, 1, 1, 1)}, "no lora_B that fits"),
    "linear up of a convolution": ({"B": torch.ones(3, 2)}, "no lora_B that fits"),
    "kernel in both": ({"B": torch.ones(3, 2, 3, 3)}, "no update of rank"),
    "vectors": ({"A": torch.ones(2), "B": torch.ones(3)}, "no lora_B that fits"),
    "integers": ({"A": torch.ones(2, 2, 3, 3, dtype=torch.int32)}, "int32"),
    "truth values": ({"B": torch.ones(3, 2, 1, 1, dtype=torch.bool)}, "bool"),
    "float8": ({"B": torch.ones(3, 2, 1, 1).to(torch.float8_e5m2)}, "float8_e5m2"),
}


@pytest.mark.parametrize(("changes", "words"), SPOILT.values(), ids=SPOILT)
def test_tensors_that_are_no_lora(tmp_path: Path, changes: dict[str, torch.Tensor], words: str) -> None:
    file = spoilt_file(tmp_path, **changes)
    with pytest.raises(EsdLoraError, match=words) as caught:
        Eraser.load(file)
    assert f"{file}: layer conv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_beyond_two_gigabytes(tmp_path: Path) -> None:
    """Offsets beyond 2 ** 31, in a file with holes that takes no room on the disk."""
    rows, width = 70_000, 10_000
    size = 4 * rows * width
    entry = {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}
    last = {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]}
    file = safetensors_file(tmp_path / "big.safetensors", {"a": entry, "b": last}, b"")
    with file.open("r+b") as opened:
        start = opened.seek(0, 2)
        opened.truncate(start + size + 8)
        opened.seek(start + size)
        opened.write(struct.pack("<ff", 1.5, 2.5))
        opened.seek(start + size - 4)
        opened.write(struct.pack("<f", 3.5))
    assert file.stat().st_size > 2**31
    header = read_header(file)
    with file.open("rb") as source:
        assert read_rows(source, header, "b").tolist() == [1.5, 2.5]
        row = read_rows(source, header, "a", slice(rows - 1, rows))
    assert (tuple(row.shape), float(row[0, -1]), float(row[0, 0])) == ((1, width), 3.5, 0.0)
    with pytest.raises(EsdLoraError, match="not an eraser"):
        Eraser.load(file)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_concept_name(tmp_path: Path, name: str) -> None:
    """Saved, loaded, exported, inspected and compared, and never part of a path."""
    eraser = random_eraser({"conv": 2}, name, dtype=torch.float32)
    folder = eraser.save(tmp_path / "eraser")
    assert Eraser.load(folder).names == [name]
    for layout in LAYOUTS[1:]:
        file = export(eraser, tmp_path / (layout if layout == "peft" else f"{layout}.safetensors"), layout=layout)
        assert import_lora(file).names == [name]
    assert inspect_file(folder).lines()
    assert diff(folder, tmp_path / "diffusers.safetensors").overall == 0
    short = slug(name)
    assert 0 < len(short.encode()) <= 200
    assert not set(short) & set("/\\\0\n .")
    assert {path.name for path in tmp_path.iterdir()} == {"eraser", "diffusers.safetensors", "peft"}


@pytest.mark.parametrize("write", ["save", *LAYOUTS[1:]])
def test_place_that_cannot_be_written(write: str) -> None:
    """/proc refuses directories and files to everybody, root included."""
    eraser, out = random_eraser({"conv": 2}), Path("/proc/esd-lora")
    place = out / "x.safetensors" if write == "diffusers" else out
    with pytest.raises(EsdLoraError, match=r"output /proc/esd-lora.* cannot be written") as caught:
        _ = eraser.save(out) if write == "save" else export(eraser, place, layout=write)
    assert "\n" not in str(caught.value)


HEADERS = {
    "NaN": ('"weight":1.0', '"weight":NaN', "NaN is no JSON"),
    "infinity": ('"weight":1.0', '"weight":-Infinity', "Infinity is no JSON"),
    "infinity in digits": ('"weight":1.0', '"weight":1e999', "weight: .*finite number"),
    "year that no clock has": ('"created":"2', '"created":"0001-01-01T00:00:00", "x":"', "created: "),
    "deep": ('"weight":1.0', '"weight":' + "[" * 100_000, "damaged header"),
    "many digits": ('"weight":1.0', '"weight":' + "9" * 5000, "damaged header"),
    "long name": ('"versions":{', f'"versions":{{"{"x" * 100_000}":3,', "damaged header"),
    "long": ('"weight":1.0', f'"weight":1.0,"x":"{"x" * 2**26}"', "more than 67,108,864: it is no eraser's"),
}


@pytest.mark.parametrize(("old", "new", "words"), HEADERS.values(), ids=HEADERS)
def test_damaged_eraser_header(tmp_path: Path, old: str, new: str, words: str) -> None:
    from safetensors.torch import save_file

    eraser, file = random_eraser({"conv": 2}, dtype=torch.float32), tmp_path / "x.safetensors"
    text = eraser.header.model_dump_json()
    assert old in text
    save_file(eraser.state_dict(), file, {HEADER_KEY: text.replace(old, new, 1)})
    for read in (Eraser.load, inspect_file):
        with pytest.raises(EsdLoraError, match=words) as caught:
            read(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700


PICKLED = {
    "expanded": (torch.zeros(1).expand(50_000, 50_000), "and its tensors come to 10,000,000,0"),
    "overlapping": (torch.zeros(4000).as_strided((2000, 2000), (1, 1)), "its tensors come to 16,000,0"),
    "sparse": (torch.eye(3).to_sparse(), "is sparse"),
    "compressed rows": (lambda: torch.eye(3).to_sparse_csr(), "is sparse"),
    "meta": (torch.empty(50_000, 50_000, device="meta"), r"is on no device \(meta\)"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "is quantised"),
    "complex": (torch.ones(3, dtype=torch.complex64), "is complex"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of kinds of tensors that it may give up
@pytest.mark.parametrize(("tensor", "words"), PICKLED.values(), ids=PICKLED)
def test_tensor_that_is_no_plain_block_of_numbers(tmp_path: Path, tensor: object, words: str) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a.lora_up.weight": tensor if isinstance(tensor, torch.Tensor) else tensor()}, file)  # type: ignore[operator]
    assert file.stat().st_size < 50_000
    for read in (import_lora, read_tensors):
        with pytest.raises(EsdLoraError, match=words) as caught:
            read(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def rewritten(file: Path, compression: int = zipfile.ZIP_STORED, change: Callable[[bytes], bytes] = bytes) -> Path:
    """An archive of torch's, its pickle changed."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return file


def test_archive_that_would_be_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a.lora_up.weight": torch.zeros(1_000_000)}, file)
    assert rewritten(file, zipfile.ZIP_DEFLATED).stat().st_size < 50_000
    with pytest.raises(EsdLoraError, match="compressed"):
        read_tensors(file)


def test_tensor_larger_than_what_the_archive_has_of_it(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a.lora_up.weight": torch.arange(4.0)}, file)
    longer = {b"K\x04t": b"J\x00\x00\x10\x00t", b"K\x04\x85": b"J\x00\x00\x10\x00\x85"}  # 4 becomes 2 ** 20

    def lengthen(content: bytes) -> bytes:
        for old, new in longer.items():
            assert old in content
            content = content.replace(old, new)
        return content

    with pytest.raises(EsdLoraError, match="cannot be read as tensors alone"):
        read_tensors(rewritten(file, change=lengthen))


GOLDEN = Path(__file__).parent.parent / "golden"
"""Files written when their format was new, which are never made anew."""


def test_format_1_is_read(tmp_path: Path) -> None:
    eraser = Eraser.load(GOLDEN / "format_1.safetensors")
    assert eraser.names == ["a cat", "Van Gogh"]
    assert (eraser.header.format, eraser.header.concepts[0].eta) == (1, 3.0)
    expected = random_eraser({"mid.attn2.to_k": 2, "conv": 1}, dtype=torch.float32)
    assert all(torch.equal(eraser.pairs[m].delta(), pair.delta()) for m, pair in expected.pairs.items())
    assert eraser.save(tmp_path / "again") / WEIGHTS_NAME


def test_format_2_is_read() -> None:
    """A compressed stack of a trained eraser and an imported one at half its strength, inverted, off in one block."""
    eraser = Eraser.load(GOLDEN / "format_2.safetensors")
    header = eraser.header
    assert (header.format, header.prediction_type, header.truncation) == (2, "epsilon", 0.01)
    cat, _, car = header.concepts
    assert (cat.name, cat.weight, cat.eta) == ("a cat", 1.0, 3.0)
    assert (car.name, car.weight, car.blocks) == ("a car", -0.5, {"mid_block": 0.0})
    assert [(origin.how, origin.layout) for origin in header.origins] == [("imported", "kohya")]
    first = random_eraser({"mid.attn2.to_k": 2, "conv": 1}, dtype=torch.float32)
    second = random_eraser({"mid.attn2.to_k": 1, "shortcut": 2}, seed=1, dtype=torch.float32)
    torch.testing.assert_close(eraser.pairs["mid.attn2.to_k"].delta(), first.pairs["mid.attn2.to_k"].delta())
    torch.testing.assert_close(eraser.pairs["shortcut"].delta(), -0.5 * second.pairs["shortcut"].delta())


def test_format_3_is_read() -> None:
    """A fused and harmonised stack."""
    eraser = Eraser.load(GOLDEN / "format_3.safetensors")
    (fusion,) = eraser.header.fusions
    assert (eraser.header.format, eraser.names) == (3, ["a cat", "a car"])
    (spent,) = eraser.header.distillations
    assert (fusion.lam, fusion.kept, fusion.dropped) == (0.1, 3, ("two cats",))
    assert (spent.steps, spent.trajectories, spent.last_loss) == (60, (32, 32), 0.02)
    assert eraser.pairs["conv"].rank == 3


def test_format_4_is_read() -> None:
    """An eraser whose recipe left numbers to be measured."""
    header = Eraser.load(GOLDEN / "format_4.safetensors").header
    (recipe,), (calibration,) = header.recipes, header.calibrations
    assert (header.format, recipe.eta, recipe.frames, recipe.train.lr, recipe.train.steps) == (
        4,
        "auto",
        "auto",
        "auto",
        "auto",
    )
    assert (calibration.lr, calibration.etas, calibration.preserve_weights[-1]) == (0.0077, ((0, 1.0), (75, 2.0)), (105, 1.95))
    assert [reading.step for reading in calibration.readings] == [15, 30]
    assert header.concepts[0].eta == calibration.etas[-1][1]
    assert calibration.ending.startswith("ended after 135 steps")


def test_format_5_is_read() -> None:
    """An eraser made from pictures, with the word that was learnt from them."""
    header = Eraser.load(GOLDEN / "format_5.safetensors").header
    (concept,) = header.concepts
    assert concept.shown is not None
    assert (header.format, concept.name, header.recipes[0].concepts[0].images) == (5, "our mascot", "pictures")
    assert [digest[:8] for digest in concept.shown.pictures] == ["a0437212", "b090fc26"]
    ((placeholder, word),) = concept.shown.words.items()
    assert concept.pairs == ((f"a {placeholder}", "a dog"),)
    vectors = unpack(word)
    assert {name: vector.shape[0] for name, vector in vectors.items()} == {"text_encoder": 16}
    assert placeholder_of(vectors) == placeholder, "it is named by its bytes"
    assert concept.shown.explained_by == {"a hat": 0.75}
