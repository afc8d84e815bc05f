"""DDIM on any grid of timesteps.

diffusers' own DDIM steps by a constant number of timesteps, which is not what lies between two points of a grid that is spaced
otherwise (LCM's 999, 759, 499, 259): `x_t` would be of another noise level than the `t` that goes with it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor


class GridDDIM:
    """DDIM without noise between neighbours of a grid (Song et al., ICLR 2021, arXiv:2010.02502, equation 12 with sigma 0).

    Args:
        ddim: A diffusers `DDIMScheduler`, for its betas and for what the model predicts.
        timesteps: The grid, [S], falling.
    """

    def __init__(self, ddim: Any, timesteps: Tensor):
        self.timesteps = timesteps
        self._ddim = ddim
        self._next = dict(zip(timesteps.tolist(), timesteps.tolist()[1:], strict=False))

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        """Return `prev_sample`, latents at the grid's next point (as DDIM ends, after the last), and `pred_original_sample`."""
        t = int(timestep)
        alpha = self._ddim.alphas_cumprod[t]
        after = self._ddim.alphas_cumprod[self._next[t]] if t in self._next else self._ddim.final_alpha_cumprod
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        match self._ddim.config.prediction_type:
            case "v_prediction":  # Salimans and Ho, arXiv:2202.00512, appendix D
                x_0, noise = signal * sample - spread * model_output, signal * model_output + spread * sample
            case "sample":
                x_0, noise = model_output, (sample - signal * model_output) / spread
            case _:
                x_0, noise = (sample - spread * model_output) / signal, model_output
        return SimpleNamespace(prev_sample=after.sqrt() * x_0 + (1 - after).sqrt() * noise, pred_original_sample=x_0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return latents with as much noise as they have at `timesteps` [N]."""
        return self._ddim.add_noise(original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what a v model should predict for latents and noise at `timesteps` [N]."""
        return self._ddim.get_velocity(sample, noise, timesteps)
