"""Predictions of a frozen base on disk: what one training walked, the next one on the same trajectories need not walk again.

A teacher's prediction depends on the base, on `x_t`, `t` and the text, and on nothing that a training chooses: neither eta nor
rank, scope or rate. An entry's key is the SHA-256 of all of them, so what is stale is never found; a checksum finds what is
damaged, which is then made again. Entries lie in one SQLite file, which several processes may share; when they take more than
they may, those that were not used for longest leave.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from esd_lora.errors import EsdLoraError
from esd_lora.ranks import from_main, is_main

FILE_NAME = "predictions.sqlite"
MOST_BYTES = 16 * 2**30
"""Bytes that entries may take, unless another number is given: some dozens of trainings on SD 1.5."""
_PATIENCE = 30.0  # seconds that another process may hold the file
_TABLES = """
PRAGMA synchronous = OFF;
CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, used REAL NOT NULL, size INTEGER NOT NULL, checksum BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS contents (key BLOB PRIMARY KEY, content BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS by_use ON entries (used);
"""
_Result = TypeVar("_Result")


class PredictionCache:
    """A folder of predictions.

    Args:
        folder: Made if it is not there.
        most: Bytes that entries may take.

    Raises:
        EsdLoraError: If the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, most: int = MOST_BYTES):
        self.file, self.most = Path(folder) / FILE_NAME, most
        self.hits = self.misses = 0
        """Predictions that were found, and that had to be made."""
        self._aside = False
        if not is_main():
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with suppress(_DamagedError), self._opened():
                pass
        except (OSError, sqlite3.Error) as error:
            raise EsdLoraError(f"the teacher's cache {folder} cannot be used ({error}). Choose another folder.") from error

    def find(self, key: bytes, make: Callable[[], Tensor]) -> Tensor:
        """Return the prediction of a key, made and remembered unless it is there; it comes on the CPU if it was there.

        Args:
            key: From `prediction_key`.
            make: Makes it.
        """
        # All ranks make the prediction, or none.
        content = from_main(lambda: self._in_database(lambda database: self._read(database, key)))
        if content is not None:
            self.hits += 1
            return load(content)["prediction"]
        self.misses += 1
        prediction = make()
        written = save({"prediction": prediction.detach().cpu().contiguous()})
        if is_main() and len(written) <= self.most:
            self._in_database(lambda database: self._write(database, key, written))
        return prediction

    def _read(self, database: sqlite3.Connection, key: bytes) -> bytes | None:
        row = database.execute(
            "SELECT content, checksum FROM entries JOIN contents USING (key) WHERE key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        if hashlib.sha256(row[0]).digest() != row[1]:
            self._forget(database, [key])
            return None
        database.execute("UPDATE entries SET used = ? WHERE key = ?", (time.time(), key))
        return row[0]

    def _write(self, database: sqlite3.Connection, key: bytes, content: bytes) -> None:
        taken: int = database.execute("SELECT COALESCE(SUM(size), 0) FROM entries").fetchone()[0]
        oldest = database.execute("SELECT key, size FROM entries ORDER BY used")
        leaving: list[bytes] = []
        while taken + len(content) > self.most and (row := oldest.fetchone()):
            leaving.append(row[0])
            taken -= row[1]
        self._forget(database, leaving)
        entry = (key, time.time(), len(content), hashlib.sha256(content).digest())
        database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", entry)
        database.execute("INSERT OR REPLACE INTO contents VALUES (?, ?)", (key, content))

    @staticmethod
    def _forget(database: sqlite3.Connection, keys: Iterable[bytes]) -> None:
        for key in keys:
            database.execute("DELETE FROM entries WHERE key = ?", (key,))
            database.execute("DELETE FROM contents WHERE key = ?", (key,))

    def _in_database(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result | None:
        """Return what some work in the database returns, all of it or nothing; nothing where the file cannot be worked with.

        A damaged one is begun anew. On a full disk, or where another process does not let go of the file, the run goes on
        without it, and says so once.
        """
        if self._aside:
            return None
        try:
            with self._opened() as database:
                return work(database)
        except _DamagedError:
            return None
        except sqlite3.Error as error:
            self._aside = True
            warnings.warn(f"the teacher's cache {self.file} is left aside: {error}.", stacklevel=2)
            return None

    @contextmanager
    def _opened(self) -> Generator[sqlite3.Connection]:
        """Open the database for a transaction, and remove it if it turns out to be none, or damaged."""
        try:
            with closing(sqlite3.connect(self.file, timeout=_PATIENCE)) as database, database:
                database.executescript(_TABLES)
                yield database
        except sqlite3.OperationalError:  # locked, full, not to be written to
            raise
        except sqlite3.DatabaseError as error:
            warnings.warn(f"the teacher's cache {self.file} is damaged, and begun anew.", stacklevel=2)
            self.file.unlink(missing_ok=True)
            raise _DamagedError from error


class _DamagedError(Exception):
    """The file was damaged, and is gone."""


def network_key(weights: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of a network: its configuration, its weights by name, dtype and bytes, and what computes them.

    Args:
        weights: Name and value of each.
        config: What else its class goes by: two of other numbers of heads have weights of the same shapes.
    """
    settings = {name: value for name, value in config.items() if not name.startswith("_")}  # paths and versions of files
    computed_by = [f"{package} {version(package)}" for package in ("torch", "diffusers")]
    digest = hashlib.sha256(f"{computed_by} {sorted(settings.items())}".encode())
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(_bytes_of(weight))
    return digest.digest()


def prediction_key(network: bytes, inputs: Mapping[str, Tensor]) -> bytes:
    """Return the SHA-256 of all that a prediction depends on.

    Args:
        network: From `network_key`.
        inputs: Name to tensor.
    """
    digest = hashlib.sha256(network)
    for name in sorted(inputs):
        value = inputs[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {value.device.type}".encode())
        digest.update(_bytes_of(value))
    return digest.digest()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
