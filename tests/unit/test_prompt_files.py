"""Reading prompt files: every quirk of the published ones, by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from esd_lora import built_in
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.suites import prompt_files
from esd_lora.evaluation.suites.prompt_files import read_prompt_file

I2P = """,prompt,categories,hard,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height
0,"a crowd, at night",violence,0,4294967298,7,512,512
1,"two lines
of one prompt",hate,1,305,255.0,512,768
2,,shocking,0,9007199254740993,1,1024,448
"""
"""As I2P has them: an index column without a name, a prompt of two lines, an empty one, seeds beyond 32 and 53 bits."""


def written(folder: Path, text: str, name: str = "prompts.csv") -> Path:
    file = folder / name
    file.write_bytes(text.encode("utf-8"))
    return file


def fields(case: Case) -> tuple[object, ...]:
    """Return what a file says of a case, which is of no role yet."""
    assert (case.role, case.rest) == ("general", None)
    return case.id, case.prompt, case.seed, case.guidance, case.size, case.label


def test_every_quirk_of_i2p(tmp_path: Path) -> None:
    file = read_prompt_file(written(tmp_path, I2P))
    assert [fields(case) for case in file.cases] == [
        ("0", "a crowd, at night", 2**32 + 2, 7.0, (512, 512), "violence"),
        ("1", "two lines\nof one prompt", 305, 255.0, (512, 768), "hate"),
        ("2", "", 2**53 + 1, 1.0, (1024, 448), "shocking"),
    ]
    assert file.rows[1]["hard"] == "1"


@pytest.mark.parametrize(
    ("head", "row", "expected"),
    [
        ("case_number,prompt,evaluation_seed,evaluation_guidance", "7,a cat,3,7.5", ("7", "a cat", 3, 7.5, None, None)),
        ("case_num,prompt,evaluation_seed,classes", "7,a cat,3,tench", ("7", "a cat", 3, None, None, "tench")),
        ("Unnamed: 0,prompt,sd_seed,class", "7,a cat,3,tench", ("0", "a cat", 3, None, None, "tench")),
        ("case_number,source,prompt,evaluation_seed", "000203,coco,a cat,3", ("000203", "a cat", 3, None, None, None)),
        (" prompt , artist", "a cat, Monet", ("0", "a cat", 0, None, None, "Monet")),
        ("prompt,evaluation_seed", "a cat,3721.0", ("0", "a cat", 3721, None, None, None)),
        ("prompt,evaluation_seed,artist", "a cat,,", ("0", "a cat", 0, None, None, None)),
        ("\ufeffprompt", '"""Starry"" night"', ("0", '"Starry" night', 0, None, None, None)),
    ],
)
def test_columns_go_by_many_names(tmp_path: Path, head: str, row: str, expected: tuple[object, ...]) -> None:
    for end in ("\n", "\r\n"):
        (case,) = read_prompt_file(written(tmp_path, head + end + row + end + end)).cases
        assert fields(case) == expected


def test_text_files_are_counted(tmp_path: Path) -> None:
    found = read_prompt_file(written(tmp_path, "# mine\na cat\n\na dog, asleep\n", "mine.txt"))
    assert found.cases[1] == Case("1", "general", "a dog, asleep", 1)
    assert found.rows == [{}, {}]


def test_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    found = read_prompt_file(written(tmp_path, "\ufeff# from a Windows editor\na cat\n", "mine.txt"))
    assert [case.prompt for case in found.cases] == ["a cat"]


def test_known_files_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, I2P)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (read_prompt_file(file).sha256, read_prompt_file(file).release) == (sha256, None)
    monkeypatch.setitem(prompt_files.KNOWN, sha256[:16], ("I2P", 3))
    assert read_prompt_file(file).release == "I2P"
    assert read_prompt_file(written(tmp_path, I2P + "3,a,b,0,1,1,8,8\n")).release is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty. Expected a CSV with a column `prompt`"),
        ("prompt\n", "has a head and no rows"),
        ("case_number,text\n0,a cat\n", "has the columns 'case_number', 'text'. Expected one called `prompt`"),
        ("prompt,seed\na cat, asleep,1\na dog,2\n", "1 of 2 rows .* 2 fields, the first, which ends on line 2, has 3"),
        ("prompt,seed\na dog,1\na cat\n", "ends on line 3, has 1"),
        ("prompt,seed\na dog,one\n", "line 2: seed is 'one'. Expected a whole number"),
        ("prompt,seed\na dog,1.5\n", "line 2: seed is '1.5'"),
        (f"prompt,seed\na dog,{2**63}\n", f"line 2: seed is '{2**63}'"),
        ("prompt,seed\na dog,-1\n", "line 2: seed is '-1'"),
        ("prompt,guidance\na dog,much\n", "line 2: guidance is 'much'. Expected a number from 0"),
        ("prompt,guidance\na dog,nan\n", "line 2: guidance is 'nan'"),
        ("case_number,prompt\n1,a cat\n2,a cat\n1,a dog\n", r"1 case numbers stand more than once \(1\)"),
        ('prompt,seed\n"a cat" and "a dog",1\n', "line 2: .* Mend the quotes"),
        ('prompt,seed\n"a cat,1\n', "Mend the quotes"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(EsdLoraError, match=message):
        read_prompt_file(written(tmp_path, text))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match="there is no prompt file"):
        read_prompt_file(tmp_path / "none.csv")
    with pytest.raises(EsdLoraError, match="cannot be read"):
        read_prompt_file(tmp_path)
    (tmp_path / "latin.csv").write_bytes("prompt\nMir\xf3\n".encode("latin-1"))
    with pytest.raises(EsdLoraError, match="in UTF-8"):
        read_prompt_file(tmp_path / "latin.csv")
    with pytest.raises(EsdLoraError, match="is no prompt file by its name"):
        read_prompt_file(written(tmp_path, "{}", "prompts.json"))


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.txt"])
def test_file_without_end(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(built_in.MAX_PROMPT_FILE + 1)
    for read in (read_prompt_file, built_in.read_prompts):
        with pytest.raises(EsdLoraError, match=r"has more than 67,108,864 bytes"):
            read(tmp_path / name)


def test_device_without_end(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").symlink_to("/dev/zero")
    with pytest.raises(EsdLoraError, match=r"has more than 67,108,864 bytes"):
        read_prompt_file(tmp_path / "prompts.csv")


@pytest.mark.parametrize(("rows", "fits"), [(200_000, True), (200_001, False)])
def test_most_rows(tmp_path: Path, rows: int, fits: bool) -> None:
    table, lines = written(tmp_path, "prompt\n" + "x\n" * rows), written(tmp_path, "x\n" * rows, "prompts.txt")
    if fits:
        assert len(read_prompt_file(table).cases) == len(built_in.read_prompts(lines)) == rows
        return
    with pytest.raises(EsdLoraError, match="has more than 200,000 rows"):
        read_prompt_file(table)
    with pytest.raises(EsdLoraError, match="has 200,001 lines, more than 200,000"):
        read_prompt_file(lines)
