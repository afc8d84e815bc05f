"""Schedulers that pictures may be painted with in the place of the base's own, by the names of diffusers' classes."""

from __future__ import annotations

import re
from typing import Any

from esd_lora.errors import EsdLoraError, did_you_mean

_NOISE = (
    *("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete"),
    *("HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "TCD", "UniPCMultistep"),
)
_FLOW = ("FlowMatchEulerDiscrete", "DPMSolverMultistep", "UniPCMultistep")
SCHEDULERS = tuple(dict.fromkeys((*_NOISE, *_FLOW)))
"""Names of all that there are: diffusers' classes without `Scheduler`. Those of flows are others than those of noise and v."""


def scheduler_name(name: str) -> str:
    """Return which of `SCHEDULERS` a name means, in any case, with or without `Scheduler`, `Discrete` and `Multistep`.

    Raises:
        EsdLoraError: If it means none, with the nearest.
    """
    known = {_key(known): known for known in SCHEDULERS}
    if _key(name) in known:
        return known[_key(name)]
    near = did_you_mean(name, SCHEDULERS) or did_you_mean(_key(name), known)
    raise EsdLoraError(f"unknown scheduler {name!r}{near}. Known: {', '.join(SCHEDULERS)}.")


def _key(name: str) -> str:
    return re.sub(r"scheduler|discrete|multistep|[^a-z0-9]", "", name.lower())


def schedulers_for(prediction_type: str) -> tuple[str, ...]:
    """Return those that fit a base that predicts `epsilon`, `v_prediction` or `flow`."""
    return _FLOW if prediction_type == "flow" else _NOISE


def make_scheduler(name: str, own: Any, prediction_type: str) -> Any:
    """Return a scheduler with the noise schedule of a base's own: its betas and what the model predicts, or its shift.

    Args:
        name: As for `scheduler_name`.
        own: The base's own scheduler.
        prediction_type: What the base predicts: `epsilon`, `v_prediction` or `flow`.

    Raises:
        EsdLoraError: If it is unknown, or not one for such a model.
    """
    import diffusers

    name, flow, fitting = scheduler_name(name), prediction_type == "flow", schedulers_for(prediction_type)
    if name not in fitting:
        what = "a flow" if flow else prediction_type.replace("_", " ")
        raise EsdLoraError(f"scheduler {name} is none for a base that predicts {what}. Those are: {', '.join(fitting)}.")
    kind = getattr(diffusers, f"{name}Scheduler")
    if not flow:
        return kind.from_config(own.config)
    shift = own.config.get("shift", own.config.get("flow_shift", 1.0))
    if name.startswith("FlowMatch"):
        return kind.from_config(own.config, shift=shift)
    return kind.from_config(own.config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
