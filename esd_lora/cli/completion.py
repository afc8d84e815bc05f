"""`esd-lora completion`: what a shell reads to complete names of commands, options, bases, recipes and erasers."""

from __future__ import annotations

import click

from esd_lora.cli.commands import Verb
from esd_lora.cli.printing import say
from esd_lora.cli.results import Completion
from esd_lora.errors import EsdLoraError, did_you_mean

_PROGRAM, _VARIABLE = "esd-lora", "_ESD_LORA_COMPLETE"
_INSTRUCTIONS = {
    "bash": f'eval "$({_PROGRAM} completion bash)"    # in ~/.bashrc',
    "zsh": f'eval "$({_PROGRAM} completion zsh)"    # in ~/.zshrc, after compinit',
    "fish": f"{_PROGRAM} completion fish > ~/.config/fish/completions/{_PROGRAM}.fish    # once",
}
"""Shell to the line that has it complete."""


@click.command(cls=Verb)
@click.argument("shell", metavar="|".join(_INSTRUCTIONS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> Completion:
    """Print what SHELL is to read so that it completes commands, options, bases, recipes and erasers.

    \b
    eval "$(esd-lora completion bash)"    # in ~/.bashrc
    eval "$(esd-lora completion zsh)"     # in ~/.zshrc, after compinit
    esd-lora completion fish > ~/.config/fish/completions/esd-lora.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell) if shell in _INSTRUCTIONS else None
    if kind is None:
        near = did_you_mean(shell, _INSTRUCTIONS)
        raise EsdLoraError(f"no completion for {shell!r}{near}: expected {', '.join(_INSTRUCTIONS)}.")
    script = f"# {_INSTRUCTIONS[shell]}\n{kind(ctx.find_root().command, {}, _PROGRAM, _VARIABLE).source()}"
    say(*script.rstrip("\n").split("\n"))
    return {"shell": shell, "script": script}
