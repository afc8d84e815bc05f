"""What a command prints and where: lines for people, one JSON object for programs, faults as one sentence.

`say` is the one way to print a line. With `--json` the result alone stands on standard output, and what libraries print goes to
standard error; with `--quiet` nothing is printed but what failed.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from esd_lora.errors import EsdLoraError
from esd_lora.ranks import count, is_main, rank
from esd_lora.wording import printable

if TYPE_CHECKING:
    from esd_lora.cli.results import Estimated
    from esd_lora.estimates.estimate import Estimate

_META = "esd_lora.output"  # under which the context of a command, and those above it, hold its `Output`
_REFUSED = {
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EISDIR, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EIO),
}
"""What a system refuses because of the path, the disk or a limit, not because of a bug."""


class Output(NamedTuple):
    """What a command is to print."""

    quiet: bool = False
    """Nothing but errors, and no bars."""
    verbose: bool = False
    """What is loaded, and how long it took, too; of an error, what led to it."""
    as_json: bool = False
    """The result as one JSON object on standard output, in the place of lines for people."""

    @classmethod
    def current(cls) -> Output:
        """Return that of the command that runs."""
        context = click.get_current_context(silent=True)
        return context.meta.get(_META, cls()) if context else cls()

    def choose(self, context: click.Context) -> None:
        """Have the command of a context, and whatever is called by it, print so."""
        context.meta[_META] = self


def say(*lines: str, err: bool = False, colour: str | None = None) -> None:
    """Print lines of text: what a terminal would obey is shown instead, and so is a line break within a line.

    Of several ranks the main one prints.

    Args:
        lines: Each on its own; names, prompts and headers of strangers may be part of them.
        err: Whether to print on standard error: what is no part of the result, which `--json` prints in another form.
        colour: Name of a colour on a terminal, unless NO_COLOR is set (no-color.org).
    """
    output = Output.current()
    if is_main() and not output.quiet and (err or not output.as_json):
        _echo(lines, err, None if os.environ.get("NO_COLOR") else colour)


def _echo(lines: Sequence[str], err: bool, colour: str | None = None) -> None:
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    bars = sys.modules.get("esd_lora.bars")  # no bar is shown before that is imported
    with bars.lines_between_bars() if bars else nullcontext():
        for line in lines:
            text = printable(line).encode(encoding, "backslashreplace").decode(encoding)
            click.echo(click.style(text, fg=colour) if colour else text, err=err)


def estimated(estimate: Estimate, out: Path, written: str) -> Estimated:
    """Print an estimate, and what would be written, and return it."""
    lines = [*estimate.lines(), written]
    say(*lines)
    return {"out": str(out), "seconds": list(estimate.seconds()), "memory": estimate.memory, "lines": lines}


def print_json(result: Mapping[str, Any]) -> None:
    """Print a result as one JSON object; numbers that JSON does not have are null."""
    _echo(json.dumps(_finite(result), indent=2).split("\n"), err=False)


def _finite(value: Any) -> Any:
    """Return a value as JSON takes it."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def printing(output: Output) -> Generator[None]:
    """Print as `output` says for the length of a `with` block, also what libraries print and log, and their bars."""
    log, started = logging.getLogger("esd_lora"), time.monotonic()
    handler, level = _Lines(), log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if output.verbose else logging.INFO)
    try:
        with ExitStack() as streams:
            if output.quiet:
                streams.enter_context(redirect_stderr(_Nowhere()))
            if output.quiet or output.as_json:
                streams.enter_context(redirect_stdout(sys.stderr))
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        if output.verbose:
            say(f"took {time.monotonic() - started:.1f} s{_peak()}", err=True)


class _Nowhere(io.TextIOBase):
    """Takes text and keeps nothing of it."""

    def write(self, text: str) -> int:
        return len(text)


