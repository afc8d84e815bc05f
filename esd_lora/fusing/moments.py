"""Second moments of what the layers of a base read under given prompts, on short trajectories.

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
from esd_lora.lessons import take_turns
from esd_lora.seeds import step_generator
from esd_lora.trajectory import Condition, in_float64, latents_per_batch, pick, walk

_ROWS = 128
"""Pixels or tokens of one latent that count; patches of a convolution overlap, so fewer of them."""


class PromptGroup(NamedTuple):
    """Prompts that have a second moment of their own, and how it counts."""

    prompts: Sequence[str]
    trajectories: int
    """Number of trajectories, the prompts taking turns."""
    weight: float = 1.0
    """Weight of the second moment in the sum of all."""
    member: int | None = None
    """Number of the update that the prompts belong to, if they belong to one."""


def spread(count: int, most: int, generator: torch.Generator) -> Tensor:
    """Return up to `most` of `count` places, one drawn from each of as many equal parts; all of them if there are no more.

    A fixed distance between them would not do: tokens are a picture row by row, and every 32nd of 64 x 64 lies in one of two
    columns. Neighbours are alike, so a place from each part says more than places drawn from the whole.
    """
    if count <= most:
        return torch.arange(count)
    return ((torch.arange(most) + torch.rand(most, generator=generator)) * count / most).long().clamp_max(count - 1)


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
        self.total = torch.zeros(inputs, inputs, device=device, dtype=dtype)
        """The weighted sum of all groups' second moments, [inputs, inputs]."""
        self.downs = {i: in_float64(down.flatten(1).to(device)) for i, down in downs.items()}
        """Number to `down`, [rank, inputs]."""
        self.products: dict[int, Tensor] = {}
        """Number i to `down_i G_i`, [rank, inputs], with the second moment of i's own prompts."""
        self._current: Tensor | None = None
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor, share: float) -> None:
        """Add a share of the current group's second moment: `x` [N, ...] as the layer gets it."""
        most = _ROWS
        if isinstance(self.layer, nn.Conv2d):
            kernel = self.layer
            x = nn.functional.unfold(x, kernel.kernel_size, kernel.dilation, kernel.padding, kernel.stride).mT  # type: ignore[arg-type]
            most //= math.prod(kernel.kernel_size)
        elif x.dim() == 2:
            x = x[:, None]
        x = x[:, spread(x.shape[1], most, self._generator).to(x.device)]
        rows = x.reshape(-1, x.shape[-1]).to(self.total)
        if self._current is None:
            self._current = torch.zeros_like(self.total)
        self._current.addmm_(rows.T, rows, alpha=share / len(rows))

    def close(self, group: PromptGroup, second: Tensor | None = None) -> None:
        """End one group.

        Args:
            group: The group whose inputs were added.
            second: Its second moment, [inputs, inputs], if that is known already; otherwise what was added since the last.
        """
        current = self._current if second is None else second.to(self.total)
        assert current is not None, "nothing was added"
        if group.member in self.downs:
            self.products[group.member] = self.downs[group.member] @ in_float64(current)
        self.total.add_(current, alpha=group.weight)
        if self._current is not None:
            self._current.zero_()


class MomentCollector:
    """Collects second moments of layers while the base denoises under groups of prompts.

    Args:
        base: The loaded base.
        groups: The groups of prompts.
        steps: Points of a trajectory.
        guidance: Classifier-free guidance of the trajectories; what is read there for the empty prompt does not count.
        seed: Seed of the noise.
    """

    def __init__(self, base: Base, groups: Sequence[PromptGroup], *, steps: int, guidance: float, seed: int):
        self.base, self.groups = base, groups
        self.steps, self.guidance, self.seed = steps, guidance, seed
        self.evaluations = 0
        """Latents through the denoiser so far; a guided pair counts 2."""
        self._points: dict[int, list[tuple[Tensor, Tensor, Condition]]] = {}
        self._text_moments: dict[int, Tensor] = {}

    @torch.no_grad()
    def collect(self, number: int, moments: Mapping[str, Moment]) -> None:
        """Add the inputs under one of the groups to the moments of layers, by module path."""
        group = self.groups[number]
        reads_text = {module for module in moments if self.base.family.reads_text(module)}
        if reads_text and number not in self._text_moments:
            self._text_moments[number] = self._text_moment(group.prompts)
        denoising = {module: moment for module, moment in moments.items() if module not in reads_text}
        if denoising and number in self._points:  # the trajectories of other layers
            with self._recording(denoising, group, paired=False):
                for point in self._points[number]:
                    self._predict(*point)
        elif denoising:
            with self._recording(denoising, group, paired=self.guidance != 1):
                self._points[number] = self._walk(number)
        for module, moment in moments.items():
            moment.close(group, self._text_moments[number] if module in reads_text else None)

    def _text_moment(self, prompts: Sequence[str]) -> Tensor:
        """Return the second moment of all tokens of the encoded prompts: the same for every layer that reads them."""
        parts: list[Tensor] = []
        for batch in (prompts[i : i + 16] for i in range(0, len(prompts), 16)):
            embeds = self.base.encode(batch)["prompt_embeds"]
            rows = embeds.flatten(0, 1).to(torch.promote_types(embeds.dtype, torch.float32))
            parts.append(rows.T @ rows / (len(rows) // len(batch) * len(prompts)))
        return torch.stack(parts).sum(0)

    def _walk(self, number: int) -> list[tuple[Tensor, Tensor, Condition]]:
        """Return the points of a group's trajectories, in batches."""
        base, group = self.base, self.groups[number]
        shape, device = base.latent_shape(), base.model.device
        noise = step_generator(self.seed, number)
        empty, prompts = base.encode([""]), take_turns(group.prompts, group.trajectories)
        points: list[tuple[Tensor, Tensor, Condition]] = []
        size = latents_per_batch(shape)
        for batch in (prompts[i : i + size] for i in range(0, len(prompts), size)):
            condition = base.encode(batch)
            null = pick(empty, torch.zeros(len(batch), dtype=torch.long, device=device))
            start = torch.randn(len(batch), *shape, generator=noise).to(device)
            scheduler = base.family.scheduler(base.pipe, self.steps, shape, device)
            visited = walk(self._predict, scheduler, start, condition, null, guidance=self.guidance)
            points += [(point.x_t, point.t, condition) for point in visited]
        return points

    def _predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.evaluations += len(x_t)
        return self.base.predict(x_t, t, condition)

    @contextmanager
    def _recording(self, moments: Mapping[str, Moment], group: PromptGroup, *, paired: bool) -> Generator[None]:
        """Add what the layers are called with to their moments, for the length of a `with` block.

        Args:
            moments: By module path.
            group: The group that is denoised under.
            paired: Whether the first half of every batch is the empty prompt's, which does not count.
        """
        whole = group.trajectories * self.steps

        def add(moment: Moment, x: Tensor) -> None:
            prompted = x[len(x) // 2 :] if paired else x
            moment.add(prompted, len(prompted) / whole)

        layers = dict(self.base.model.named_modules())
        with ExitStack() as hooks:
            for module, moment in moments.items():
                hook = layers[module].register_forward_pre_hook(lambda _, args, moment=moment: add(moment, args[0]))
                hooks.callback(hook.remove)
            yield
