"""Registries: detectors, features and attacks by the names that suites use, imported when they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from inspect import isclass, signature
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from esd_lora.errors import EsdLoraError, did_you_mean, shortened
from esd_lora.faults import faults_of
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
        EsdLoraError: If its code is not allowed or builds something else, or it takes no such setting, needs another, or
            takes one of another type.
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
    values = {name: _converted(builder, f"{registry.kind} {kind!r}", name, value) for name, value in settings.items()}
    try:
        signature(builder).bind(*arguments, **values)
    except TypeError as error:
        raise EsdLoraError(f"{registry.kind} {kind!r} cannot be built with settings {values}: {error}.") from error
    built = builder(*arguments, **values)
    if not isinstance(built, expected):
        raise EsdLoraError(f"{registry.kind} {kind!r} builds a {type(built).__name__}, expected a {expected.__name__}.")
    return built


def _converted(builder: Callable[..., Any], what: str, name: str, value: Any) -> Any:
    """Return a setting's value as the type that is written beside its name, as a recipe's fields are.

    Raises:
        EsdLoraError: If it is of another kind.
    """
    hint = get_type_hints(builder.__init__ if isclass(builder) else builder).get(name, Any)
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        message = faults_of(error)[0].message
        raise EsdLoraError(
            f"{what} takes another kind of value for {name}: {message}, found {shortened(repr(value))}."
        ) from error
