"""Whether an eraser belongs to a base: refusals that name both sides, warnings where only measuring can tell."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError


def check_kind(eraser: Eraser, family: str, prediction_type: str | None, base: str) -> None:
    """Refuse an eraser of another family or prediction type; what is not known is not held against it.

    Raises:
        EsdLoraError: With what differs.
    """
    header = eraser.header
    for what, has, expected in (
        ("family", header.family, family),
        ("prediction type", header.prediction_type, prediction_type),
    ):
        if None not in (has, expected) and has != expected:
            raise EsdLoraError(
                f"eraser of {eraser.names} has {what} {has!r}, base {base!r} has {expected!r}."
                " Use it on the model it was trained for."
            )


def compare_weights(eraser: Eraser, base_hashes: Mapping[str, str], base: str) -> None:
    """Warn when the layers an eraser changes are not those it was trained on, or its header does not say.

    Args:
        eraser: With the hashes of its base's weights in the header.
        base_hashes: Module path to `eraser.hash_weight`, in the base, of the layers it changes or of some of them.
        base: What to call the base.
    """
    expected, layers = eraser.header.base_hashes, len(eraser.pairs)
    changed = sum(module in expected and expected[module] != digest for module, digest in base_hashes.items())
    if changed:
        warnings.warn(
            f"eraser of {eraser.names} was trained on other weights ({eraser.header.base!r}): {changed} of {len(base_hashes)}"
            f" layers compared differ in {base!r}. Measure what it erases here.",
            stacklevel=4,
        )
    if unknown := len(eraser.pairs.keys() - expected.keys()):
        imported = any(origin.how == "imported" for origin in eraser.header.origins)
        lora = " It comes from a LoRA file that says nothing of erasing, as a style's would." if imported else ""
        warnings.warn(
            f"eraser of {eraser.names} does not say which weights {unknown} of its {layers} layers were made for.{lora} Measure"
            f" what it erases on {base!r}.",
            stacklevel=4,
        )
