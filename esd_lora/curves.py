"""A plot of how a measured training went: `training.png`."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from esd_lora.calibration import DRIFT, gone_at
from esd_lora.erasers.header import Calibration, Reading

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 900, 460, 60, 70, 20, 50
_CURVES = (
    ("erased: push left, worst quarter", "residual_worst", "#b2182b"),
    ("erased: push left, mean", "residual", "#ef8a62"),
    ("kept: drift, mean", "drift", "#2166ac"),
    ("empty prompt: drift", "null_drift", "#777777"),
)
_LOWEST, _HIGHEST = -0.5, 1.05


def draw_curves(calibration: Calibration, title: str, *, anchored: bool) -> Image.Image:
    """Return the plot of a probe's readings over the steps, with the limits that a training steers by as dashed lines.

    Args:
        calibration: From the header of a measured eraser.
        title: Above the plot.
        anchored: Whether something of its own appears instead, which moves the limits.
    """
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    readings = [Reading(step=0, residual=1, residual_worst=1, drift=0, drift_worst=0, null_drift=0), *calibration.readings]
    readings = readings[1:] if readings[1:] and readings[1].step == 0 else readings  # the closed form is no untouched base
    last = max(readings[-1].step, 1)

    def place(step: float, value: float) -> tuple[float, float]:
        height = (min(max(value, _LOWEST), _HIGHEST) - _LOWEST) / (_HIGHEST - _LOWEST)
        return _LEFT + step / last * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - height * (_HEIGHT - _TOP - _BOTTOM)

    draw.text((_LEFT, 8), title, fill="black", font=ImageFont.load_default(15))
    for value in (-0.5, 0, 0.5, 1):
        draw.line([place(0, value), place(last, value)], fill="#dddddd")
        draw.text((8, place(0, value)[1] - 8), f"{value:.0%}", fill="black", font=font)
    for step in sorted({round(readings[-1].step * tenth / 10) for tenth in range(0, 11, 2)}):
        x, y = place(step, _LOWEST)
        draw.text((x - 10, y + 6), f"{step}", fill="black", font=font)
    draw.text((_WIDTH // 2 - 20, _HEIGHT - 22), "steps", fill="black", font=font)
    gone, gone_worst = gone_at(anchored=anchored)
    for value, colour in ((gone_worst, _CURVES[0][2]), (gone, _CURVES[1][2]), (DRIFT, _CURVES[2][2])):
        _dashed(draw, place(0, value), place(last, value), colour)
    for number, (label, field, colour) in enumerate(_CURVES):
        points = [place(r.step, getattr(r, field)) for r in readings]
        draw.line(points, fill=colour, width=3)
        for x, y in points:  # of a closed form that leaves nothing to train there is one
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        x, y = _LEFT + number % 2 * 300, 30 + number // 2 * 18
        draw.line([(x, y + 8), (x + 22, y + 8)], fill=colour, width=3)
        draw.text((x + 28, y), label, fill="black", font=font)
    return image


def _dashed(draw: ImageDraw.ImageDraw, start: Sequence[float], end: Sequence[float], colour: str) -> None:
    for x in range(int(start[0]), int(end[0]), 12):
        draw.line([(x, start[1]), (min(x + 6, end[0]), end[1])], fill=colour)
