"""What every command shares: faults as one sentence, `ERASER:WEIGHT` arguments, `-s key=value` settings."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from esd_lora.errors import EsdLoraError, did_you_mean

Weighted = tuple[str, float]
_Command = TypeVar("_Command", bound=Callable[..., Any])


class Commands(click.Group):
    """Turns the faults a user can cause into one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        if "OMP_WAIT_POLICY" not in os.environ:
            # OpenMP threads that spin long at barriers are slow on a busy machine, those that sleep at once are slow on
            # a quiet one; benchmarks/sample_evaluation.py compares.
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
                warnings.filterwarnings("ignore", category=FutureWarning)
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                return super().invoke(ctx)
        except EsdLoraError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


class EraserType(click.ParamType):
    """`PATH` or `PATH:WEIGHT`."""

    name = "ERASER[:W]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Weighted:  # noqa: ARG002
        path, colon, weight = str(value).rpartition(":")
        if colon and not Path(value).exists():
            try:
                strength = float(weight)
            except ValueError:
                return str(value), 1.0
            if not math.isfinite(strength):
                raise EsdLoraError(f"weight {weight!r} of eraser {path} is not a finite number.")
            return path, strength
        return str(value), 1.0


ERASER = EraserType()


def base_option(default: str | None = None) -> Callable[[_Command], _Command]:
    """`--base` and what a single-file base may need."""

    def add(command: _Command) -> _Command:
        known = "Built-in base, diffusers directory, .safetensors checkpoint, or Hub id[@revision]."
        config = "Diffusers directory of a single-file base's architecture."
        command = click.option("--base-config", metavar="DIR", help=config)(command)
        return click.option("--base", default=default, show_default=default is not None, help=known)(command)

    return add


def device_options(command: _Command) -> _Command:
    """`--device` and `--dtype`."""
    dtype = "Of the frozen base: float32, bfloat16, float16; default: what suits the device."
    command = click.option("--dtype", help=dtype)(command)
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")(command)


force_option = click.option("--force", is_flag=True, help="Write over an existing output.")


def overrides(settings: tuple[str, ...]) -> dict[str, Any]:
    """Reads `-s key=value` settings; values are YAML.

    Raises:
        EsdLoraError: If one has no `=` or its value is not YAML.
    """
    out: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise EsdLoraError(f"-s {setting}: expected key=value, such as train.steps=200.")
        try:
            out[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise EsdLoraError(f"-s {setting}: the value is not valid YAML.") from error
    return out
