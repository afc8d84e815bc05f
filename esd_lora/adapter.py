"""LoRAs on a base: a student's, which is trained, and erasers, which are added to the weights for a while."""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.stacking import Strength, stack
from esd_lora.errors import EsdLoraError
from esd_lora.recipe import LoraSpec

ADAPTER = "esd"
_ROUNDED = 0.2  # share of an update that may be lost to rounding without a word


def add_adapter(base: Base, layers: Mapping[str, torch.nn.Module], lora: LoraSpec, seed: int) -> list[torch.nn.Parameter]:
    """Add a fresh LoRA to layers and return its parameters, float32 or better; its update is zero until trained.

    Args:
        base: Whose layers get it.
        layers: By module path, as `Base.modules` returns them.
        lora: Shape of the update.
        seed: Of its start.
    """
    from peft import LoraConfig

    ranks = {path: lora.conv_rank for path, layer in layers.items() if lora.conv_rank and isinstance(layer, torch.nn.Conv2d)}
    for scope, rank in lora.ranks.items():
        ranks |= {path: rank for path in base.modules(scope) if path in layers}
    parameters: list[torch.nn.Parameter] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for model, paths in _by_model(base, layers):
            patterns = {f"^{re.escape(own)}$": ranks[path] for path, own in paths.items() if path in ranks}
            config = LoraConfig(
                r=lora.rank,
                lora_alpha=cast(int, lora.alpha),
                target_modules=list(paths.values()),
                rank_pattern=patterns,
                alpha_pattern={pattern: lora.alpha * rank / lora.rank for pattern, rank in patterns.items()},
                lora_dropout=lora.dropout,
                use_rslora=lora.rslora,
                init_lora_weights=True,
            )
            _add(model, config)
            parameters += [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        # Masters are at least float32: bf16 ones would round small updates away.
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return parameters


def _by_model(base: Base, layers: Iterable[str]) -> Iterator[tuple[torch.nn.Module, dict[str, str]]]:
    """Yield each model that layers lie in, with their paths in the base to those within the model."""
    models = base.adaptable
    for place, model in models.items():
        # The denoiser's paths begin with nothing, so it has what lies in no other.
        inside = [path for path in layers if place == max(filter(path.startswith, models), key=len)]
        if inside:
            yield model, {path: path.removeprefix(place) for path in inside}


def _add(model: torch.nn.Module, config: Any) -> None:
    """Add an adapter by peft itself: not every denoiser in diffusers has methods for that."""
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        # peft says of int8 layers that they cannot be merged, which nobody here tries.
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without")
        inject_adapter_in_model(config, model, ADAPTER)
    model.eval()  # the new layers too: dropout is for training steps alone


def remove_adapter(base: Base) -> None:
    """Take the adapter off the base again, if one is on it."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    model: Any
    for model in base.adaptable.values():
        if hasattr(model, "peft_config"):
            recurse_remove_peft_layers(model)
            del model.peft_config


def adapter_ranks(base: Base) -> dict[str, int]:
    """Return the path of every layer that the adapter is on, with the rank of its update there."""
    return {path: len(layer.lora_A[ADAPTER].weight) for path, layer in adapted_layers(base)}


def adapted_layers(base: Base) -> Iterator[tuple[str, Any]]:
    """Yield path and layer of everything that the adapter is on."""
    return ((path, layer) for path, layer in base.named_modules() if ADAPTER in getattr(layer, "lora_A", ()))


@torch.no_grad()
def set_pairs(base: Base, pairs: Mapping[str, LoraPair]) -> None:
    """Set the update of layers of the adapter; those of no pair are set to zero.

    The scale of a layer stays what it is, and so does the size of its `down`: a learning rate that was measured holds.

    Args:
        base: Carries an adapter of no lower rank than any pair.
        pairs: By module path.
    """
    for path, layer in adapted_layers(base):
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        up.zero_()
        if path in pairs:
            rank, own = pairs[path].rank, pairs[path].down.to(down)
            size = down[:rank].norm() / own.norm().clamp_min(1e-30)
            down[:rank] = size * own
            up[:, :rank] = pairs[path].up.to(up) / (size * layer.scaling[ADAPTER])


def load_adapter(base: Base, pairs: Mapping[str, LoraPair]) -> list[torch.nn.Parameter]:
    """Load updates into the base as a LoRA to be trained further, and return its parameters, float32 or better."""
    from peft import LoraConfig

    for model, paths in _by_model(base, pairs):
        ranks = {f"^{re.escape(own)}$": pairs[path].rank for path, own in paths.items()}
        targets = list(paths.values())
        _add(model, LoraConfig(r=1, lora_alpha=1, target_modules=targets, rank_pattern=ranks, alpha_pattern=dict(ranks)))
    parameters: list[torch.nn.Parameter] = []
    layers: dict[str, Any] = dict(base.named_modules())
    for path, pair in pairs.items():
        for factors, value in zip((layers[path].lora_A, layers[path].lora_B), pair, strict=True):
            parameter = factors[ADAPTER].weight
            parameter.data = value.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32), copy=True)
            parameters.append(parameter)
    return parameters


@contextmanager
def adapter_disabled(base: Base) -> Iterator[None]:
    """Turn the adapter off for the length of a `with` block."""
    layers = [layer for _, layer in adapted_layers(base)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def dropout_enabled(base: Base, lora: LoraSpec, seed: int) -> Iterator[None]:
    """Turn the LoRA's dropout on for the length of a `with` block; what it drops is drawn from `seed`."""
    if not lora.dropout:
        yield
        return
    layers: list[Any] = [layer.lora_dropout for _, layer in adapted_layers(base)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()


def adapter_pairs(base: Base) -> dict[str, LoraPair]:
    """Return the trained LoRA by module path, wherever it lies, its scale folded into `up`."""
    return {place + path: pair for place, model in base.adaptable.items() for path, pair in read_pairs(model).items()}


def read_pairs(model: torch.nn.Module) -> dict[str, LoraPair]:
    """Return the trained LoRA on one model by its paths, its scale folded into `up`."""
    pairs: dict[str, LoraPair] = {}
    layer: Any
    for path, layer in model.named_modules():
        if ADAPTER in getattr(layer, "lora_A", ()):
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            scaled = up.detach() * layer.scaling[ADAPTER]
            pairs[path] = LoraPair(down.detach().to("cpu", copy=True), scaled.to("cpu", copy=True))
    return pairs


class AttachedStack:
    """A stack beside the weights of a quantized base, to which nothing can be added: a LoRA, whose strength is its scale."""

    def __init__(self, base: Base, stacked: Eraser):
        self._base = base
        load_adapter(base, stacked.pairs)
        layers: dict[str, Any] = dict(base.named_modules())
        self._layers = [layers[path] for path in stacked.pairs]

    def set_strength(self, strength: float) -> None:
        """Apply the stack at a strength on top of its members' own; 0 is the base itself."""
        for layer in self._layers:
            layer.scaling[ADAPTER] = strength

    def remove(self) -> None:
        """Take the stack off again."""
        remove_adapter(self._base)


class AppliedStack:
    """A stack added to a base's weights: it costs nothing at inference, and its strength can still be changed.

    The weights it touches are kept as they were, on the CPU, so every strength is summed anew in float32 and rounded once,
    and taking the stack off gives the base back bit for bit. Half precision rounds a weight by about a thousandth of itself
    (bfloat16), which is a fifth of an update of half a percent: a warning says so where it is that much.
    """

    def __init__(self, base: Base, stacked: Eraser | None):
        pairs = stacked.pairs if stacked else {}
        self._layers: list[tuple[Tensor, Tensor, LoraPair]] = [
            (weight.data, weight.detach().to("cpu", copy=True), pairs[path]) for path, weight in base.weights(pairs)
        ]

    @torch.no_grad()
    def set_strength(self, strength: float) -> None:
        """Apply the stack at a strength on top of its members' own; 0 is the base itself."""
        added = lost = 0.0
        for weight, original, pair in self._layers:
            weight.copy_(original)
            if strength:
                precise = torch.promote_types(weight.dtype, torch.float32)
                delta = strength * LoraPair(*(factor.to(weight.device, precise) for factor in pair)).delta()
                total = weight.to(precise) + delta
                weight.copy_(total.to(weight.dtype))
                if weight.dtype != precise:
                    added += float(delta.square().sum())
                    lost += float((weight.to(precise) - total).square().sum())
        if lost > _ROUNDED**2 * added > 0:
            warnings.warn(
                f"in {str(self._layers[0][0].dtype)[6:]}, rounding changes the erasers' update by {(lost / added) ** 0.5:.0%}"
                " of its size. Load the base in float32 (--dtype float32) to see what they do exactly.",
                stacklevel=2,
            )

    def remove(self) -> None:
        """Take the stack off again."""
        self.set_strength(0.0)


@contextmanager
def applied(
    base: Base, erasers: Sequence[Eraser], weights: Sequence[float | Strength] | None = None
) -> Generator[AppliedStack | AttachedStack]:
    """Add erasers to the base's weights, as one exact stack, for the length of a `with` block.

    They are added beside the weights, not to them, where the base is quantized.

    Yields:
        The stack, whose strength may be changed on the way.

    Raises:
        EsdLoraError: If an eraser is of another family or has layers the base lacks, or the base carries an adapter.
    """
    if not erasers:
        if weights:
            raise EsdLoraError(f"{len(weights)} weights and no erasers: give a weight for each eraser.")
        yield AppliedStack(base, None)
        return
    base.require_bare()
    stacked = stack(erasers, weights)
    base.check(stacked)
    stack_on_base = AttachedStack(base, stacked) if base.quantized else AppliedStack(base, stacked)
    try:
        stack_on_base.set_strength(1.0)
        yield stack_on_base
    finally:
        stack_on_base.remove()
