"""Where a request stands: `status.json` beside its eraser, written whole or not at all, by the driver alone."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.faults import first_fault
from esd_lora.files import read_bounded, write_atomically

ERASERS, LOGS = "erasers", "logs"
"""Folders of a fleet: one for each request in the first, a log of each in the second."""
STATUS_NAME = "status.json"
_LARGEST = 2**20  # bytes

State = Literal["queued", "running", "done", "failed", "refused"]


class Status(BaseModel):
    """Where one request stands."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: str
    key: str
    """Key of the job (`jobs.Job`): base, recipe, suite, version."""
    state: State
    """`refused` is what a person has to mend, `failed` what broke as often as it was tried."""
    attempts: int = 0
    """How often a worker has taken it on."""
    reason: str = ""
    """Why it failed or was refused, in one sentence."""
    figures: dict[str, float] = {}
    """What was measured: see `working.figures_of`."""
    worst: str = ""
    """Which neighbours lost most, in a line."""
    recipe: str = ""
    """The recipe that made the eraser: the first, or the second where the first was not enough."""
    seconds: float = 0.0
    """How long the worker took."""
    ended: str = ""
    """ISO 8601, UTC."""

    def with_state(self, state: State, **fields: object) -> Status:
        """Return it in another state, as of now."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return self.model_copy(update={"state": state, "ended": "" if state in ("queued", "running") else now, **fields})


def folder_of(out: Path, request: str) -> Path:
    """Return the folder of a request's eraser."""
    return out / ERASERS / request


def read_status(out: Path, request: str) -> Status | None:
    """Return where a request stands; `None` if nothing was begun, or a done one has lost its eraser.

    Raises:
        EsdLoraError: If its file is damaged.
    """
    folder = folder_of(out, request)
    file = folder / STATUS_NAME
    try:
        status = Status.model_validate_json(read_bounded(file, _LARGEST))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise EsdLoraError(
            f"{file} is damaged ({first_fault(error)}). Remove it, and the request is worked on anew."
        ) from error
    except OSError as error:
        raise EsdLoraError(f"{file} cannot be read ({error.strerror or error}). Remove it to begin anew.") from error
    return None if status.state == "done" and not (folder / WEIGHTS_NAME).is_file() else status


def write_status(out: Path, status: Status) -> None:
    """Write where a request stands."""
    folder = folder_of(out, status.id)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STATUS_NAME, f"{status.model_dump_json(indent=1)}\n".encode())
