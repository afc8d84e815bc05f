"""The notebooks of the documentation: run, and kept with what they print.

make notebooks    # runs them all and keeps their outputs
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
VARIES = "varies"
"""Tag of a cell whose text is not the same on every machine; its pictures and figures are looked at, not compared."""
_PATIENCE = 600  # seconds for a cell


def notebooks() -> list[Path]:
    """Return the notebooks in the order of their names."""
    return sorted(FOLDER.glob("*.ipynb"))


def read(file: Path) -> Any:
    """Return a notebook as it is kept."""
    return nbformat.read(file, as_version=4)


def run(file: Path, folder: Path) -> Any:
    """Return a notebook with what it prints when it is run from the top.

    Args:
        file: The notebook.
        folder: The working directory of its kernel, where it writes.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = read(file)
    client = NotebookClient(
        notebook,
        timeout=_PATIENCE,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        store_widget_state=False,
    )
    return client.execute()


def texts(notebook: Any) -> list[list[str]]:
    """Return what every code cell printed, line by line; nothing of those that are tagged with `VARIES`."""
    printed: list[list[str]] = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept = [] if VARIES in cell.metadata.get("tags", ()) else cell.outputs
        parts = [output.text for output in kept if output.output_type == "stream" and output.name == "stdout"]
        parts += [output.data.get("text/plain", "") for output in kept if "data" in output and "image/png" not in output.data]
        printed.append("\n".join(parts).splitlines())
    return printed


def without_traces(notebook: Any) -> Any:
    """Return a notebook without what differs from run to run and says nothing: times, ids, the kernel's version."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    language = {"name": "python"}
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": language,
    }
    return notebook


def main() -> None:
    """Run every notebook, and keep it with its outputs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for file in notebooks():
        with tempfile.TemporaryDirectory() as folder:
            notebook = without_traces(run(file, Path(folder)))
        text = nbformat.writes(notebook)
        assert not re.search(re.escape(str(Path.home())) + "/|/tmp/", text), f"{file.name} names a place on this machine"
        file.write_text(f"{text}\n", "utf-8")


if __name__ == "__main__":
    main()
