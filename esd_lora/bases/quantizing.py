"""A frozen denoiser in eight or four bits, for cards that cannot hold it in sixteen.

Quantized are the linear layers inside the denoiser's blocks, where nearly all of its weights are. What stands around the
blocks, convolutions and norms keep their dtype, and so do the layers that read text: the closed form solves those, and solves
them as exactly as on the whole base. Adapters lie beside quantized weights and are float32 as always.

- `int8` (torchao): each row rounded to 255 steps of its own, weights alone. On any device.
- `nf4` (bitsandbytes): groups of 64 weights on 16 levels that a normal distribution fills evenly, their scales quantized once
  more (Dettmers et al., QLoRA, arXiv:2305.14314).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from esd_lora.errors import EsdLoraError, how_to_install
from esd_lora.families.family import ModelFamily

QUANTIZED = {"int8": "torchao", "nf4": "bitsandbytes"}
"""Name of each kind to the library that it needs, and whose extra of esd-lora is named as the kind."""


def require_library(kind: str) -> None:
    """Refuse a kind of `QUANTIZED` whose library is not installed.

    Raises:
        EsdLoraError: With how to install it.
    """
    if find_spec(QUANTIZED[kind]) is None:
        raise EsdLoraError(f"dtype {kind!r} needs {QUANTIZED[kind]}, which is not installed: {how_to_install(kind)}.")


def quantized_layers(model: nn.Module, family: ModelFamily) -> Iterator[tuple[str, nn.Linear]]:
    """Yield path and layer of every linear of a denoiser that is quantized."""
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and re.search(family.blocks, path) and family.text_read_by(path) is None:
            yield path, layer


def quantize(model: nn.Module, family: ModelFamily, kind: str) -> None:
    """Quantize a denoiser in place; `nf4` rounds when the layers are moved to a device, be it the one that they are on.

    Args:
        model: The denoiser, its weights frozen.
        family: Says which layers read text.
        kind: `int8` or `nf4`; `require_library` has seen that its library is there.
    """
    for path, layer in list(quantized_layers(model, family)):
        model.set_submodule(path, (_in_int8 if kind == "int8" else _in_nf4)(layer))
    if kind == "nf4":
        model.is_loaded_in_4bit = True  # pyright: ignore[reportArgumentType]  # peft asks for it


def dequantized(weight: Tensor) -> Tensor:
    """Return a weight as an ordinary tensor: what a quantized one stands for, any other as it is."""
    if state := getattr(weight, "quant_state", None):
        return import_module("bitsandbytes.functional").dequantize_4bit(weight.data, state)
    return weight.dequantize() if type(weight).__name__ == "Int8Tensor" else weight


class Int8Linear(nn.Linear):
    """A frozen linear whose weight is torchao's Int8Tensor.

    Left to itself, autograd keeps a copy of every such weight in the activations' dtype until the backward pass, which is all
    that was saved, and more.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return what `nn.Linear` returns."""
        return _FrozenProduct.apply(input, self.weight, self.bias)


class _FrozenProduct(torch.autograd.Function):
    """`F.linear` with a weight that needs no gradient, and that the backward pass dequantizes once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.weight.dequantize(gradient.dtype), None, None


def _in_int8(layer: nn.Linear) -> nn.Linear:
    torchao = import_module("torchao.quantization")
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    with torch.device("meta"):
        frozen = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None)
    frozen.weight, frozen.bias = layer.weight, layer.bias
    return frozen.train(layer.training)


def _in_nf4(layer: nn.Linear) -> nn.Linear:
    bitsandbytes, sizes = import_module("bitsandbytes.nn"), (layer.in_features, layer.out_features, layer.bias is not None)
    with torch.device("meta"):
        frozen = bitsandbytes.Linear4bit(*sizes, compute_dtype=layer.weight.dtype, quant_type="nf4")
    frozen.weight = bitsandbytes.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=frozen)
    frozen.bias = layer.bias
    frozen.support_avx512bf16_for_cpu = False  # a layout of bitsandbytes for inference alone, which rounds the scales once more
    return frozen.train(layer.training)
