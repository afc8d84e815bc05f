"""What the tabs of the page share: a folder of erasers, loaded bases, jobs, and how a fault is told."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import tempfile
import threading
import traceback
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from esd_lora.built_in import BUILT_IN
from esd_lora.errors import EsdLoraError, how_to_install
from esd_lora.ui.jobs import Jobs

if TYPE_CHECKING:
    from esd_lora.bases.base import Base

_Handler = TypeVar("_Handler", bound=Callable[..., Any])
_MOST_BASES = 2  # that are held in memory
_DEEPEST = 3  # folders below the workplace in which erasers are looked for
_MOST_FOLDERS = 2000  # that are looked into
MODEL_WORK: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""For events that paint or estimate: they wait in one line, and the page says so. `button.click(..., **MODEL_WORK)`"""


class Workplace:
    """A folder in which erasers are made and found, the bases in memory, and the jobs.

    Args:
        folder: Where erasers are made and found.
        base: Name, path or Hub id of the base that every tab begins with.
        erasers: Paths or Hub ids. Where some are given the page is for showing: it offers these on this base, and nothing else.
    """

    def __init__(self, folder: str | Path = ".", base: str = BUILT_IN[0], erasers: Sequence[str] = ()):
        self.folder, self.base, self.shown = Path(folder).resolve(), base, tuple(erasers)
        if not self.folder.is_dir():
            raise EsdLoraError(f"{folder} is no directory to keep erasers in. Make it, or give another with --dir.")
        self.jobs = Jobs(self.folder)
        self._bases: OrderedDict[str, Base] = OrderedDict()
        self._lock = threading.RLock()
        self._downloads = Path(tempfile.mkdtemp(prefix="esd-lora-"))
        weakref.finalize(self, shutil.rmtree, self._downloads, ignore_errors=True)

    @property
    def open(self) -> bool:
        """Whether whoever uses the page may name other bases and erasers."""
        return not self.shown

    def erasers(self) -> list[str]:
        """Return the erasers in the folder: directories with one, manifests of stacks, safetensors files with our header.

        Returns:
            Paths relative to the folder, as the commands of a job take them, sorted.
        """
        from esd_lora.erasers.eraser import ERASER_FILES

        if self.shown:
            return list(self.shown)
        names: list[str] = []
        for number, (place, folders, files) in enumerate(os.walk(self.folder)):
            path = Path(place).relative_to(self.folder)
            folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
            if number > _MOST_FOLDERS or len(path.parts) >= _DEEPEST:
                folders.clear()
            if path.parts and not {*files}.isdisjoint(ERASER_FILES):
                names.append(path.as_posix())
                folders.clear()
            else:
                names += [(path / name).as_posix() for name in files if _holds_eraser(Path(place) / name)]
        return sorted(names)

    def place(self, name: str) -> str:
        """Return where an eraser or a base lies: what stands in the folder by its path there, all else as it is.

        Raises:
            EsdLoraError: If there is no name, or the page is for showing and does not offer it.
        """
        name = name.strip()
        if not name:
            raise EsdLoraError("no eraser or base is named. Choose one.")
        if self.shown and name not in (*self.shown, self.base):
            raise EsdLoraError(f"{name!r} is not among what this page shows: {', '.join((self.base, *self.shown))}.")
        return str(self.folder / name) if name not in BUILT_IN and (self.folder / name).exists() else name

    def new_output(self, name: str) -> str:
        """Return the name of something to be made in the folder, once it is seen to be free.

        Raises:
            EsdLoraError: If it would lie elsewhere, or there is something already.
        """
        name = name.strip().rstrip("/")
        path = (self.folder / name).resolve()
        if not name or not path.is_relative_to(self.folder) or path == self.folder or name.startswith((".", "-")):
            raise EsdLoraError(f"{name!r} is no name for a folder in {self.folder}. Give one such as no-cat.")
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise EsdLoraError(f"{name} is there already. Choose another name.")
        return name

    @contextmanager
    def base_in_use(self, name: str) -> Generator[Base]:
        """Have a base for one's own for the length of a `with` block, loaded if need be: nobody else's erasers are on it.

        Warnings inside the block are shown on the page.

        Raises:
            EsdLoraError: If it cannot be loaded.
        """
        import gradio

        with self._lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield self._load(self.place(name))
        for message in dict.fromkeys(str(each.message) for each in caught if each.category is UserWarning):
            gradio.Warning(message)

    def download(self, name: str, content: bytes) -> str:
        """Return the path of a file to be downloaded; it lies outside the folder, and goes when the server ends.

        Args:
            name: Under which it is downloaded.
            content: What is in it.
        """
        folder = self._downloads / hashlib.sha256(content).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return str(folder / name)

    def _load(self, place: str) -> Base:
        if place not in self._bases:
            from esd_lora.bases.loading import load_base

            while len(self._bases) >= _MOST_BASES:
                self._bases.popitem(last=False)
            self._bases[place] = load_base(place)
        self._bases.move_to_end(place)
        return self._bases[place]


def _holds_eraser(file: Path) -> bool:
    """Return whether a file is an eraser of ours or the manifest of a stack, by its first lines alone."""
    from esd_lora.erasers.header import HEADER_KEY
    from esd_lora.erasers.tensor_files import read_header

    try:
        if file.suffix == ".safetensors":
            return HEADER_KEY in read_header(file).metadata
        if file.suffix in (".yaml", ".yml"):
            with file.open("rb") as opened:
                return re.search(rb"^stack:", opened.read(4096), re.MULTILINE) is not None
    except (EsdLoraError, OSError):
        pass
    return False


def in_one_sentence(handler: _Handler) -> _Handler:
    """Have a handler of the page tell a fault in one sentence on the page, and never a traceback.

    What a user can mend is told as it is; of a bug the page says so, and the terminal of the server has its traceback.
    """
    import gradio

    @contextmanager
    def telling() -> Generator[None]:
        try:
            yield
        except EsdLoraError as error:
            raise gradio.Error(
                _sentence(str(error)), duration=None, title="This cannot be done", print_exception=False
            ) from None
        except gradio.Error:
            raise
        except Exception as error:
            traceback.print_exc()
            sentence = f"something broke inside the program ({type(error).__name__}). The terminal of the server says more."
            raise gradio.Error(_sentence(sentence), duration=None, title="Error", print_exception=False) from None

    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        def run(*args: Any, **kwargs: Any) -> Any:
            with telling():
                yield from handler(*args, **kwargs)
    else:

        @wraps(handler)
        def run(*args: Any, **kwargs: Any) -> Any:
            with telling():
                return handler(*args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


def _sentence(text: str) -> str:
    """Return a message as a sentence of a page, which shows it as HTML."""
    import html

    return html.escape(text[:1].upper() + text[1:])


def require_gradio() -> None:
    """Refuse to go on without gradio.

    Raises:
        EsdLoraError: With the extra that brings it.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise EsdLoraError(f"the page needs gradio, which is not installed: {how_to_install('ui')}.") from error
