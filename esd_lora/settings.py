"""Defaults of a user's own: which base, device, dtype and output folder, where the command line does not say.

    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    device = "cuda"
    output = "/data/esd-lora"

in `~/.config/esd-lora/config.toml` (on macOS and Windows in the folder that `click.get_app_dir` names; `ESD_LORA_CONFIG` names
another file, and an empty one none), or `ESD_LORA_BASE` and so on in the environment. An option counts more than the
environment, the environment more than the file, the file more than what ships.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from esd_lora.errors import EsdLoraError, did_you_mean

SETTINGS: Mapping[str, str] = {
    "base": "Base to erase from, paint with, measure on and merge into: as --base.",
    "device": "Device, as --device.",
    "dtype": "Type of the frozen base, as --dtype.",
    "output": "Folder for erasers, pictures and models where no -o is given; the working directory by default.",
}
"""What may be set, and what it is for."""
PREFIX = "ESD_LORA_"
"""Before the names of settings in the environment, which are in capitals there."""
FILE_VARIABLE = f"{PREFIX}CONFIG"


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def config_file() -> Path | None:
    """Return the configuration file, whether or not it is there; `None` where the environment says that there is none."""
    named = os.environ.get(FILE_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    return Path(click.get_app_dir("esd-lora")) / "config.toml"


def read_config() -> dict[str, str]:
    """Return the settings of the configuration file; none where there is no file.

    Raises:
        EsdLoraError: If it cannot be read, or says what no setting is.
    """
    import tomllib

    file = config_file()
    if file is None:
        return {}
    try:
        values = tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        if FILE_VARIABLE in os.environ:
            raise EsdLoraError(f"{FILE_VARIABLE} names {file}, and there is no such file. Mend or unset it.") from None
        return {}
    except (OSError, ValueError) as error:  # no text and no TOML are both the latter
        raise EsdLoraError(f"the configuration {file} cannot be read ({error}). Mend or remove it.") from error
    for name, value in values.items():
        if name not in SETTINGS:
            near = did_you_mean(name, SETTINGS)
            raise EsdLoraError(f"the configuration {file} has {name!r}{near}, expected {', '.join(SETTINGS)}. Mend it.")
        if not isinstance(value, str) or not value:
            raise EsdLoraError(f'the configuration {file} has {name} = {value!r}, expected a text: {name} = "...". Mend it.')
    return values


def setting(name: str) -> str | None:
    """Return a setting, from the environment or else the file; `None` where neither has it.

    Raises:
        EsdLoraError: As `read_config` does.
    """
    return os.environ.get(variable(name)) or read_config().get(name)


def configured(params: Sequence[click.Parameter]) -> dict[str, str]:
    """Return the file's defaults for those of a command's options that a setting may give: they name its variable.

    Raises:
        EsdLoraError: As `read_config` does.
    """
    names = [name for param in params if (name := str(param.name)) in SETTINGS and param.envvar == variable(name)]
    values = read_config() if names else {}
    return {name: values[name] for name in names if name in values}
