"""`python -m esd_lora`: the command line."""

from esd_lora.cli import main

main(prog_name="esd-lora")
