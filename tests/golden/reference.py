"""The method written out a second time, from the papers alone: torch, float64, no code of the package.

ESD: Gandikota et al., *Erasing Concepts from Diffusion Models*, ICCV 2023, arXiv:2303.07345.
DDIM: Song et al., *Denoising Diffusion Implicit Models*, ICLR 2021, arXiv:2010.02502.
LoRA: Hu et al., arXiv:2106.09685. Adam: Kingma and Ba, arXiv:1412.6980.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Predict = Callable[[Mapping[str, Tensor], Tensor, int, Tensor], Tensor]
"""From weights that replace the model's own (by name), x_t [N, ...], t and a prompt's embedding [N, ...] to the noise."""


def esd_target(null: Tensor, concept: Tensor, anchor: Tensor, eta: float) -> Tensor:
    """Equation 5 of ESD, with the empty prompt's place in the first term taken by the anchor."""
    return anchor - eta * concept + eta * null


def ddim_timesteps(steps: int, trained: int = 1000, offset: int = 1) -> list[int]:
    """Stable Diffusion's "leading" grid: multiples of trained // steps, shifted by the offset, from the noisiest down."""
    return [i * (trained // steps) + offset for i in reversed(range(steps))]


def ddim_step(x_t: Tensor, noise: Tensor, t: int, earlier: int, alphas_cumprod: Tensor) -> Tensor:
    """Equation 12 of DDIM with sigma = 0. Its alpha is the cumulative product; before t = 0 it stays that of t = 0."""
    now = alphas_cumprod[t]
    then = alphas_cumprod[max(earlier, 0)]
    x_0 = (x_t - (1 - now).sqrt() * noise) / now.sqrt()
    return then.sqrt() * x_0 + (1 - then).sqrt() * noise


def guided_walk(
    predict: Callable[[Tensor, int, Tensor], Tensor],
    noise: Tensor,
    prompt: Tensor,
    null: Tensor,
    alphas_cumprod: Tensor,
    *,
    steps: int,
    guidance: float,
) -> list[tuple[Tensor, int]]:
    """Every (x_t, t) of a trajectory from pure noise under classifier-free guidance."""
    x_t, points = noise, []
    for t in ddim_timesteps(steps):
        points.append((x_t, t))
        unprompted, prompted = predict(x_t, t, null), predict(x_t, t, prompt)
        guided = (1 - guidance) * unprompted + guidance * prompted
        x_t = ddim_step(x_t, guided, t, t - 1000 // steps, alphas_cumprod)
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

    def __call__(self, x_t: Tensor, t: int, text: Tensor) -> Tensor:
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
    concept: Tensor,
    null: Tensor,
    alphas_cumprod: Tensor,
    *,
    trajectory_steps: int,
    guidance: float,
    eta: float,
    lr: float,
) -> list[float]:
    """The paper's loop: for each draw of noise and stop, one partial walk by the student and one step; the losses."""
    losses = []
    for noise, stop in draws:
        with torch.no_grad():
            walked = guided_walk(student, noise, concept, null, alphas_cumprod, steps=trajectory_steps, guidance=guidance)
            x_t, t = walked[stop]
            unprompted = student.predict(student.frozen, x_t, t, null)
            target = esd_target(unprompted, student.predict(student.frozen, x_t, t, concept), unprompted, eta)

        def loss(x_t: Tensor = x_t, t: int = t, target: Tensor = target) -> Tensor:
            return ((student(x_t, t, concept) - target) ** 2).mean()

        losses.append(student.learn(loss, lr))
    return losses


def cosine(lr: float, step: int, steps: int) -> float:
    """Falls from `lr` at step 0 towards a tenth of it."""
    return lr * (0.55 + 0.45 * math.cos(math.pi * step / steps))
