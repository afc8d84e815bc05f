"""Configurations of a base's components, checked before diffusers and transformers build what they describe.

A stranger's configuration may name a kernel, which transformers would fetch and run, or a model of a size that no file here has
weights for, which would take minutes and gigabytes until that is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError, shortened
from esd_lora.json_files import read_json

MAX_FILE = 2**40
"""Bytes of the largest file of a base that is fetched."""
_IMPLEMENTATIONS = ("eager", "sdpa")
_METHODS = ("bitsandbytes", "torchao", "quanto")  # transformers fetches kernels for others
_LAYERS = 10_000  # diffusers lays out lists of so many items before the first layer
_TIMES = 4  # a parameter is registered when its layer is made, when its weights come, and where layers share it
_TENSORS, _NUMBERS = 2_000, 2**26  # that a model may have beyond what the files hold


def check_configurations(folder: Path) -> None:
    """Check the configurations of the components in a diffusers directory.

    Raises:
        EsdLoraError: If one is damaged, names code that would be fetched, or a table of places that no weights could be for.
    """
    for file in sorted(folder.glob("*/config.json")):
        values = read_json(file)
        for key, value in _entries(values):
            if "layers" in key and any(isinstance(count, int) and count > _LAYERS for count in _leaves(value)):
                raise EsdLoraError(f"{file}: {key} is {shortened(repr(value))}, more than any model has. Fetch the base again.")
            method = value.get("quant_method") if key == "quantization_config" and isinstance(value, dict) else None
            kernel = value if key.endswith(("attn_implementation", "experts_implementation")) else None
            known = _METHODS if method else _IMPLEMENTATIONS
            if (method or kernel) is not None and (method or kernel) not in known:
                raise EsdLoraError(
                    f"{file}: {key} is {shortened(repr(value))}, which may be code that is fetched. Expected"
                    f" {', '.join(known)} or nothing. Take the line out if you trust the rest."
                )
        numbers = _table_size(values)
        if numbers > _NUMBERS and numbers > sum(map(math.prod, _shapes(file.parent.glob("*.safetensors")))):
            raise EsdLoraError(
                f"{file} describes a table of {numbers:,} numbers for the places in a picture, more than the weights beside it"
                " hold. Fetch the base again, or from elsewhere."
            )


def _leaves(values: Any) -> Generator[Any]:
    """Yield what stands in nested lists, or a value itself."""
    for value in values if isinstance(values, list) else ():
        yield from _leaves(value)
    if not isinstance(values, list):
        yield values


def _table_size(values: dict[str, Any]) -> int:
    """Return of how many numbers the table of places is that diffusers computes for a transformer before it reads weights."""
    keys = ("sample_size", "patch_size", "pos_embed_max_size", "num_attention_heads", "attention_head_dim")
    size, patch, side, heads, width = ([value] if isinstance(value := values.get(key), int) else [] for key in keys)
    sides = side or [pixels // length for pixels in size for length in patch if length > 0]
    return max((length**2 * h * w for length in sides for h in heads for w in width), default=0)


def _shapes(files: Iterable[Path]) -> list[list[int]]:
    return [entry["shape"] for file in files for entry in read_header(file).tensors.values()]


def _entries(values: Any) -> Generator[tuple[str, Any]]:
    """Yield every key of nested mappings with its value."""
    inner: Iterable[Any] = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    if isinstance(values, dict):
        yield from values.items()
    for value in inner:
        yield from _entries(value)


@contextmanager
def bounded_models(files: Iterable[Path], source: object) -> Generator[None]:
    """Refuse to build models of more parameters than could come from some files of weights, for as long as the block runs.

    Args:
        files: Safetensors files.
        source: What is loaded, for the message.

    Raises:
        EsdLoraError: If a model becomes too large, before it is built to its end; or a file is damaged.
    """
    shapes = _shapes(files)
    tensors, numbers = _TIMES * len(shapes) + _TENSORS, _TIMES * sum(map(math.prod, shapes)) + _NUMBERS

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, numbers
        tensors, numbers = tensors - 1, numbers - (0 if parameter is None else parameter.numel())
        if tensors < 0 or numbers < 0:
            raise EsdLoraError(
                f"a configuration of {source} describes a model far larger than the {len(shapes):,} tensors there are. Fetch it"
                " again, or from elsewhere."
            )

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def require_weights(components: Iterable[tuple[str, Any]], source: object, remedy: str) -> None:
    """See that every parameter of a pipeline's components has its weights.

    Raises:
        EsdLoraError: If some stayed without.
    """
    for part, component in components:
        if isinstance(component, nn.Module):
            lacking = [path for path, parameter in component.named_parameters() if parameter.is_meta]
            if lacking:
                raise EsdLoraError(f"{source} lacks {len(lacking)} tensors of the {part}, {lacking[0]} the first. {remedy}")
