"""What the layers of a base read under given prompts: second moments of their inputs, on short trajectories.

`G = mean x x^T`, over every point of a trajectory and every pixel or token there, is all that a least-squares problem on a
layer needs to know of the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esd_lora.bases.base import Base
from esd_lora.trajectory import Condition, latents_per_batch, pick, walk

_ROWS = 128
"""Pixels or tokens of one latent that count, evenly spaced; patches of a convolution overlap, so fewer of them."""


class Reading(NamedTuple):
    """Prompts under which layers are watched, and how they count."""

    prompts: Sequence[str]
    trajectories: int
    """Walked, the prompts taking turns."""
    weight: float = 1.0
    """Of the second moment in the sum of all."""
    member: int | None = None
    """Which of the updates under study the prompts belong to, if to one."""


def turns(count: int, choices: int) -> list[int]:
    """Which of some choices comes `count` times in turn; evenly spaced ones where there are more than that."""
    return [i * max(count, choices) // count % choices for i in range(count)]


class Moment:
    """Second moments of what one layer reads.

    Args:
        layer: A linear or convolution; one output value of a convolution is made of an unfolded patch.
        downs: The lower factors of updates of this layer, by number.
    """

    def __init__(self, layer: Any, downs: Mapping[int, Tensor]):
        self.layer = layer
        device, inputs = layer.weight.device, layer.weight[0].numel()
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.downs = {i: down.flatten(1).to(device, torch.float64) for i, down in downs.items()}
        """Number to `down`, [rank, inputs]."""
        self.total = torch.zeros(inputs, inputs, device=device, dtype=dtype)
        """The weighted sum of all readings' second moments, [inputs, inputs]."""
        self.reads: dict[int, Tensor] = {}
        """Number i to `down_i G_i`, [rank, inputs], with the second moment of i's own prompts."""
        self._one: Tensor | None = None

    def add(self, x: Tensor, share: float) -> None:
        """Adds a share of one reading's second moment: `x` [N, ...] as the layer gets it."""
        most = _ROWS
        if isinstance(self.layer, nn.Conv2d):
            kernel = self.layer
            x = nn.functional.unfold(x, kernel.kernel_size, kernel.dilation, kernel.padding, kernel.stride).mT  # type: ignore[arg-type]
            most //= math.prod(kernel.kernel_size)
        elif x.dim() == 2:
            x = x[:, None]
        x = x[:, :: max(1, -(-x.shape[1] // most))]
        rows = x.reshape(-1, x.shape[-1]).to(self.total)
        if self._one is None:
            self._one = torch.zeros_like(self.total)
        self._one.addmm_(rows.T, rows, alpha=share / len(rows))

    def close(self, reading: Reading, second: Tensor | None = None) -> None:
        """Ends one reading.

        Args:
            reading: Which it was.
            second: Its second moment, [inputs, inputs], if that is known already; otherwise what was added since the last.
        """
        one = self._one if second is None else second.to(self.total)
        assert one is not None, "nothing was added"
        if reading.member in self.downs:
            self.reads[reading.member] = self.downs[reading.member] @ one.double()
        self.total.add_(one, alpha=reading.weight)
        if self._one is not None:
            self._one.zero_()


class Readings:
    """Watches layers while the base denoises under prompts.

    Args:
        base: The loaded base.
        readings: What to watch under.
        steps: Points on a trajectory.
        guidance: Of the trajectories; the empty prompt's readings on them do not count.
        seed: Of the noise.
    """

    def __init__(self, base: Base, readings: Sequence[Reading], *, steps: int, guidance: float, seed: int):
        self.base, self.readings = base, readings
        self.steps, self.guidance, self.seed = steps, guidance, seed
        self.evaluations = 0
        """Latents through the denoiser so far; a guided pair counts 2."""
        self._points: dict[int, list[tuple[Tensor, Tensor, Condition]]] = {}
        self._told: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, number: int, moments: Mapping[str, Moment]) -> None:
        """Adds one of the readings to the moments of layers, by module path."""
        reading = self.readings[number]
        text = {module: moment for module, moment in moments.items() if self.base.family.reads_text(module)}
        if text and number not in self._told:
            self._told[number] = self._of_text(reading.prompts)
        walked = {module: moment for module, moment in moments.items() if module not in text}
        if walked and number in self._points:  # walked for other layers already
            with self._watching(walked, reading, paired=False):
                for point in self._points[number]:
                    self._predict(*point)
        elif walked:
            with self._watching(walked, reading, paired=self.guidance != 1):
                self._points[number] = self._walk(number)
        for module, moment in moments.items():
            moment.close(reading, self._told[number] if module in text else None)

    def _of_text(self, prompts: Sequence[str]) -> Tensor:
        """The second moment of all tokens of the encoded prompts, which is the same for every layer that reads them."""
        parts: list[Tensor] = []
        for few in (prompts[i : i + 16] for i in range(0, len(prompts), 16)):
            told = self.base.encode(few)["prompt_embeds"]
            rows = told.flatten(0, 1).to(torch.promote_types(told.dtype, torch.float32))
            parts.append(rows.T @ rows / (len(rows) // len(few) * len(prompts)))
        return torch.stack(parts).sum(0)

    def _walk(self, number: int) -> list[tuple[Tensor, Tensor, Condition]]:
        base, reading = self.base, self.readings[number]
        shape, device = base.latent_shape(), base.model.device
        noise = torch.Generator().manual_seed(self.seed * 100_003 + number)
        nothing, order = base.encode([""]), turns(reading.trajectories, len(reading.prompts))
        points: list[tuple[Tensor, Tensor, Condition]] = []
        size = latents_per_batch(shape)
        for rows in (order[i : i + size] for i in range(0, len(order), size)):
            condition = base.encode([reading.prompts[i] for i in rows])
            null = pick(nothing, torch.zeros(len(rows), dtype=torch.long, device=device))
            start = torch.randn(len(rows), *shape, generator=noise).to(device)
            scheduler = base.family.scheduler(base.pipe, self.steps, shape, device)
            visited = walk(self._predict, scheduler, start, condition, null, guidance=self.guidance)
            points += [(point.x_t, point.t, condition) for point in visited]
        return points

    def _predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.evaluations += len(x_t)
        return self.base.predict(x_t, t, condition)

    @contextmanager
    def _watching(self, moments: Mapping[str, Moment], reading: Reading, *, paired: bool) -> Generator[None]:
        """Has what the layers are called with added to their moments.

        Args:
            moments: By module path.
            reading: Which is being read.
            paired: Whether the first half of every batch is the empty prompt's, which does not count.
        """
        whole = reading.trajectories * self.steps

        def add(moment: Moment, x: Tensor) -> None:
            own = x[len(x) // 2 :] if paired else x
            moment.add(own, len(own) / whole)

        layers = dict(self.base.model.named_modules())
        with ExitStack() as hooks:
            for module, moment in moments.items():
                hook = layers[module].register_forward_pre_hook(lambda _, args, moment=moment: add(moment, args[0]))
                hooks.callback(hook.remove)
            yield
