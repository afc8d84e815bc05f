"""The page of a fleet: where every request stands, what was measured, and pictures before and after."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from esd_lora.files import write_atomically
from esd_lora.fleet.request import Request
from esd_lora.fleet.status import ERASERS, Status, folder_of
from esd_lora.wording import mask_of, printable_value

_SELDOM = 200
"""A page is written again after so many times what writing it took: half a percent of the time."""
_SOONEST = 5.0  # seconds


class Page:
    """A page that is written again while a fleet runs.

    Args:
        file: Where it stands, in the fleet's folder.
        requests: Of whom it tells.
        statuses: Where they stand, by id; whoever runs the fleet changes it.
    """

    def __init__(self, file: Path, requests: Sequence[Request], statuses: Mapping[str, Status]):
        self.file, self.out, self.statuses = file, file.parent, statuses
        self.requests = [request for request in requests if request.id in statuses]
        self._begun, self._next = time.monotonic(), 0.0
        self.late = 0
        """Requests that were overdue when the page was written last."""
        self._done_before = sum(status.state == "done" for status in statuses.values())

    def write_now_and_then(self) -> None:
        """Write the page, unless it was written a moment ago."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write the page."""
        started = time.monotonic()
        self.late = len(self.overdue())
        write_atomically(self.file, self._render().encode("utf-8", "backslashreplace"))
        ended = time.monotonic()
        self._next = ended + max(_SOONEST, _SELDOM * (ended - started))

    def _render(self) -> str:
        now = datetime.datetime.now(datetime.UTC)
        states = Counter(status.state for status in self.statuses.values())
        waiting, ended = states["queued"] + states["running"], states["done"] - self._done_before
        hours = (time.monotonic() - self._begun) / 3600
        template = Environment(autoescape=True, finalize=printable_value).from_string(
            Path(__file__).with_name("page.html").read_text("utf-8")
        )
        return template.render(
            written=now.isoformat(" ", "minutes").removesuffix("+00:00"),
            states={state: states[state] for state in ("done", "running", "queued", "failed", "refused")},
            overdue=self.overdue(),
            pace=f"{ended / hours:,.0f} an hour" if ended and hours else "",
            left=_duration(hours * waiting / ended) if ended and waiting else "",
            kinds=self._kinds(),
            rows=[self._row(request) for request in self.requests],
        )

    def overdue(self) -> set[str]:
        """Return the ids of requests that were due before today and are not done."""
        today = datetime.datetime.now(datetime.UTC).date()
        late = (request for request in self.requests if request.due is not None and request.due < today)
        return {request.id for request in late if self.statuses[request.id].state != "done"}

    def _kinds(self) -> list[dict[str, Any]]:
        """Return what was erased and kept, for each kind of request."""
        kinds: list[dict[str, Any]] = []
        for kind in dict.fromkeys(request.kind for request in self.requests):
            own = [self.statuses[request.id] for request in self.requests if request.kind == kind]
            done = [status for status in own if status.state == "done"]
            row: dict[str, Any] = {"kind": kind, "requests": len(own), "done": len(done)}
            for figure, worst in (("left", max), ("kept", min)):
                values = [status.figures[figure] for status in done if figure in status.figures]
                row[figure] = f"{sum(values) / len(values):.1%} ({worst(values):.1%})" if values else ""
            kinds.append(row)
        return kinds

    def _row(self, request: Request) -> dict[str, Any]:
        status, folder = self.statuses[request.id], folder_of(self.out, request.id)
        place = f"{ERASERS}/{request.id}"
        done = status.state == "done"
        shown = done and request.kind != "unsafe" and (folder / "samples" / "1_erased.png").is_file()
        words = mask_of(request.names) if request.private else str
        figures = {name: f"{status.figures[name]:.1%}" for name in ("left", "kept") if name in status.figures}
        return {
            "id": request.id,
            "concept": "" if request.private else request.concept,
            "kind": request.kind,
            "due": request.due or "",
            "status": status,
            "remarks": words(" ".join(filter(None, (status.reason, status.worst)))),
            "figures": figures,
            "card": f"{place}/README.md" if done else "",
            "report": f"{place}/evaluation/report.html" if done and figures else "",
            "pictures": [f"{place}/samples/1_{name}.png" for name in ("base", "erased")] if shown else [],
        }


def _duration(hours: float) -> str:
    """Return hours in words: `about 3 h 20 min`."""
    minutes = round(60 * hours)
    return f"about {minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"about {max(1, minutes)} min"
