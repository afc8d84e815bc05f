"""Registries: detectors, features and attacks by the names that suites use, imported when they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from inspect import signature
from typing import Any

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.registry import Registry

DETECTORS: Registry[Callable[..., Any]] = Registry(
    "detector",
    {
        "judge": "esd_lora.evaluation.detectors.judge:JudgeDetector",
        "nudenet": "esd_lora.evaluation.detectors.nudity:Nudity",
        "open-nsfw": "esd_lora.evaluation.detectors.nudity:OpenNsfw",
        "imagenet": "esd_lora.evaluation.detectors.classify:ImageNet",
        "classifier": "esd_lora.evaluation.detectors.classify:Classifier",
        "faces": "esd_lora.evaluation.detectors.faces:Faces",
        "ssim": "esd_lora.evaluation.detectors.similarity:Ssim",
        "lpips": "esd_lora.evaluation.detectors.similarity:Lpips",
        "clip": "esd_lora.evaluation.detectors.clip:ClipScore",
    },
)
"""Name to the class of a `Detector`; its constructor's keywords are its settings, `device` among them if it has a network."""
FEATURES: Registry[Callable[..., Any]] = Registry(
    "features",
    {
        "efficientnet": "esd_lora.evaluation.detectors.frechet:EfficientNetFeatures",
        "fid": "esd_lora.evaluation.detectors.frechet:InceptionFeatures",
    },
)
"""Name to the class of something with `record()` that maps N pictures to features [N, d]."""
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
"""Name to a function from a `Victim` and the suite's settings to a `Variant`."""


def build(
    registry: Registry[Callable[..., Any]],
    kind: str,
    settings: Mapping[str, Any],
    *arguments: Any,
    expected: type[Any],
    allow_code: Collection[str],
) -> Any:
    """Build a detector, features or an attack with a suite's settings.

    Args:
        registry: Where its class or function is.
        kind: Its name there.
        settings: Keyword arguments for it.
        arguments: Arguments before them, which are no settings.
        expected: Class or protocol of what it builds.
        allow_code: Every `module:attribute` that may be imported.

    Raises:
        NotRun: If it lacks a package or weights.
        EsdLoraError: If its code is not allowed or builds something else, or it takes no such setting or needs another.
    """
    builder = registry.get(kind, allow_code)
    try:
        parameters = signature(builder).parameters
    except ValueError as error:  # a builtin
        raise EsdLoraError(f"{registry.kind} {kind!r} does not say which settings it takes: {error}.") from error
    known = list(parameters)[len(arguments) :]
    for name in settings:
        if name not in known:
            raise EsdLoraError(
                f"{registry.kind} {kind!r} has no setting {name!r}{did_you_mean(name, known)}."
                f" It takes: {', '.join(known) or 'none'}."
            )
    try:
        signature(builder).bind(*arguments, **settings)
    except TypeError as error:
        raise EsdLoraError(f"{registry.kind} {kind!r} cannot be built with settings {dict(settings)}: {error}.") from error
    built = builder(*arguments, **settings)
    if not isinstance(built, expected):
        raise EsdLoraError(f"{registry.kind} {kind!r} builds a {type(built).__name__}, expected a {expected.__name__}.")
    return built
