"""What every command shares: how it prints, faults as one sentence, `ERASER:WEIGHT` arguments, `-s key=value` settings."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.ranks import count, is_main, rank
from esd_lora.registry import require_code_names
from esd_lora.wording import is_text, printable
from esd_lora.yaml_files import parse_yaml

if TYPE_CHECKING:
    from esd_lora.erasers.stacking import Strength

Weighted = tuple[str, float, dict[str, float]]
"""Path of an eraser, its weight, and factors by block."""
_Command = TypeVar("_Command", bound=Callable[..., Any])


_REFUSED = {
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EISDIR, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EIO),
}
"""What a system refuses because of the path, the disk or a limit, not because of a bug."""


def say(*lines: str, err: bool = False, colour: str | None = None) -> None:
    """Print lines of text: what a terminal would obey is shown instead, and so is a line break within a line.

    Of several ranks the main one prints.

    Args:
        lines: Each on its own; names, prompts and headers of strangers may be part of them.
        err: Whether to print on standard error.
        colour: Name of a colour on a terminal, unless NO_COLOR is set (no-color.org).
    """
    if is_main():
        _echo(lines, err, None if os.environ.get("NO_COLOR") else colour)


def _echo(lines: Sequence[str], err: bool, colour: str | None = None) -> None:
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    bars = sys.modules.get("esd_lora.bars")  # no bar is shown before that is imported
    with bars.lines_between_bars() if bars else nullcontext():
        for line in lines:
            text = printable(line).encode(encoding, "backslashreplace").decode(encoding)
            click.echo(click.style(text, fg=colour) if colour else text, err=err)


_OTHERS_LOGS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Where torchao, which others import as soon as it is installed, tells of kernels that are not there."""


@contextmanager
def reporting_faults() -> Generator[None]:
    """Turn the faults a user can cause inside a `with` block into one sentence and exit code 1; a bug keeps its traceback."""
    try:
        yield
    except EsdLoraError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted. Nothing half-written was left; the same command begins again.")
    except (OSError, MemoryError, RuntimeError, ImportError, UnicodeEncodeError) as error:
        sentence = _outer_fault(error)
        if sentence is None:
            raise
        _fail(sentence)


@contextmanager
def going_on_in(out: Path) -> Generator[None]:
    """Make a sentence of Ctrl-C inside a `with` block whose work is gone on with by the same command."""
    try:
        yield
    except KeyboardInterrupt:
        raise EsdLoraError(f"interrupted; the same command goes on in {out}.") from None


def _fail(message: str) -> NoReturn:
    """Print an error and exit; only its own further lines, which are indented, stay lines."""
    first, *others = message.split("\n  ")
    where = f" (rank {rank()})" if count() > 1 else ""  # each says what ended it
    _echo([f"error{where}: {first}", *(f"  {line}" for line in others)], err=True)
    sys.exit(1)


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


