"""Lists of requests, one a row of a CSV or a line of JSON: read with every fault at once, compared, written.

A list comes out of a spreadsheet, or from a stranger, so it is data of a bounded size.
"""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast, get_args

import yaml
from pydantic import ValidationError

from esd_lora.errors import EsdLoraError, did_you_mean, shortened
from esd_lora.faults import Fault, faults_of, listed
from esd_lora.files import lock_output, read_bounded, write_atomically
from esd_lora.fleet.request import COLUMNS, SEPARATOR, Basis, Kind, Request, Status, setting_fault, setting_names
from esd_lora.json_files import parse_json
from esd_lora.wording import name_key
from esd_lora.yaml_files import parse_yaml

MAX_BYTES = 2**26
"""Longest list that is read: 200,000 rows of 300 bytes."""
MAX_REQUESTS = 200_000
"""Most requests of one list."""
_ENOUGH = 100
"""Faults after which the rest of a list is not looked at."""
_CHOICES = {"kind": get_args(Kind), "basis": get_args(Basis), "status": get_args(Status)}
_FORMULA = re.compile(r"'*(?!-?[0-9.]+(e[-+]?[0-9]+)?$)[-=+@\t\r]")
"""Cells that a spreadsheet would compute. Written, they get an apostrophe, which makes them text; read, they lose it."""
_STANDING = ("open", "done")
"""States in which what a request erases and keeps holds."""
_Faults: TypeAlias = list[tuple[int, str]]
"""The line of each, and a sentence without its full stop."""


class _Row(NamedTuple):
    """A row as it stands in its file."""

    line: int
    values: dict[str, Any]
    """By column, those that are known alone."""


def read_requests(file: str | Path) -> tuple[Request, ...]:
    """Read a list of requests, and warn of those whose names overlap.

    Args:
        file: CSV with a head, names within a cell separated by `;`, values of recipe overrides in YAML as with `-s key=value`,
            an apostrophe before what a spreadsheet would take for a formula; or `.jsonl`, with an object of the same names in
            each line.

    Raises:
        EsdLoraError: If it cannot be read or is too large, or with every fault at once, each as `file:line: field: what is
            wrong`: values that do not fit, unknown columns, ids that stand twice, and `contradictions`.
    """
    file = Path(file)
    rows, faults = _lines(file) if file.suffix.lower() == ".jsonl" else _table(file)
    requests: list[Request] = []
    for row in rows:
        request, sentences = _checked(row)
        faults += [(row.line, sentence) for sentence in sentences]
        if len(faults) > _ENOUGH:
            break
        requests += [request] if request else []

    def where(request: Request) -> str:
        return f"{file}:{request.line}"

    sentences = [f"{file}:{line}: {sentence}" for line, sentence in sorted(faults, key=lambda fault: fault[0])]
    sentences += [*_repeated(requests, where), *contradictions(requests, where)]
    if sentences:
        raise EsdLoraError("the requests have faults:\n  " + "\n  ".join(listed(sentences)))
    warn_of_overlaps(requests, where)
    return tuple(requests)


def _lines(file: Path) -> tuple[list[_Row], _Faults]:
    """Return the rows of a file of JSON Lines, and what is wrong with some."""
    rows, faults = list[_Row](), _Faults()
    for line, text in enumerate(_content(file).split("\n"), 1):
        if len(faults) > _ENOUGH:
            break
        if not text.strip():
            continue
        try:
            values = parse_json(text)
        except ValueError as error:
            faults.append((line, f"not valid JSON: {error}. Mend that line"))
            continue
        if not isinstance(values, dict):
            faults.append((line, f'holds {type(values).__name__}, expected an object such as {{"id": "no-cat"}}'))
            continue
        values = cast("dict[str, Any]", values)
        faults += [(line, sentence) for sentence in _column_faults(values)]
        empty = {name for name in COLUMNS if values.get(name) is None}
        rows.append(_Row(line, {name: value for name, value in values.items() if name in _known() and name not in empty}))
        _check_number(file, len(rows))
    return rows, faults


def _table(file: Path) -> tuple[list[_Row], _Faults]:
    """Return the rows of a CSV, and what is wrong with some; no rows where a column is missing that each must fill."""
    (top, head), *table = _cells(file)
    columns = [name.strip() for name in head]
    if len(columns) == 1 and (other := next((mark for mark in ";\t" if mark in columns[0]), None)):
        raise EsdLoraError(f"{file}:{top}: columns are separated by {other!r}, expected ','. Save it as CSV with commas.")
    times = Counter(columns)
    missing = [name for name in ("id", "concept", "kind") if name not in columns]
    faults = [(top, sentence) for sentence in _column_faults(columns)]
    faults += [(top, f"{name}: stands {times[name]} times. Keep one") for name in _known() if times[name] > 1]
    faults += [(top, f"{name}: missing column") for name in missing]
    rows: list[_Row] = []
    for line, cells in () if missing else table:
        if len(cells) != len(columns):
            faults.append(
                (line, f"{len(cells)} fields, expected {len(columns)} as in the head. Quote a cell with a comma in it")
            )
            continue
        values: dict[str, Any] = {}
        for name, cell in zip(columns, map(str.strip, cells), strict=True):
            if not cell or name not in _known():
                continue
            try:
                values[name] = cell if name in COLUMNS else parse_yaml(cell, "")[1]
            except EsdLoraError as error:
                faults.append((line, f"{name}: {str(error).partition(': ')[2].removesuffix('.')}"))
        rows.append(_Row(line, values))
    return rows, faults


