"""Requests as the page shows and takes them: the table, rows of a file or a form, command lines, the page of a fleet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from esd_lora.errors import EsdLoraError
from esd_lora.files import read_bounded
from esd_lora.fleet.registry import LOG, Registry
from esd_lora.fleet.request import Request
from esd_lora.fleet.requests import make_request, overlaps, read_requests
from esd_lora.pictures import data_uri, open_picture
from esd_lora.ui.markup import Cell, table
from esd_lora.wording import in_one_line

Work: TypeAlias = Literal["fleet", "release"]
"""What is made of a registry: an eraser for each request, or a model without all of them as well."""
HEAD = ("id", "erases", "kind", "state", "due", "basis", "reference")
PAGES = ("fleet.html", "fleet/fleet.html")
"""Where a fleet and a release have their page."""
_ORDER = ("ambiguous", "open", "done", "refused", "withdrawn")
_MOST_ROWS = 500  # of a table that anyone reads
_LARGEST_PAGE = 2**24  # bytes of a fleet's page that is shown in a frame: 30,000 requests
_MOST_PICTURES = 100  # of a fleet's page that is shown in a frame
_SIDE = 96  # pixels of each


class Added(NamedTuple):
    """What became of requests that were to be added."""

    new: tuple[Request, ...]
    there: int
    """How many were in the registry already."""
    overlaps: list[str]
    """Sentences about names that new requests share with others."""

    def sentence(self) -> str:
        """Return it in a line, overlaps aside."""
        already = f"; {self.there} there already" if self.there else ""
        return f"{len(self.new)} added{already}: {', '.join(request.id for request in self.new[:20]) or 'nothing new'}."


def has_registry(folder: Path) -> bool:
    """Return whether a folder has a registry."""
    return (folder / LOG).is_file()


def show_requests(requests: Iterable[Request], today: date) -> str:
    """Return requests as a table in HTML: what is overdue, what is to be decided, what is to be erased, each soonest due first.

    Args:
        requests: As they stand.
        today: Before which a day that has passed is overdue.
    """
    everyone = in_order(requests, today)
    rows = [_row(request, today) for request in everyone[:_MOST_ROWS]]
    more = f", the first {_MOST_ROWS} of {len(everyone):,}" if len(everyone) > _MOST_ROWS else ""
    late = sum(is_overdue(request, today) for request in everyone)
    return table(f"Requests{more}: {late or 'none'} overdue", HEAD, rows)


def in_order(requests: Iterable[Request], today: date) -> list[Request]:
    """Return requests in the order in which somebody has to look at them."""

    def urgency(request: Request) -> tuple[bool, int, date, str]:
        late = is_overdue(request, today)
        return not late, 0 if late else _ORDER.index(request.status), request.due or date.max, request.id

    return sorted(requests, key=urgency)


def is_overdue(request: Request, today: date) -> bool:
    """Return whether a request is not met though its day has passed."""
    return request.due is not None and request.due < today and request.status in ("open", "ambiguous")


def _row(request: Request, today: date) -> list[str | Cell]:
    late = is_overdue(request, today)
    due = Cell(f"{request.due}{', overdue' if late else ''}" if request.due else "", "bad" if late else "")
    marks = {"done": "good", "ambiguous": "bad", "withdrawn": "soft", "refused": "soft"}
    state = Cell(request.status, marks.get(request.status, ""))
    return [request.id, ", ".join(request.names), request.kind, state, due, request.basis or "", request.reference]


def add_file(registry: Registry, file: Path, name: str) -> Added:
    """Add the requests of a file that was uploaded; all or none.

    Args:
        registry: To which.
        file: Where it lies now.
        name: What whoever uploaded it calls it, for messages.

    Raises:
        EsdLoraError: With every fault at once, each with its line.
    """
    try:
        return _add(registry, read_requests(file), file)
    except EsdLoraError as error:
        raise EsdLoraError(str(error).replace(str(file), in_one_line(name))) from error


def add_form(registry: Registry, fields: Mapping[str, Any]) -> Added:
    """Add the request of a filled form.

    Args:
        registry: To which.
        fields: Column to value; what is empty is not given.

    Raises:
        EsdLoraError: With every fault at once.
    """
    return _add(registry, [make_request(fields)], None)


def _add(registry: Registry, requests: Sequence[Request], file: Path | None) -> Added:
    new = registry.add(requests, file)
    everyone = registry.requests()
    sentences = overlaps(everyone, lambda request: f"{request.kind}, {request.status}", {request.id for request in new})
    return Added(new, len(requests) - len(new), sentences)


def fleet_command(
    work: Work,
    registry: Path,
    base: str,
    out: Path,
    *,
    workers: int = 1,
    pictures: int | None = None,
    gate: str = "",
) -> list[str]:
    """Return the arguments of `esd-lora` that erase what a registry asks for.

    Args:
        work: What to make.
        registry: Folder of the registry.
        base: What to erase from.
        out: Folder; one that was worked in before is gone on with.
        workers: Number of processes.
        pictures: Most pictures of each prompt set that measures.
        gate: Release nothing if so: `erased.accuracy>0.05`; for a release alone.

    Raises:
        EsdLoraError: If there is no registry or no base.
    """
    if not has_registry(registry):
        raise EsdLoraError(f"there is no registry in {registry}: it has no {LOG}. Add requests to it first.")
    if not base:
        raise EsdLoraError("nothing to erase from: choose a base.")
    options = [f"--pictures={pictures}"] if pictures else []
    options += [f"--gate={gate}"] if gate and work == "release" else []
    return [work, str(registry), f"--base={base}", f"--workers={workers}", *options, f"--out={out}"]


def page_file(folder: Path) -> Path | None:
    """Return the page of a fleet or a release that writes into a folder; `None` where there is none yet."""
    return next((folder / name for name in PAGES if (folder / name).is_file()), None)


def fleet_page(file: Path) -> str:
    """Return the page of a fleet with its pictures inside, to be shown in a frame.

    Raises:
        EsdLoraError: If it is too large for a frame.
    """
    document = read_bounded(file, _LARGEST_PAGE).decode("utf-8", "replace")
    left = _MOST_PICTURES

    def embedded(place: re.Match[str]) -> str:
        nonlocal left
        left -= 1
        try:
            return f'src="{data_uri(open_picture(file.parent / place[1], ("PNG",)), _SIDE)}"' if left >= 0 else 'src=""'
        except (EsdLoraError, OSError):  # a picture less is no reason to show nothing
            return 'src=""'

    return re.sub(r'src="(erasers/[A-Za-z0-9][\w.-]*/samples/1_(?:base|erased)\.png)"', embedded, document, flags=re.ASCII)
