"""Opening erasers as people have them: our own, stacks, and LoRA files of other programs, converted in memory."""

from __future__ import annotations

import logging
from pathlib import Path

from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.erasers.fetching import locate
from esd_lora.erasers.header import HEADER_KEY
from esd_lora.erasers.manifests import load_eraser
from esd_lora.erasers.tensor_files import read_header
from esd_lora.formats.exporting import PEFT_FILES
from esd_lora.formats.importing import import_lora

_LOG = logging.getLogger(__name__)


def open_eraser(path: str | Path | Eraser, family: str | None = None) -> Eraser:
    """Return an eraser: one that is loaded, or what `manifests.load_eraser` loads, or a LoRA file of another program.

    The latter is what `importing.import_lora` reads: kohya's layout, as `exporting.export` writes it, peft's, Concept Sliders'
    and others. It stands for its update alone where no header of ours is in it. Members of manifests, which name files by their
    hash, are erasers of ours.

    Args:
        path: Directory, file, manifest or Hub id.
        family: Family of the base that it is for, where one is at hand: it decides where layers' names fit several.

    Raises:
        EsdLoraError: As `load_eraser` or `import_lora` does.
    """
    if isinstance(path, Eraser):
        return path
    place = locate(path)
    if not is_foreign(place):
        return load_eraser(place)
    known = _has_header(_weights(place))
    eraser = import_lora(place, family=None if known else family)
    layout = eraser.header.origins[0].layout if eraser.header.origins else "another"
    what = "an eraser in the layout of another program" if known else f"a LoRA in {layout}'s names, of which nothing is known"
    _LOG.info("%s is %s: converted in memory, %d layers of family %s", path, what, len(eraser.pairs), eraser.header.family)
    return eraser


def is_foreign(path: Path) -> bool:
    """Return whether something is a LoRA in a layout of other programs, and so not what `load_eraser` loads."""
    if (path / PEFT_FILES[1]).is_file():
        return True
    file = _weights(path)
    if not file.is_file() or file.suffix.lower() in (".yaml", ".yml"):
        return False
    if file.suffix.lower() != ".safetensors":
        return True
    metadata = read_header(file).metadata
    return HEADER_KEY not in metadata or "ss_network_module" in metadata  # kohya's, our own export's too


def _weights(path: Path) -> Path:
    """Return the file of weights of a directory, or the path itself."""
    names = (name for name in (WEIGHTS_NAME, PEFT_FILES[0]) if (path / name).is_file())
    return path / next(names, "")


def _has_header(file: Path) -> bool:
    return file.suffix.lower() == ".safetensors" and HEADER_KEY in read_header(file).metadata
