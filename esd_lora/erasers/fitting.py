"""Whether an eraser belongs to a base: refusals that name both sides, warnings where only measuring can tell."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError


def check_kind(eraser: Eraser, family: str, prediction_type: str | None, base: str) -> None:
    """Refuses an eraser of another family or prediction type; what is not known is not held against it.

    Raises:
        EsdLoraError: With what differs.
    """
    header = eraser.header
    for what, found, expected in (
        ("family", header.family, family),
        ("prediction type", header.prediction_type, prediction_type),
    ):
        if None not in (found, expected) and found != expected:
            raise EsdLoraError(
                f"eraser of {eraser.names} has {what} {found!r}, base {base!r} has {expected!r}."
                " Use it on the model it was trained for."
            )


def compare_weights(eraser: Eraser, found: Mapping[str, str], base: str) -> None:
    """Warns when the layers an eraser changes are not those it was trained on, or it does not say.

    Args:
        eraser: With the hashes of its base's weights in the header.
        found: Module path to `eraser.hash_weight` of the layers it changes, or of some, as they are in the base.
        base: What to call the base.
    """
    hashes, layers = eraser.header.base_hashes, len(eraser.pairs)
    changed = sum(module in hashes and hashes[module] != digest for module, digest in found.items())
    if changed:
        warnings.warn(
            f"eraser of {eraser.names} was trained on other weights ({eraser.header.base!r}): {changed} of {len(found)} layers"
            f" compared differ in {base!r}. Measure what it erases here.",
            stacklevel=4,
        )
    if unknown := len(eraser.pairs.keys() - hashes.keys()):
        warnings.warn(
            f"eraser of {eraser.names} does not say which weights {unknown} of its {layers} layers were made for. Measure what"
            f" it erases on {base!r}.",
            stacklevel=4,
        )
