"""Second moments of what the layers of a base read under given prompts, on short trajectories.

`G = mean x x^T`, over every point of a trajectory and every pixel or token there, is all that a least-squares problem on a
layer needs to know of the prompts. What is read under a group of prompts depends on these alone, to the last bit: they seed the
noise, and no other group shares their batches. So a group is taken off a sum as exactly as it was added.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import Eraser
from esd_lora.lessons import take_turns
from esd_lora.progress import stage
from esd_lora.seeds import text_seed
from esd_lora.trajectory import Condition, in_float64, latents_per_batch, pick, walk

_ROWS = 128
"""Pixels or tokens of one latent that count; patches of a convolution overlap, so fewer of them."""
TEXT = "prompt_embeds"
"""Name of the one moment of all layers that read the text itself; other layers' moments have the layer's path."""


class PromptGroup(NamedTuple):
    """Prompts that are read together: all of a member's, or one that is kept."""

    prompts: tuple[str, ...]
    trajectories: int
    """Number of trajectories, the prompts taking turns; at 0 only their text is read."""
    member: str | None = None
    """Key of the member whose prompts these are; `None` for what is kept."""


def spread(count: int, most: int, generator: torch.Generator) -> Tensor:
    """Return up to `most` of `count` places, one drawn from each of as many equal parts; all of them if there are no more.

    A fixed distance between them would not do: tokens are a picture row by row, and every 32nd of 64 x 64 lies in one of two
    columns. Neighbours are alike, so a place from each part says more than places drawn from the whole.
    """
    if count <= most:
        return torch.arange(count)
    return ((torch.arange(most) + torch.rand(most, generator=generator)) * count / most).long().clamp_max(count - 1)


class Moment:
    """Second moments of what layers read, summed over groups of prompts, and what members' updates make of their own.

    Args:
        layer: A linear or convolution; one output value of a convolution is made of an unfolded patch.
        paths: Path of the layer, or of all layers that read the same.
    """

    def __init__(self, layer: Any, paths: Sequence[str] = ()):
        self.layer, self.paths = layer, paths
        inputs = layer.weight[0].numel()
        self.members = in_float64(layer.weight.new_zeros(inputs, inputs, dtype=torch.float32))
        """The sum of all members' second moments `G_i`, [inputs, inputs], float64."""
        self.kept = torch.zeros_like(self.members)
        """The sum of the second moments of all kept prompts, [inputs, inputs], float64."""
        self.products: dict[tuple[str, str | None], Tensor] = {}
        """Path and key of member i to `down_i G_i`, [rank, inputs], float64, with the second moment of i's own prompts."""
        self._sum, self._sign = self.kept, 1
        self._updates: list[tuple[Tensor, Tensor]] = []
        self._generator = torch.Generator()

    def begin(self, group: PromptGroup, seed: int, downs: Mapping[str, Tensor] | None = None, sign: int = 1) -> None:
        """Begin a group: what is added until the next one begins counts for it.

        Args:
            group: The group.
            seed: Seed of the places that are read.
            downs: Path to `down` of the group's member, in layers that it has.
            sign: 1 to add the group, -1 to take off one that was added before.
        """
        self._sum, self._sign = (self.kept if group.member is None else self.members), sign
        self._generator.manual_seed(seed)
        self._updates = []
        for path, down in (downs or {}).items():
            factor = in_float64(down.flatten(1).to(self._sum.device))
            product = self.products.setdefault((path, group.member), torch.zeros_like(factor))
            self._updates.append((factor, product))

    def add(self, x: Tensor, share: float) -> None:
        """Add a share of the group's second moment: `x` [N, ...] as the layer gets it."""
        most = _ROWS
        if isinstance(self.layer, nn.Conv2d):
            kernel = self.layer
            x = nn.functional.unfold(x, kernel.kernel_size, kernel.dilation, kernel.padding, kernel.stride).mT  # type: ignore[arg-type]
            most //= math.prod(kernel.kernel_size)
        elif x.dim() == 2:
            x = x[:, None]
        x = x[:, spread(x.shape[1], most, self._generator).to(x.device)]
        self.add_rows(x.reshape(-1, x.shape[-1]), share)

    def add_rows(self, rows: Tensor, share: float) -> None:
        """Add a share of the group's second moment: every row of [N, inputs]."""
        rows = in_float64(rows).to(self._sum.device)
        weight = self._sign * share / len(rows)
        self._sum.addmm_(rows.T, rows, alpha=weight)
        for down, product in self._updates:
            product.addmm_(down @ rows.T, rows, alpha=weight)


