"""The command line: parses, calls one public function, prints where the result is."""

from __future__ import annotations

import click

from esd_lora import __version__
from esd_lora.cli.commands import Commands
from esd_lora.cli.completion import completion
from esd_lora.cli.doctor import doctor
from esd_lora.cli.files import diff, export, extract, import_, inspect, merge
from esd_lora.cli.fleet import fleet, release
from esd_lora.cli.making import demo, generate, train
from esd_lora.cli.measuring import evaluate
from esd_lora.cli.recipes import recipes
from esd_lora.cli.requests import requests
from esd_lora.cli.sharing import catalog, pull, push, search
from esd_lora.cli.stacks import stack


@click.group("esd-lora", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="esd-lora")
def main() -> None:
    """Erase concepts from text-to-image diffusion models with small LoRA files."""


for command in (
    *(train, generate, stack, merge, evaluate, inspect, diff, export, import_, extract),
    *(push, pull, search, catalog, recipes, requests, fleet, release, demo, doctor, completion),
):
    main.add_command(command)
