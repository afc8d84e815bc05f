"""The method written out a second time, from the papers alone: torch, float64, no code of the package.

ESD: Gandikota et al., *Erasing Concepts from Diffusion Models*, ICCV 2023, arXiv:2303.07345.
Flow matching: Esser et al., *Scaling Rectified Flow Transformers*, ICML 2024, arXiv:2403.03206.
DDIM: Song et al., *Denoising Diffusion Implicit Models*, ICLR 2021, arXiv:2010.02502.
LoRA: Hu et al., arXiv:2106.09685. Adam: Kingma and Ba, arXiv:1412.6980.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Text = Any  # what a prompt is told as; the reference only hands it on
Predict = Callable[[Mapping[str, Tensor], Tensor, float, Text], Tensor]
"""From weights that replace the model's own (by name), x_t [N, ...], t and a prompt to the prediction."""


def esd_target(null: Tensor, concept: Tensor, anchor: Tensor, eta: float) -> Tensor:
    """Equation 5 of ESD, with the empty prompt's place in the first term taken by the anchor."""
    return anchor - eta * concept + eta * null


def hinge(student: Tensor, anchor: Tensor, concept: Tensor, eta: float) -> Tensor:
    """GEM's hinge of two distances, times the distance there was to go; the second is rounded off at a thousandth of it."""
    to_anchor, to_concept, way = (((a - b) ** 2).mean() for a, b in ((student, anchor), (student, concept), (anchor, concept)))
    return way**0.5 * torch.clamp(to_anchor**0.5 - eta * (to_concept + 1e-6 * way) ** 0.5, min=0)


