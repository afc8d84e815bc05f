"""Options that commands share: `ERASER:WEIGHT` arguments, `-s key=value` settings, bases, devices, concepts, outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from esd_lora.bases.schedulers import scheduler_name
from esd_lora.cli.completing import complete_bases, complete_erasers, complete_schedulers
from esd_lora.cli.printing import say
from esd_lora.errors import EsdLoraError
from esd_lora.files import fresh_output, last_output
from esd_lora.ranks import count
from esd_lora.registry import require_code_names
from esd_lora.settings import setting, variable
from esd_lora.wording import slug
from esd_lora.yaml_files import parse_yaml

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from esd_lora.erasers.stacking import Strength

Weighted = tuple[str, float, dict[str, float]]
"""Path of an eraser, its weight, and factors by block."""
_Command = TypeVar("_Command", bound=Callable[..., Any])
_LITERAL = "esd_lora.literal"  # where a context holds whether --literal was given


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

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the erasers in and below the working directory."""
        return complete_erasers(ctx, param, incomplete)


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


class SchedulerType(click.ParamType):
    """One of diffusers' schedulers, by a short name."""

    name = "NAME"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ARG002
        """Return its name in full.

        Raises:
            EsdLoraError: If there is no such scheduler.
        """
        return scheduler_name(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin so."""
        return complete_schedulers(ctx, param, incomplete)


SCHEDULER = SchedulerType()


def unweighted(erasers: Sequence[Weighted]) -> tuple[list[str], list[Strength]]:
    """Return paths and strengths of `ERASER:WEIGHT` arguments."""
    from esd_lora.erasers.stacking import Strength

    return [path for path, _, _ in erasers], [Strength(weight, blocks) for _, weight, blocks in erasers]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given, in their order: those that are not `None`."""
    return {name: value for name, value in options.items() if value is not None}


def base_option(
    default: str | None = None, *, required: bool = False, configurable: bool = True
) -> Callable[[_Command], _Command]:
    """Add `--base` and what a single-file base may need.

    Args:
        default: The base where nothing says one.
        required: Whether there is no doing without.
        configurable: Whether the environment and the configuration may give it.
    """

    def add(command: _Command) -> _Command:
        known = "Built-in base, diffusers directory, .safetensors checkpoint, or Hub id[@revision]."
        config = "Diffusers directory of a single-file base's architecture."
        command = click.option("--base-config", metavar="DIR", help=config)(command)
        return click.option(
            "--base",
            default=default,
            required=required,
            show_default=default is not None,
            envvar=variable("base") if configurable else None,
            shell_complete=complete_bases,
            help=known,
        )(command)

    return add


def is_configured(name: str) -> bool:
    """Return whether an option's value comes from the environment or the configuration, and not from the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source in (click.core.ParameterSource.ENVIRONMENT, click.core.ParameterSource.DEFAULT_MAP)


def device_options(command: _Command) -> _Command:
    """Add `--device` and `--dtype`."""
    dtype = "Type of the frozen base: float32, bfloat16, float16, int8, nf4; default: what suits the device."
    command = click.option("--dtype", envvar=variable("dtype"), help=dtype)(command)
    device = "auto, cpu, cuda, mps."
    return click.option("--device", default="auto", show_default=True, envvar=variable("device"), help=device)(command)


def concept_option(text: str) -> Callable[[_Command], _Command]:
    """Add `--concept`, given once for each concept, and `--literal` for names with a comma.

    Args:
        text: What a concept is to the command.
    """

    def read(ctx: click.Context, _param: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in () if ctx.meta.get(_LITERAL) else names:
            parts = [part.strip() for part in name.split(",") if part.strip()]
            if len(parts) > 1:
                several = " ".join(f'--concept "{part}"' for part in parts)
                raise EsdLoraError(f'--concept "{name}" has a comma: give {several}, or add --literal if it is one name.')
        return names

    def keep(ctx: click.Context, _param: click.Parameter, literal: bool) -> None:
        ctx.meta[_LITERAL] = literal

    def add(command: _Command) -> _Command:
        literal = "Take a concept with a comma as one name."
        command = click.option("--literal", is_flag=True, is_eager=True, expose_value=False, callback=keep, help=literal)(
            command
        )
        return click.option("--concept", "concepts", multiple=True, metavar="TEXT", callback=read, help=text)(command)

    return add


def out_option(text: str, default: str) -> Callable[[_Command], _Command]:
    """Add `-o`, without which `choose_out` chooses.

    Args:
        text: What is written there.
        default: What is chosen, with a word in capitals for what depends on the command.
    """
    return click.option("-o", "--out", type=click.Path(path_type=Path), help=f"{text}; {default} unless given.")


def choose_out(out: Path | None, folder: str, name: str, *, suffix: str = "", again: bool = False) -> Path:
    """Return the output of a command: the given one, or one that is free, which is printed.

    Args:
        out: What was given.
        folder: Kind of output, below the configured output folder: `erasers`.
        name: What it holds, in words: `a cat` comes to `erasers/a-cat`, or `erasers/a-cat-2` where that is taken.
        suffix: Of a file: `.safetensors`.
        again: Whether the command goes on in the last one, or may write over it.
    """
    if out is not None:
        return out
    place = Path(setting("output") or "") / folder / f"{slug(name)}{suffix}"
    place = last_output(place) if again else fresh_output(place)
    say(f"output: {place}")
    return place


def names_of(*paths: str) -> str:
    """Return what files, folders or repositories are called, for the name of an output."""
    places = [Path(path) for path in paths]
    return " ".join(place.stem if place.suffix in (".safetensors", ".yaml", ".yml", ".pt") else place.name for place in places)


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


def overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Return `-s key=value` settings by key; values are YAML.

    Raises:
        EsdLoraError: If one has no `=`, or its value is not YAML or no text.
    """
    values: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise EsdLoraError(f"-s {text}: expected key=value, such as train.steps=200.")
        values[key.strip()] = parse_yaml(value, f"-s {text}")[1]
    return values
