"""Prompt files of other people's evaluations: CSV with whatever their columns are called.

The same benchmark goes from paper to paper with other column names, an index column, multi-line prompts and seeds of 64 bits.
Files are read where they lie and never shipped; a known one is recognised by its hash, a changed copy of it is not.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from esd_lora.built_in import MAX_PROMPT_FILE, MAX_PROMPTS, read_prompts
from esd_lora.errors import EsdLoraError, shortened
from esd_lora.evaluation.cases import Case
from esd_lora.files import read_bounded

COLUMNS = {
    "case": ("case_number", "case_num"),
    "prompt": ("prompt",),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance"),
    "width": ("sd_image_width", "width"),
    "height": ("sd_image_height", "height"),
    "label": ("class", "classes", "artist", "label_str", "categories"),
}
"""What is read, and the columns it may stand in, of which the first one that is there counts."""
KNOWN = {
    "6c1821aeeb20beb2": ("I2P", 4703),
    "80983daa394cd10e": ("ESD art", 75),
    "a17a182d939aadaa": ("ESD big artists", 100),
    "200e8c522d95ba8e": ("ESD niche artists", 100),
    "d0a7b5d39c0c5b31": ("ESD generic artists", 1000),
    "c7675ce6faae0b25": ("ESD ImageNet", 1860),
    "4ab01d9e98b0a230": ("ESD small ImageNet", 100),
    "78f60bf745f4233a": ("ESD Kelly McKernan", 19),
    "c299f14b2945ed88": ("ESD Van Gogh", 50),
    "785b35c0586d7231": ("AdvUnlearn COCO 10k", 10000),
    "4987e201148cfa3b": ("UnlearnDiffAtk church", 50),
    "e561240be67ea653": ("UnlearnDiffAtk garbage truck", 50),
    "f44fdef671aecf3f": ("UnlearnDiffAtk parachute", 50),
    "6d5fc0988e40e7ef": ("UnlearnDiffAtk tench", 50),
    "9d0b141b6674b5ef": ("UnlearnDiffAtk Van Gogh", 50),
}
"""First 16 hex digits of the file's SHA-256 to name and rows. From the repositories rohitgandikota/erasing (`data/`),
OPTML-Group/Diffusion-MU-Attack (`prompts/`), OPTML-Group/AdvUnlearn (`data/prompts/`), and I2P (`unsafe-prompts4703.csv`)."""


class PromptFile(NamedTuple):
    """A prompt file as read."""

    path: Path
    sha256: str
    release: str | None
    """Name of a known file that this one is, byte for byte."""
    cases: list[Case]
    """A case for each row: its id as the file counts, or the number of the row from 0; that is the seed where none is given."""
    rows: list[dict[str, str]]
    """Column to text of each row, as it stands."""


def read_prompt_file(path: str | Path) -> PromptFile:
    """Read a CSV of prompts, or a text file with one prompt a line.

    Raises:
        EsdLoraError: If the file cannot be read or is too large, has no column of prompts, a row has too many or too few
            fields, a case stands twice, or a seed, guidance or size is not one; the message names line and column.
    """
    path = Path(path)
    try:
        data = read_bounded(path, MAX_PROMPT_FILE)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise EsdLoraError(f"there is no prompt file {path}. Give the path of a CSV or text file that you fetched.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EsdLoraError(f"prompts cannot be read from {path} ({error}). Expected a CSV or text file in UTF-8.") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if path.suffix.lower() not in (".csv", ".txt"):
        raise EsdLoraError(f"{path} is no prompt file by its name. Expected .csv, or .txt with one prompt a line.")
    if path.suffix.lower() == ".txt":
        cases = [Case(str(i), "general", prompt, i) for i, prompt in enumerate(read_prompts(path))]
        return PromptFile(path, sha256, None, cases, [{} for _ in cases])
    cases, rows = _read_table(path, text)
    release, count = KNOWN.get(sha256[:16], (None, len(cases)))
    assert count == len(cases), f"{path} is {release}, of {count} rows, and {len(cases)} were read"
    return PromptFile(path, sha256, release, cases, rows)


def _read_table(path: Path, text: str) -> tuple[list[Case], list[dict[str, str]]]:
    """Return the rows of a CSV as cases, and as they stand."""
    # Fields may hold line breaks, so a row is not a line; the reader counts the lines it has taken.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in islice(reader, MAX_PROMPTS + 2) if row]
    except csv.Error as error:
        raise EsdLoraError(f"{path}, line {reader.line_num}: {error}. Mend the quotes there.") from error
    if len(rows) > MAX_PROMPTS + 1:
        raise EsdLoraError(f"{path} has more than {MAX_PROMPTS:,} rows. Give a file of fewer prompts.")
    if not rows:
        raise EsdLoraError(f"{path} is empty. Expected a CSV with a column `prompt`.")
    (_, names), *rows = rows
    names = [name.strip() for name in names]
    places = {
        what: names.index(next(column for column in columns if column in names))
        for what, columns in COLUMNS.items()
        if not set(columns).isdisjoint(names)
    }
    if "prompt" not in places:
        raise EsdLoraError(f"{path} has the columns {', '.join(map(repr, names))}. Expected one called `prompt`.")
    if not rows:
        raise EsdLoraError(f"{path} has a head and no rows. Expected a prompt in each.")
    ragged = [(line, len(row)) for line, row in rows if len(row) != len(names)]
    if ragged:
        line, fields = ragged[0]
        raise EsdLoraError(
            f"{path}: {len(ragged)} of {len(rows)} rows do not have the head's {len(names)} fields, the first, which ends on"
            f" line {line}, has {fields}. A prompt that holds a comma must stand in double quotes."
        )
    cases: list[Case] = []
    for i, (line, row) in enumerate(rows):
        fields = {what: row[place].strip() for what, place in places.items()}
        where = f"{path}, line {line}"
        seed, width, height = (_read_integer(where, what, fields.get(what)) for what in ("seed", "width", "height"))
        case = Case(fields.get("case") or str(i), "general", fields["prompt"], i if seed is None else seed)
        guidance, size = _read_guidance(where, fields.get("guidance")), (width, height) if width and height else None
        cases.append(case._replace(label=fields.get("label") or None, guidance=guidance, size=size))
    if twice := [case for case, times in Counter(case.id for case in cases).items() if times > 1]:
        shown = ", ".join(twice[:3])
        raise EsdLoraError(f"{path}: {len(twice)} case numbers stand more than once ({shown}). Give every row one of its own.")
    return cases, [dict(zip(names, row, strict=True)) for _, row in rows]


def _read_integer(where: str, what: str, text: str | None) -> int | None:
    """Return a whole number, also as pandas writes one in a column with gaps ("3721.0"); seeds do not fit into a float."""
    if not text:
        return None
    digits = text.removesuffix(".0")
    if not digits.isdecimal() or len(digits) > 100 or int(digits) >= 2**63:
        raise EsdLoraError(f"{where}: {what} is {shortened(repr(text))}. Expected a whole number from 0 to 2^63 - 1.")
    return int(digits)


def _read_guidance(where: str, text: str | None) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise EsdLoraError(f"{where}: guidance is {text!r}. Expected a number from 0.")
    return value