class MomentCollector:
    """Collects second moments while the base encodes groups of prompts and denoises under them.

    Args:
        base: The loaded base.
        members: The members by key, for `down_i G_i`.
        steps: Points of a trajectory.
        guidance: Classifier-free guidance of the trajectories; what is read there for the empty prompt does not count.
        seed: Seed of the trajectories' noise, beside each group's prompts.
    """

    def __init__(self, base: Base, members: Mapping[str, Eraser], *, steps: int, guidance: float, seed: int):
        self.base, self.members = base, members
        self.steps, self.guidance, self.seed = steps, guidance, seed
        self.evaluations = 0
        """Latents through the denoiser so far; a guided pair counts 2."""
        self._empty: Condition | None = None

    @torch.no_grad()
    def collect(self, group: PromptGroup, moments: Mapping[str, Moment], sign: int = 1) -> None:
        """Add what is read under a group to moments, or take it off.

        Args:
            group: The group.
            moments: By name: `TEXT`, or the path of a layer.
            sign: 1 to add, -1 to take off.
        """
        member = self.members.get(group.member or "")
        pairs = member.pairs if member else {}
        seed = text_seed(self.seed, *group.prompts)
        for moment in moments.values():
            moment.begin(group, seed, {path: pairs[path].down for path in moment.paths if path in pairs}, sign)
        if TEXT in moments:
            self._read_text(group, moments[TEXT])
        denoising = {path: moment for path, moment in moments.items() if path != TEXT}
        if denoising and group.trajectories:
            points = group.trajectories * self.steps
            with stage("walking trajectories", points, "point"), self._recording(denoising, group):
                self._walk(group, torch.Generator().manual_seed(seed))

    def _read_text(self, group: PromptGroup, moment: Moment) -> None:
        """Add all tokens of the encoded prompts, as the layers read them."""
        encode, most = self.base.as_read(self.base.encode), self.base.family.encoded_at_once
        for batch in (group.prompts[i : i + most] for i in range(0, len(group.prompts), most)):
            moment.add_rows(encode(batch)[TEXT].flatten(0, 1), len(batch) / len(group.prompts))

    def _walk(self, group: PromptGroup, noise: torch.Generator) -> None:
        """Denoise on a group's trajectories, in batches."""
        base = self.base
        shape, device = base.latent_shape(), base.model.device
        self._empty = self._empty or base.encode([""])
        prompts = take_turns(group.prompts, group.trajectories)
        size = latents_per_batch(shape)
        for batch in (prompts[i : i + size] for i in range(0, len(prompts), size)):
            null = pick(self._empty, torch.zeros(len(batch), dtype=torch.long, device=device))
            start = torch.randn(len(batch), *shape, generator=noise).to(device)
            scheduler = base.family.scheduler(base.pipe, self.steps, shape, device)
            walk(self._predict, scheduler, start, base.encode(batch), null, guidance=self.guidance)

    def _predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.evaluations += len(x_t)
        return self.base.predict(x_t, t, condition)

    @contextmanager
    def _recording(self, moments: Mapping[str, Moment], group: PromptGroup) -> Generator[None]:
        """Add what the layers are called with to their moments, for the length of a `with` block.

        Args:
            moments: By module path.
            group: The group that is denoised under. With guidance the first half of every batch is the empty prompt's, which
                does not count.
        """
        whole, paired = group.trajectories * self.steps, self.guidance != 1

        def add(moment: Moment, x: Tensor) -> None:
            prompted = x[len(x) // 2 :] if paired else x
            moment.add(prompted, len(prompted) / whole)

        layers = dict(self.base.model.named_modules())
        with ExitStack() as hooks:
            for module, moment in moments.items():
                hook = layers[module].register_forward_pre_hook(lambda _, args, moment=moment: add(moment, args[0]))
                hooks.callback(hook.remove)
            yield
