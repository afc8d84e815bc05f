"""DDIM on any grid of timesteps.

diffusers' own DDIM steps by a constant number of timesteps, which is not what lies between two points of a grid that is spaced
otherwise (LCM's 999, 759, 499, 259): `x_t` would be of another noise level than the `t` that goes with it.
"""

from __future__ import annotations

from inspect import signature
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from esd_lora.errors import EsdLoraError, shortened


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


def make_ddim(scheduler: Any, steps: int, device: Any = None) -> Any:
    """Return DDIM with the betas and the grid of a base's own scheduler, its timesteps set.

    Args:
        scheduler: The base's.
        steps: Length of a whole trajectory.
        device: Device of the latents.

    Raises:
        EsdLoraError: If its noise levels are no schedule of betas that DDIM knows, or it was distilled at fewer than `steps`.
    """
    ddim = _ddim(scheduler)
    ddim.set_timesteps(steps, device=device)
    grid = _distilled_grid(scheduler, steps, device)
    grid = _solver_grid(scheduler, steps, device) if grid is None else grid
    grid = ddim.timesteps if grid is None else grid
    even = bool((grid[:-1] - grid[1:] == ddim.config.num_train_timesteps // steps).all())
    return ddim if even else GridDDIM(ddim, grid)


def _ddim(scheduler: Any) -> Any:
    """Return a DDIM scheduler with the betas of a base's own scheduler.

    Raises:
        EsdLoraError: If that has none, or of a kind that DDIM does not know.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    name, betas = type(scheduler).__name__, scheduler.config.get("beta_schedule")
    # Asked of the class: a configuration may carry a former scheduler's betas, and DDIM would put its own where there are none.
    if "beta_schedule" not in signature(type(scheduler)).parameters:
        reason = "whose noise levels are neither a schedule of betas nor a flow's"
    else:
        try:
            # Latents lie outside [-1, 1]: DDIM's default of clipping is for pixels.
            return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
        except NotImplementedError:
            reason = f"whose betas are {shortened(repr(betas))}"
    raise EsdLoraError(
        f"the base's scheduler is {shortened(name)}, {reason}: training points drawn by DDIM would have the wrong noise. Take a"
        " base with linear, scaled_linear or squaredcos_cap_v2 betas (Stable Diffusion 1, 2 or XL) or a flow."
    )


def _distilled_grid(scheduler: Any, steps: int, device: Any) -> Tensor | None:
    """Return the timesteps [S] of a sampler of distilled models (LCM, TCD), which are some of those that it was distilled at.

    The spacing that its configuration names, if any, is not what it samples by. `None` for every other sampler.
    """
    if "original_inference_steps" not in signature(type(scheduler)).parameters:
        return None
    distilled_at = scheduler.config.original_inference_steps
    if steps > distilled_at:
        raise EsdLoraError(
            f"the base was distilled at {distilled_at} timesteps, and a trajectory of {steps} steps visits more. Walk"
            f" {distilled_at} steps or fewer, 4 as a rule (-s train.trajectory_steps=4)."
        )
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(steps, device=device)
    return own.timesteps


def _solver_grid(scheduler: Any, steps: int, device: Any) -> Tensor | None:
    """Return the timesteps [S] of a solver of some order (DPM-Solver, UniPC, DEIS), which ends where DDIM has a step to go.

    `None` for every other sampler, and for grids with fewer timesteps than steps.
    """
    if "solver_order" not in signature(type(scheduler)).parameters:
        return None
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(steps, device=device)
    falls = len(own.timesteps) == steps and bool((own.timesteps[1:] < own.timesteps[:-1]).all())
    return own.timesteps if falls else None
