"""Options as other programs call them, and what they are called here."""

from __future__ import annotations

from collections.abc import Mapping

import click

from esd_lora.errors import did_you_mean

WEIGHT = "ERASER:WEIGHT"
"""Stands for the weight that is written behind an eraser."""
_SETTING = "-s "  # begins a field of a recipe
_ALIKE = (
    ("lora loras lora-path adapter adapters eraser erasers", ("--eraser", "erasers", "eraser", "file", "-s lora.KEY=VALUE")),
    ("weight weights strength lora-scale lora-weight lora-strength multiplier", (WEIGHT, "--strengths")),
    ("alpha network-alpha", ("-s lora.alpha=NUMBER", WEIGHT)),
    ("rank dim network-dim", ("--rank", "-s lora.rank=N")),
    ("num-images num-images-per-prompt num-samples images count n", ("-n", "--limit", "--pictures")),
    ("batch-size train-batch-size", ("-n", "-s train.batch_size=N")),
    ("num-inference-steps inference-steps sampling-steps ddim-steps", ("-s train.trajectory_steps=N", "--steps")),
    ("iterations max-train-steps max-steps train-steps epochs", ("--steps", "-s train.steps=N")),
    ("learning-rate", ("--lr", "-s train.lr=NUMBER")),
    ("eta", ("-s eta=NUMBER",)),
    ("preserve retain keep", ("--keep", "-s preserve=[TEXT,...]")),
    ("cfg cfg-scale guidance-scale scale", ("--guidance", "-s train.guidance=NUMBER")),
    ("prompt text", ("prompts", "--prompts", "--concept", "text")),
    ("prompt-file prompts-file from-file", ("--prompts", "--keep")),
    ("negative neg", ("--negative-prompt",)),
    ("sampler", ("--scheduler",)),
    ("size resolution", ("--width",)),
    ("output output-dir output-path out-dir outdir save save-path save-dir", ("--out",)),
    ("model model-path checkpoint ckpt pretrained-model-name-or-path", ("--base", "--base-model")),
    ("erase erase-concept target concepts", ("--concept",)),
    ("replace replace-with instead", ("--anchor",)),
    ("train-method target-modules layers", ("--scope",)),
    ("recipe preset config", ("recipes", "--recipe", "--suite", "names", "name")),
    ("gpu cuda cpu", ("--device",)),
    ("precision mixed-precision fp16 bf16 half", ("--dtype",)),
    ("format", ("--layout",)),
    ("overwrite", ("--force",)),
    ("debug", ("--verbose",)),
    ("silent", ("--quiet",)),
)
HINTS: Mapping[str, tuple[str, ...]] = {f"--{word}": places for words, places in _ALIKE for word in words.split()}
"""What people type to what it is called here, of which the first that a command has counts: an option, an argument by the name
that `click` has for it, `ERASER:WEIGHT`, or a field of a recipe."""


def unknown_option(command: click.Command, typed: str, ctx: click.Context) -> str:
    """Return what an option that a command does not have is called here, or which one is near."""
    options = [name for param in command.params if isinstance(param, click.Option) for name in param.opts]
    word = typed.replace("_", "-")
    for name in (word, *HINTS.get(word, ())):
        if place := _place(command, name, ctx):
            return f"no such option {typed}: here it is {place}."
    return f"no such option {typed}{did_you_mean(typed, options)}. See {ctx.command_path} --help."


def _place(command: click.Command, name: str, ctx: click.Context) -> str | None:
    """Return how something of `HINTS` is written on a command; `None` where the command does not have it."""
    params = {str(param.name): param for param in command.params}
    if name == WEIGHT:
        weighted = any(param.type.name.startswith("ERASER") for param in command.params)
        return "written behind the eraser, as in no-cat:0.8" if weighted else None
    if name.startswith(_SETTING):
        return name if {"recipes", "settings"} <= params.keys() else None
    if name.startswith("-"):
        option = next((param for param in command.params if name in param.opts), None)
        return " or ".join(sorted(option.opts, key=len)) if option else None
    argument = params.get(name)
    return f"an argument, {argument.make_metavar(ctx).strip('[].')}" if isinstance(argument, click.Argument) else None