def _cells(file: Path) -> list[tuple[int, list[str]]]:
    """Return the rows of a CSV that hold anything, each with the line it begins on."""
    # A cell may hold line breaks, so a row is not a line; the reader counts the lines it has taken.
    reader = csv.reader(io.StringIO(_content(file), newline=""), strict=True)
    rows, line = list[tuple[int, list[str]]](), 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((line, [cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell for cell in row]))
                _check_number(file, len(rows) - 1)
            line = reader.line_num + 1
    except csv.Error as error:
        raise EsdLoraError(f"{file}:{line}: not valid CSV: {error}. Mend the quotes there.") from error
    if not rows:
        raise EsdLoraError(f"{file} is empty. Expected a head with the columns id, concept and kind, and a request a row.")
    return rows


def _content(file: Path) -> str:
    """Return the text of a list."""
    _check_name(file)
    try:
        return read_bounded(file, MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise EsdLoraError(f"there is no list of requests {file}. Give the path of a CSV or JSON Lines file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EsdLoraError(f"requests cannot be read from {file} ({error}). Expected a file in UTF-8.") from error


def _check_name(file: Path) -> None:
    if file.suffix.lower() not in (".csv", ".jsonl"):
        raise EsdLoraError(f"{file} is no list of requests by its name. Expected .csv, or .jsonl with an object a line.")


def _check_number(file: Path, number: int) -> None:
    if number > MAX_REQUESTS:
        raise EsdLoraError(f"{file} has more than {MAX_REQUESTS:,} requests. Give a list of fewer.")


@cache
def _known() -> dict[str, None]:
    """Return the names of all columns, in order."""
    return dict.fromkeys((*COLUMNS, *setting_names()))


def _column_faults(names: Iterable[str]) -> list[str]:
    """Return what is wrong with names of columns, of enough of them."""
    unknown = islice((name for name in names if name not in _known()), _ENOUGH)
    return [f"{shortened(name) or 'a column without a name'}: unknown column{did_you_mean(name, _known())}" for name in unknown]


def _checked(row: _Row) -> tuple[Request | None, list[str]]:
    """Return the request of a row, and everything that is wrong with it."""
    settings = {name: value for name, value in row.values.items() if name not in COLUMNS}
    faults = {name: fault for name, value in settings.items() if (fault := setting_fault(name, value))}
    sentences = [f"{name}: {fault}" for name, fault in faults.items()]
    try:
        return Request.of_record({name: value for name, value in row.values.items() if name not in faults}, row.line), sentences
    except ValidationError as error:
        return None, [*map(_sentence, faults_of(error)), *sentences]


def make_request(record: Mapping[str, Any]) -> Request:
    """Return the request that a record of columns is of; what is empty counts as not given.

    Raises:
        EsdLoraError: With every fault at once.
    """
    values = {name: value for name, value in record.items() if value not in (None, "")}
    request, sentences = _checked(_Row(0, values))
    if sentences or request is None:
        raise EsdLoraError("the request has faults:\n  " + "\n  ".join(sentences))
    return request


def _sentence(fault: Fault) -> str:
    name = ".".join(map(str, fault.place))
    if not fault.place:  # of several fields together
        return fault.message
    if fault.type == "missing":
        return f"{name}: missing"
    near = did_you_mean(str(fault.value), _CHOICES[name]) if fault.type == "literal_error" else ""
    return f"{name}: {fault.message}, found {shortened(repr(fault.value))}{near}"


def _repeated(requests: Iterable[Request], where: Callable[[Request], str]) -> list[str]:
    """Return a sentence for each request whose id another has; folders of some systems do not know case."""
    first: dict[str, Request] = {}
    return [
        f"{where(request)}: id: {request.id!r} is that of {where(other)} too. Give each its own"
        for request in requests
        if (other := first.setdefault(request.id.casefold(), request)) is not request
    ]


def contradictions(requests: Iterable[Request], where: Callable[[Request], str]) -> list[str]:
    """Return a sentence, without its full stop, for each two requests that cannot both be met.

    They are open requests for the same concept, and such that erase what another keeps, of which one is open and the other open
    or done.

    Args:
        requests: All that there are.
        where: Returns the place of one: `file:line`.
    """
    standing = [request for request in requests if request.status in _STANDING]
    first: dict[str, Request] = {}
    sentences = [
        f"{where(request)}: concept: {request.concept!r} is open as {other.id} at {where(other)} too. Keep one of the two"
        for request in standing
        if request.status == "open" and (other := first.setdefault(name_key(request.concept), request)) is not request
    ]
    erasing = _first_of_each((request, name) for request in standing for name in request.names)
    keeping = _first_of_each((request, name) for request in standing for name in request.keep)
    for key in (key for key in erasing if key in keeping):
        for (eraser, name), (keeper, _) in product(erasing[key].values(), keeping[key].values()):
            if "open" in (eraser.status, keeper.status):
                field = "concept" if name == eraser.concept else "synonyms"
                sentences.append(
                    f"{where(eraser)}: {field}: {name!r} must be kept, says {keeper.id} at {where(keeper)}."
                    " Drop one of the two, or mark one as ambiguous"
                )
    return sentences


def _first_of_each(named: Iterable[tuple[Request, str]]) -> dict[str, dict[Status, tuple[Request, str]]]:
    """Return the first request of each status that says a name, and how, by what the ways to write the name have in common."""
    first: dict[str, dict[Status, tuple[Request, str]]] = {}
    for request, name in named:
        first.setdefault(name_key(name), {}).setdefault(request.status, (request, name))
    return first


def overlapping(requests: Iterable[Request]) -> tuple[tuple[Request, ...], ...]:
    """Return the groups of requests that hang together by names they share, of two or more each, in their order.

    Names are concepts and synonyms, and the same whatever their case and with or without an article.
    """
    requests = tuple(requests)
    above: dict[str, str] = {}

    def top(key: str) -> str:
        while above.setdefault(key, key) != key:
            above[key] = above[above[key]]
            key = above[key]
        return key

    for request in requests:
        for name in request.synonyms:
            above[top(name_key(name))] = top(name_key(request.concept))
    groups: dict[str, list[Request]] = {}
    for request in requests:
        groups.setdefault(top(name_key(request.concept)), []).append(request)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def warn_of_overlaps(requests: Iterable[Request], where: Callable[[Request], str], new: Collection[str] | None = None) -> None:
    """Warn of `overlaps`; arguments as there."""
    for sentence in listed(overlaps(requests, where, new)):
        warnings.warn(sentence, stacklevel=3)


def overlaps(requests: Iterable[Request], where: Callable[[Request], str], new: Collection[str] | None = None) -> list[str]:
    """Return a sentence for each group of `overlapping` requests, those refused and withdrawn aside.

    Args:
        requests: All that there are.
        where: Returns the place of one: `file:line`.
        new: Ids; only of groups in which these meet others, as of those within a list its reader has warned.
    """
    live = [request for request in requests if request.status not in ("refused", "withdrawn")]
    sentences: list[str] = []
    for group in overlapping(live):
        if new is None or len({request.id in new for request in group}) == 2:
            times = Counter(key for request in group for key in set(map(name_key, request.names)))
            shared = ", ".join(repr(key) for key, number in times.items() if number > 1)
            places = ", ".join(f"{request.id} ({where(request)})" for request in group)
            sentences.append(f"{shortened(places)} share names: {shortened(shared)}. Are they one request, or namesakes?")
    return sentences


def write_requests(requests: Iterable[Request], file: str | Path) -> None:
    """Write a list of requests, over one that is there; `read_requests` reads the same from it.

    Args:
        requests: In the order of the rows.
        file: `.csv` or `.jsonl`.

    Raises:
        EsdLoraError: If it has another name, another run writes there, or the system does not let it.
    """
    file = Path(file)
    _check_name(file)
    rows = (request.record() for request in requests)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = "".join(lines) if file.suffix.lower() == ".jsonl" else _as_table(list(rows))
    with lock_output(file):
        write_atomically(file, text.encode())


def _as_table(rows: list[dict[str, Any]]) -> str:
    """Return rows as CSV."""
    settings = sorted({name for row in rows for name in row} - set(COLUMNS))
    output = io.StringIO(newline="")
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([*COLUMNS, *settings])
    for row in rows:
        own = (_as_cell(row.get(name, "")) for name in COLUMNS)
        cells = [*own, *(_as_yaml(row[name]) if name in row else "" for name in settings)]
        writer.writerow([f"'{cell}" if _FORMULA.match(cell) else cell for cell in cells])
    return output.getvalue()


def _as_cell(value: str | bool | list[str]) -> str:
    if isinstance(value, list):
        return SEPARATOR.join(value)
    return str(value).lower() if isinstance(value, bool) else value


def _as_yaml(value: object) -> str:
    """Return a value as one line of YAML, with anything odd as an escape."""
    return yaml.safe_dump(value, default_flow_style=True, width=2**30).removesuffix("...\n").strip()
