"""Commands: what all of them share beside their own options, and the group that they stand in."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from esd_lora.cli.hints import unknown_option
from esd_lora.cli.printing import Output, print_json, printing, reporting_faults, say
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.ranks import count, is_main
from esd_lora.settings import config_file, configured
from esd_lora.wording import is_text

_LOG = logging.getLogger(__name__)
SHARED = ("train", "generate", "evaluate")
"""Commands that several ranks may run together."""
_OTHERS_LOGS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Where torchao, which others import as soon as it is installed, tells of kernels that are not there."""


def _check_directory() -> None:
    """Refuse to begin where the working directory was deleted: torch's libraries end the process when they are loaded there."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise EsdLoraError("the working directory is gone. Change into one that exists.") from error


class Failed(click.exceptions.Exit):
    """Ends a command with exit code 1 and a result: nothing broke, but what was asked is answered with no."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        super().__init__(1)
        self.result = result


class Verb(click.Command):
    """A command that returns its result, one of `cli.results`, beside what it prints for people.

    Every one takes `--quiet`, `--verbose` and `--json`, has its defaults from the configuration where an option allows it
    (`settings`), and names the right option where somebody types that of another program (`hints`).

    Args:
        args: As for `click.Command`.
        sections: Heading in the help to the names of options below it; all others stand below `Options`.
        kwargs: As for `click.Command`.
    """

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections or {}
        self.params += _output_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = args[: args.index("--")] if "--" in args else args
        Output(as_json="--json" in words).choose(ctx)  # for faults of what is about to be read
        if not {*words} & {*self.get_help_option_names(ctx)}:  # help is there whatever the file holds
            ctx.default_map = configured(self.params)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise EsdLoraError(unknown_option(self, error.option_name, ctx)) from error

    def invoke(self, ctx: click.Context) -> Any:
        output = Output.current()
        failed: Failed | None = None
        try:
            with printing(output):
                _log_defaults(ctx)
                result = super().invoke(ctx)
        except Failed as error:
            result, failed = error.result, error
        if output.as_json and is_main() and result is not None:
            print_json(result)
        if failed:
            raise failed
        return result

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option) and not param.hidden]
        sections = {
            heading: [o for name in names for o in options if o.name == name] for heading, names in self.sections.items()
        }
        listed = [option for section in sections.values() for option in section]
        sections["Options"] = [option for option in options if option not in listed]
        for heading, section in sections.items():
            with formatter.section(heading):
                formatter.write_dl([record for option in section if (record := option.get_help_record(ctx))])


def _log_defaults(ctx: click.Context) -> None:
    """Log what was taken from the environment or the configuration file."""
    for param in ctx.command.params:
        source = ctx.get_parameter_source(str(param.name))
        if source == click.core.ParameterSource.ENVIRONMENT:
            _LOG.debug("%s %s, by %s", param.name, ctx.params.get(str(param.name)), param.envvar)
        elif source == click.core.ParameterSource.DEFAULT_MAP:
            _LOG.debug("%s %s, by %s", param.name, ctx.params.get(str(param.name)), config_file())


def _output_options() -> list[click.Option]:
    """Return the options that say what a command prints."""

    def choose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        output = Output.current()._replace(**{str(param.name): value})
        if output.quiet and output.verbose:
            raise EsdLoraError("--quiet prints nothing but errors, and --verbose more than usual: leave either out.")
        output.choose(ctx)

    texts = {
        ("-q", "--quiet", "quiet"): "Print nothing but errors.",
        ("-v", "--verbose", "verbose"): "Also print what is loaded and how long it takes.",
        ("--json", "as_json"): "Print the result as one JSON object (docs/json.md).",
    }
    return [
        click.Option(names, is_flag=True, is_eager=True, expose_value=False, callback=choose, help=text)
        for names, text in texts.items()
    ]


class HeavyCommand(Verb):
    """Says that it is at work before it loads torch and diffusers, which takes seconds; on a terminal alone."""

    def invoke(self, ctx: click.Context) -> Any:
        if sys.stderr.isatty():
            say(f"{ctx.info_name}: loading ...", err=True)
        return super().invoke(ctx)


class Commands(click.Group):
    """Turns the faults a user can cause into one sentence and exit code 1."""

    command_class = Verb

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