class _Lines(logging.Handler):
    """Prints what the package logs as lines on standard error, each once: a file may be opened several times."""

    def __init__(self) -> None:
        super().__init__()
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = ("" if record.levelno == logging.INFO else f"{record.levelname.lower()}: ") + record.getMessage()
        if line not in self._printed:
            say(line, err=True)
        self._printed.add(line)


def _peak() -> str:
    """Return the most memory that the process has held so far, where the system tells."""
    if sys.platform == "win32":
        return ""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f", {(most if sys.platform == 'darwin' else most * 1024) / 2**20:,.0f} MiB of memory at most"


@contextmanager
def reporting_faults() -> Generator[None]:
    """Turn the faults a user can cause inside a `with` block into one sentence and exit code 1; a bug keeps its traceback."""
    try:
        yield
    except EsdLoraError as error:
        _fail(str(error), error)
    except KeyboardInterrupt as error:
        _fail("interrupted. Nothing half-written was left; the same command begins again.", error)
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        _fail(_usage_fault(error), error)
    except (OSError, MemoryError, RuntimeError, ImportError, UnicodeEncodeError) as error:
        sentence = _outer_fault(error)
        if sentence is None:
            raise
        _fail(sentence, error)


@contextmanager
def going_on_in(out: Path) -> Generator[None]:
    """Make a sentence of Ctrl-C inside a `with` block whose work is gone on with by the same command."""
    try:
        yield
    except KeyboardInterrupt:
        raise EsdLoraError(f"interrupted; the same command goes on in {out}.") from None


def _fail(message: str, error: BaseException) -> NoReturn:
    """Print an error and exit; only its own further lines, which are indented, stay lines."""
    output = Output.current()
    if output.verbose:
        import traceback

        _echo("".join(traceback.format_exception(error)).rstrip().split("\n"), err=True)
    if output.as_json and is_main():
        print_json({"error": message})
    else:
        first, *others = message.split("\n  ")
        where = f" (rank {rank()})" if count() > 1 else ""  # each says what ended it
        _echo([f"error{where}: {first}", *(f"  {line}" for line in others)], err=True)
    sys.exit(1)


def _usage_fault(error: click.UsageError) -> str:
    """Return click's own message about what was typed in the form of ours, with where to look."""
    text = error.format_message().rstrip(".")
    text = text if text[:2].isupper() else text[:1].lower() + text[1:]
    help_of = f" See {error.ctx.command_path} --help." if error.ctx else ""
    return f"{text}.{help_of}"


def _outer_fault(error: Exception) -> str | None:
    """Return what is wrong with the machine or a path where that is why something failed; `None` for a bug."""
    number = getattr(error, "errno", None)
    if number in _REFUSED:
        place = getattr(error, "filename", None)
        where = os.fsdecode(place) if isinstance(place, str | bytes) else "what was to be done"
        return f"the system refuses {where}: {os.strerror(number)}. Choose another path, or mend this one."
    if str(error).startswith("Symlink loop from"):  # a RuntimeError of Path.resolve, before Python 3.13
        return f"{str(error)[0].lower()}{str(error)[1:]}: its links lead back to it. Choose another path, or mend this one."
    if isinstance(error, UnicodeEncodeError):
        encoding = sys.getfilesystemencoding()
        lacks = f"the system's encoding, {encoding}, has no {error.object[error.start]!r} for a file's name. Set PYTHONUTF8=1."
        return lacks if error.encoding == encoding != "utf-8" else None
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        detail = " ".join(str(error).split())[:200]
        return (
            f"there is not enough memory{f' ({detail})' if detail else ''}. Close other programs, or take a machine with more."
        )
    return None


_NO_MEMORY = re.compile(
    r"(can.t|cannot|unable to) allocate memory|out of memory|not enough memory|can't start new thread|failed to map segment"
    r"|could not create a primitive",
    re.IGNORECASE,
)
"""What the system's, torch's and Python's own messages say where memory is gone."""