def ddpm_grid(steps: int, spacing: str, trained: int = 1000, offset: int = 1) -> list[int]:
    """The timesteps of noise and v models, noisiest first (table 2 of Lin et al., arXiv:2305.08891).

    "leading" are multiples of trained // steps, shifted by the offset; "trailing" count down from the last timestep;
    "linspace" are those of a solver, a line from the last timestep to 0, which it has no step from.
    """
    if spacing == "leading":
        return [i * (trained // steps) + offset for i in reversed(range(steps))]
    if spacing == "linspace":
        return [round(i * (trained - 1) / steps) for i in reversed(range(1, steps + 1))]
    return [round(trained - i * trained / steps) - 1 for i in range(steps)]


def scaled_linear(start: float = 0.00085, end: float = 0.012, trained: int = 1000) -> Tensor:
    """Stable Diffusion's cumulative alphas: betas are the square of a line between two square roots."""
    betas = torch.linspace(start**0.5, end**0.5, trained, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def linear(start: float = 0.0001, end: float = 0.02, trained: int = 1000) -> Tensor:
    """The cumulative alphas of DDPM (Ho et al., arXiv:2006.11239, section 4): betas are a line. PixArt-Sigma keeps them."""
    return (1 - torch.linspace(start, end, trained, dtype=torch.float64)).cumprod(0)


def ddim_step(x_t: Tensor, prediction: Tensor, t: int, earlier: int, alphas_cumprod: Tensor, kind: str) -> Tensor:
    """Equation 12 of DDIM with sigma = 0. Its alpha is the cumulative product; before t = 0 it stays that of t = 0.

    A v prediction is sqrt(alpha) noise - sqrt(1 - alpha) x_0 (Salimans and Ho, arXiv:2202.00512, appendix D).
    """
    now, then = alphas_cumprod[t], alphas_cumprod[max(earlier, 0)]
    if kind == "v_prediction":
        x_0 = now.sqrt() * x_t - (1 - now).sqrt() * prediction
        noise = now.sqrt() * prediction + (1 - now).sqrt() * x_t
    else:
        noise = prediction
        x_0 = (x_t - (1 - now).sqrt() * noise) / now.sqrt()
    return then.sqrt() * x_0 + (1 - then).sqrt() * noise


def shifted(sigma: float, shift: float) -> float:
    """Noise level moved towards noise for larger pictures: equation 23 of Esser et al., arXiv:2403.03206."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_grid(steps: int, shift: float, *, trained: int = 1000, from_one: bool, last: float = 0.0) -> list[float]:
    """Noise levels of a flow model, noisiest first, 0 at the end.

    Flux and Sana shift 1, 1 - 1/steps, ..., Wan a line from 1 to the last trained level. Stable Diffusion 3's scheduler shifts
    a line between the trained levels, which it had shifted once already.
    """
    if from_one:
        plain = [1 - (1 - last) * i / steps for i in range(steps)]
    else:
        high, low = shifted(1.0, shift), shifted(1 / trained, shift)
        plain = [high + (low - high) * i / (steps - 1) for i in range(steps)]
    return [*(shifted(sigma, shift) for sigma in plain), 0.0]


def flux_shift(patches: int) -> float:
    """Flux dev's shift: exp of a line through (256 patches, 0.5) and (4096, 1.15)."""
    return math.exp(0.5 + (patches - 256) * (1.15 - 0.5) / (4096 - 256))


def qwen_grid(steps: int, patches: int) -> list[float]:
    """Noise levels of Qwen-Image: shifted as Flux dev's, by 0.9 at 8192 patches, and stretched until the last is 0.02."""
    shift = math.exp(0.5 + (patches - 256) * (0.9 - 0.5) / (8192 - 256))
    plain = [shifted(1 - i / steps, shift) for i in range(steps)]
    return [*(1 - (1 - sigma) * (1 - 0.02) / (1 - plain[-1]) for sigma in plain), 0.0]


def flux2_shift(patches: int, steps: int) -> float:
    """Flux.2's shift up to 4300 patches: exp of a line through two points in steps, each on a line in patches."""
    few, many = 8.73809524e-05 * patches + 1.89833333, 0.00016927 * patches + 0.45666666  # at 10 and 200 steps
    return math.exp(few + (many - few) * (steps - 10) / 190)


class Sampler(NamedTuple):
    """A grid of times and the step between two of them."""

    times: list[float]
    step: Callable[[Tensor, Tensor, int], Tensor]
    """From x_t, the guided prediction and the number of the step to the next x_t."""


def ddim(steps: int, spacing: str, kind: str, alphas: Tensor | None = None, trained: int = 1000) -> Sampler:
    """The paper's sampler for noise and v models, with Stable Diffusion's cumulative alphas unless given."""
    alphas, grid = scaled_linear() if alphas is None else alphas, ddpm_grid(steps, spacing, trained)
    then = [*grid[1:], grid[-1] - trained // steps]
    return Sampler([float(t) for t in grid], lambda x, said, i: ddim_step(x, said, grid[i], then[i], alphas, kind))


def euler(sigmas: list[float]) -> Sampler:
    """Euler's method down the flow, dx / dsigma = noise - x_0, which is what flow models predict."""
    return Sampler([1000 * s for s in sigmas[:-1]], lambda x, said, i: x + (sigmas[i + 1] - sigmas[i]) * said)


def guided_walk(
    predict: Callable[[Tensor, float, Text], Tensor],
    noise: Tensor,
    prompt: Text,
    null: Text,
    sampler: Sampler,
    *,
    guidance: float,
) -> list[tuple[Tensor, float]]:
    """Every (x_t, t) of a trajectory from pure noise under classifier-free guidance."""
    x_t, points = noise, []
    for i, t in enumerate(sampler.times):
        points.append((x_t, t))
        unprompted, prompted = predict(x_t, t, null), predict(x_t, t, prompt)
        x_t = sampler.step(x_t, (1 - guidance) * unprompted + guidance * prompted, i)
    return points


class Student:
    """A frozen network with a LoRA, trained by Adam (its algorithm 1, with the authors' defaults).

    Args:
        predict: The network.
        frozen: Linear weights that get an update, by name.
        downs: Starting value of each update's `A`; its `B` starts at zero.
        scale: alpha / rank.
    """

    def __init__(self, predict: Predict, frozen: Mapping[str, Tensor], downs: Mapping[str, Tensor], scale: float):
        self.predict, self.frozen, self.scale, self.steps = predict, frozen, scale, 0
        self.a = dict(downs)
        self.b = {name: torch.zeros(frozen[name].shape[0], down.shape[0]).to(down) for name, down in downs.items()}
        self.moments = {(which, name): (0.0, 0.0) for which in "ab" for name in downs}

    def deltas(self) -> dict[str, Tensor]:
        """What training has added to each weight."""
        return {name: self.scale * self.b[name] @ self.a[name] for name in self.frozen}

    def __call__(self, x_t: Tensor, t: float, text: Text) -> Tensor:
        own = {name: self.frozen[name] + delta for name, delta in self.deltas().items()}
        return self.predict(own, x_t, t, text)

    def learn(self, loss: Callable[[], Tensor], lr: float) -> float:
        """One step down the loss's gradient; returns the loss before it."""
        factors = [(which, name, values) for which, values in (("a", self.a), ("b", self.b)) for name in values]
        for _, name, values in factors:
            values[name] = values[name].detach().requires_grad_()
        value = loss()
        gradients = torch.autograd.grad(value, [values[name] for _, name, values in factors])
        self.steps += 1
        for (which, name, values), g in zip(factors, gradients, strict=True):
            m, v = self.moments[which, name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            self.moments[which, name] = m, v
            m, v = m / (1 - 0.9**self.steps), v / (1 - 0.999**self.steps)
            values[name] = values[name].detach() - lr * m / (v.sqrt() + 1e-8)
        return value.item()


def esd(
    student: Student,
    draws: Sequence[tuple[Tensor, int]],
    concept: Text,
    null: Text,
    sampler: Sampler,
    *,
    guidance: float,
    eta: float,
    lr: float,
) -> list[float]:
    """The paper's loop: for each draw of noise and stop, one partial walk by the student and one step; the losses."""
    losses = []
    for noise, stop in draws:
        with torch.no_grad():
            walked = guided_walk(student, noise, concept, null, sampler, guidance=guidance)
            x_t, t = walked[stop]
            unprompted = student.predict(student.frozen, x_t, t, null)
            target = esd_target(unprompted, student.predict(student.frozen, x_t, t, concept), unprompted, eta)

        def loss(x_t: Tensor = x_t, t: float = t, target: Tensor = target) -> Tensor:
            return ((student(x_t, t, concept) - target) ** 2).mean()

        losses.append(student.learn(loss, lr))
    return losses


def cosine(lr: float, step: int, steps: int) -> float:
    """Falls from `lr` at step 0 towards a tenth of it."""
    return lr * (0.55 + 0.45 * math.cos(math.pi * step / steps))