def _check_directory() -> None:
    """Refuse to begin where the working directory was deleted: torch's libraries end the process when they are loaded there."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise EsdLoraError("the working directory is gone. Change into one that exists.") from error


SHARED = ("train", "generate", "evaluate")
"""Commands that several ranks may run together."""


class Commands(click.Group):
    """Turns the faults a user can cause into one sentence and exit code 1."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with reporting_faults():
            for text in args:
                if not is_text(text):
                    raise EsdLoraError(
                        f"argument {text!r} is no UTF-8, which headers, records and cards need. Rename the file."
                    )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if "OMP_WAIT_POLICY" not in os.environ:
            # OpenMP threads that spin long at barriers are slow on a busy machine, those that sleep at once are slow on
            # a quiet one; benchmarks/sample_evaluation.py compares.
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        if not is_main():
            os.environ.setdefault("TQDM_DISABLE", "1")
        with reporting_faults(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", err=True)
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            for name in _OTHERS_LOGS:
                logging.getLogger(name).setLevel(logging.ERROR)
            _check_directory()
            return super().invoke(ctx)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{did_you_mean(args[0], self.commands)}")
        if count() > 1 and args[0] in self.commands and args[0] not in SHARED:
            raise EsdLoraError(
                f"{args[0]} is the work of one process, and {count()} were started; {', '.join(SHARED)} share theirs. Start it"
                " without torchrun or accelerate launch."
            )
        return super().resolve_command(ctx, args)


class HeavyCommand(click.Command):
    """Says that it is at work before it loads torch and diffusers, which takes seconds, and later on; on a terminal alone."""

    def invoke(self, ctx: click.Context) -> Any:
        if sys.stderr.isatty():
            say(f"{ctx.info_name}: loading ...", err=True)
        atexit.register(gc.freeze)  # or Python looks through all of torch's objects for seconds before it ends
        from esd_lora.bars import Pulse, watched

        with watched(True), Pulse(f"{ctx.info_name}: at work"):
            return super().invoke(ctx)


class EraserType(click.ParamType):
    """`PATH`, `PATH:WEIGHT` or `PATH:WEIGHT,BLOCK=FACTOR,...`."""

    name = "ERASER[:W]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Weighted:  # noqa: ARG002
        path, colon, strength = str(value).rpartition(":")
        if not colon or Path(value).exists():
            return str(value), 1.0, {}
        weight, blocks = 1.0, dict[str, float]()
        for i, part in enumerate(strength.split(",")):
            block, equals, number = part.rpartition("=")
            try:
                factor = float(number)
            except ValueError:
                return str(value), 1.0, {}  # then the colon belongs to the path
            if not equals and i > 0:
                raise EsdLoraError(f"{value}: {part!r} is a second weight, expected BLOCK=FACTOR, such as mid=0.5.")
            if not math.isfinite(factor):
                raise EsdLoraError(f"weight {part!r} of eraser {path} is not a finite number.")
            if equals:
                blocks[block.strip()] = factor
            else:
                weight = factor
        return path, weight, blocks


ERASER = EraserType()


class NumbersType(click.ParamType):
    """Finite numbers with commas between: `0,0.5,1`."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:  # noqa: ARG002
        """Return the numbers.

        Raises:
            EsdLoraError: If something is not a finite number.
        """
        try:
            numbers = [float(part) for part in str(value).split(",")]
        except ValueError:
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            name = param.opts[0] if param else "list"
            raise EsdLoraError(f"{name} {value!r}: expected numbers with commas between, such as 0,0.5,1.")
        return numbers


NUMBERS = NumbersType()


def unweighted(erasers: Sequence[Weighted]) -> tuple[list[str], list[Strength]]:
    """Return paths and strengths of `ERASER:WEIGHT` arguments."""
    from esd_lora.erasers.stacking import Strength

    return [path for path, _, _ in erasers], [Strength(weight, blocks) for _, weight, blocks in erasers]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given, in their order: those that are not `None`."""
    return {name: value for name, value in options.items() if value is not None}


def base_option(default: str | None = None) -> Callable[[_Command], _Command]:
    """Add `--base` and what a single-file base may need."""

    def add(command: _Command) -> _Command:
        known = "Built-in base, diffusers directory, .safetensors checkpoint, or Hub id[@revision]."
        config = "Diffusers directory of a single-file base's architecture."
        command = click.option("--base-config", metavar="DIR", help=config)(command)
        return click.option("--base", default=default, show_default=default is not None, help=known)(command)

    return add


def device_options(command: _Command) -> _Command:
    """Add `--device` and `--dtype`."""
    dtype = "Type of the frozen base: float32, bfloat16, float16, int8, nf4; default: what suits the device."
    command = click.option("--dtype", help=dtype)(command)
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")(command)


force_option = click.option("--force", is_flag=True, help="Write over an existing output.")


def _in_one_process(_ctx: click.Context, _param: click.Parameter, dry_run: bool) -> bool:
    if dry_run and count() > 1:
        raise EsdLoraError("--dry-run counts and times one process. Start it without torchrun or accelerate launch.")
    return dry_run


dry_run_option = click.option(
    "--dry-run", is_flag=True, callback=_in_one_process, help="Only print what it would take: work, time, memory, files."
)


def allow_code_option(command: _Command) -> _Command:
    """Add `--allow-code`, whose names are printed: whoever reads the log sees that other code ran."""

    def convert(_ctx: click.Context, _param: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
        require_code_names(names)
        if names:
            say(f"allowed to run code of its own: {', '.join(names)}", err=True)
        return names

    text = "Code of yours that a file may name and run; may be given several times."
    return click.option("--allow-code", multiple=True, metavar="MODULE:NAME", callback=convert, help=text)(command)


def overrides(settings: tuple[str, ...]) -> dict[str, Any]:
    """Return `-s key=value` settings by key; values are YAML.

    Raises:
        EsdLoraError: If one has no `=`, or its value is not YAML or no text.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise EsdLoraError(f"-s {setting}: expected key=value, such as train.steps=200.")
        values[key.strip()] = parse_yaml(value, f"-s {setting}")[1]
    return values
