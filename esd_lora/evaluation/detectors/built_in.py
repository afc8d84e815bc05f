"""The built-in base's own judge, as a detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esd_lora import built_in
from esd_lora.evaluation.detectors import AND, Look, Score
from esd_lora.evaluation.judge import Judge
from esd_lora.files import hash_file


class BuiltIn:
    """Says whether the judge names what the prompt asks for.

    A label is an object, a style, or both ("cat + ink"); all of it must be right. `rest` is the same for what a target should
    show besides what was erased.

    Args:
        base: The built-in base whose judge it is.
        device: Where to run it.
    """

    def __init__(self, base: str = "emoji", device: str = "cpu"):
        self._base, self._judge = base, Judge(base, device)

    def record(self) -> dict[str, Any]:
        weights = built_in.BASES / self._base / "judge.safetensors"
        return {"judge": self._base, "weights_sha256": hash_file(weights)}

    def __call__(self, looks: Sequence[Look]) -> list[Score]:
        scores: list[Score] = []
        for look, verdict in zip(looks, self._judge([look.image for look in looks]), strict=True):
            seen = {verdict.object, verdict.style}
            wanted = {"accuracy": look.label, "rest": look.rest}
            values = {metric: seen.issuperset(names.split(AND)) for metric, names in wanted.items() if names}
            sure = [round(confidence, 4) for confidence in verdict[2:]]
            scores.append(Score(values, {"seen": f"{verdict.object}, {verdict.style}", "confidence": sure}))
        return scores
