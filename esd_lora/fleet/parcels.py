"""Results as bytes, for workers whose machine does not see the fleet's folder."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from esd_lora.fleet.status import STATUS_NAME, folder_of


def pack(folder: Path) -> bytes:
    """Return all files under a folder as a tar archive, and empty the folder."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for entry in sorted(folder.iterdir()):
            archive.add(entry, entry.name)
            shutil.rmtree(entry)
    return content.getvalue()


def unpack(content: bytes, out: Path, request: str) -> None:
    """Put what a worker made in a folder of its own into the fleet's, in the place of what an earlier attempt left there.

    Args:
        content: From `pack`, of a worker's folder.
        out: The fleet's folder.
        request: Whose result it is.
    """
    with TemporaryDirectory(dir=out, prefix=".") as place:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(place, filter="data")
        earlier = folder_of(out, request)
        for old in earlier.iterdir() if earlier.is_dir() else ():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != STATUS_NAME:
                old.unlink()
        for file in sorted(path for path in Path(place).rglob("*") if path.is_file()):
            goal = out / file.relative_to(place)
            goal.parent.mkdir(parents=True, exist_ok=True)
            file.replace(goal)
