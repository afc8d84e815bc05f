"""The built-in base's own judge, as a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esd_lora import bases
from esd_lora.evaluation.detectors import Look, Score
from esd_lora.evaluation.judge import Judge
from esd_lora.outputs import hash_file


class BuiltIn:
    """Says whether the judge names what the prompt asks for.

    A label is an object, a style, or both ("cat + ink"); all of it must be right.

    Args:
        settings: `base`, the built-in base whose judge it is.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self._base: str = settings.get("base", "emoji")
        self._judge = Judge(self._base, settings.get("device", "cpu"))

    def record(self) -> dict[str, Any]:
        weights = Path(bases.__file__).parent / self._base / "judge.safetensors"
        return {"judge": self._base, "weights_sha256": hash_file(weights)}

    def __call__(self, looks: Sequence[Look]) -> list[Score]:
        scores: list[Score] = []
        for look, verdict in zip(looks, self._judge([look.image for look in looks]), strict=True):
            wanted = (look.label or "").split(" + ")
            confidence = {verdict.object: verdict.object_confidence, verdict.style: verdict.style_confidence}
            details = {"seen": f"{verdict.object}, {verdict.style}", "confidence": [round(sure, 4) for sure in verdict[2:]]}
            scores.append(Score({"accuracy": all(name in confidence for name in wanted)}, details))
        return scores
