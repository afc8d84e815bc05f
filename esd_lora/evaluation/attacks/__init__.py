"""Attacks: can what was erased be brought back? Each is one more model to paint with, the erased one with an attacker's help.

An attack succeeds on a picture where the detectors still see the concept, so its success rate stands beside the rates of the
base and of the erased model, on the same prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from esd_lora.registry import Registry

ATTACKS: Registry[Callable[..., Any]] = Registry(
    "attack",
    {
        "token-noise": "esd_lora.evaluation.attacks.words:token_noise",
        "negative-weight": "esd_lora.evaluation.attacks.weights:negative_weight",
        "fine-tune": "esd_lora.evaluation.attacks.weights:fine_tune",
        "textual-inversion": "esd_lora.evaluation.attacks.words:textual_inversion",
        "prompt-optimisation": "esd_lora.evaluation.attacks.words:prompt_optimisation",
        "latent-start": "esd_lora.evaluation.attacks.starts:latent_start",
    },
)
"""Name to a function of a `Victim` and the suite's settings."""
