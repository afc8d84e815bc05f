"""Work, the pace of a machine on a model, and what both come to."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from esd_lora.bases.base import Base

_TEXTS = 16  # that are encoded to see how long one takes
_REPEATS = 3
_ENOUGH = 2.0  # seconds of one kind of work, and a quarter of that is too little
_GIB = 2**30


class Work(NamedTuple):
    """What there is to do."""

    texts: int = 0
    """Prompts to encode."""
    evaluations: int = 0
    """Latents through the denoiser without gradients."""
    student_samples: int = 0
    """Latents through the student with gradients."""
    pictures: int = 0
    """Pictures to decode; their denoising counts as evaluations."""

    def plus(self, other: Work) -> Work:
        """Return both together."""
        return Work(*map(sum, zip(self, other, strict=True)))


class Pace(NamedTuple):
    """Seconds that one of each takes on this machine and model."""

    text: float = 0.0
    evaluation: float = 0.0
    student_sample: float = 0.0
    picture: float = 0.0

    def seconds(self, work: Work) -> float:
        """Return how long some work takes."""
        return sum(each * count for each, count in zip(self, work, strict=True))


class Estimate(NamedTuple):
    """What a run will take beside loading the base."""

    least: Work
    most: Work
    """Other than `least` only where the number of steps is left to a probe."""
    pace: Pace
    around: float
    """Seconds of what is neither encoding, nor denoising, nor decoding: layers solved in closed form, pictures scored."""
    memory: int | None
    """Bytes that the process (or the card) holds at most; `None` where the system does not tell."""
    eraser: int = 0
    """Bytes of the eraser's weights."""

    def seconds(self) -> tuple[float, float]:
        """Return how long the run takes at least and at most."""
        return self.around + self.pace.seconds(self.least), self.around + self.pace.seconds(self.most)

    def sentence(self) -> str:
        """Return time, and memory where it is known, in a sentence."""
        least, most = map(spell_time, self.seconds())
        time = most if least == most else f"{least} to {most}"
        memory = f"; at most {self.memory / _GIB:,.1f} GiB of memory" if self.memory else ""
        return f"About {time}, beside loading the base{memory}."

    def lines(self) -> list[str]:
        """Return the estimate as lines of text, a row for each kind of work."""
        names = ("texts to encode", "evaluations", "student samples", "pictures to decode")
        lines: list[str] = []
        for name, least, most, each in zip(names, self.least, self.most, self.pace, strict=True):
            if most:
                lines.append(f"{name:<20}{_span(least, most, ','):>18}   {_span(least * each, most * each, ',.1f')} s")
        if self.around:
            lines.append(f"{'all else':<20}{'':>18}   {self.around:,.1f} s")
        lines.append(f"{'in all':<20}{'':>18}   {_span(*self.seconds(), ',.1f')} s, beside loading the base")
        lines.append(f"{'memory':<20}{'':>18}   {f'{self.memory / _GIB:,.2f} GiB at most' if self.memory else 'not told here'}")
        if self.eraser:
            lines.append(f"{'eraser':<20}{'':>18}   {self.eraser / 1e6:,.2f} MB")
        return lines


def spell_time(seconds: float) -> str:
    """Return a time in words, as exactly as an estimate is: `20 seconds`, `3 minutes`, `2.5 hours`."""
    if seconds < 100:
        count = max(1, round(seconds))
        return f"{count} second{'s' * (count > 1)}"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def _span(least: float, most: float, form: str) -> str:
    low, high = format(least, form), format(most, form)
    return high if low == high else f"{low} to {high}"


def time_text(base: Base) -> float:
    """Return how long a text takes to encode."""
    prompts = [f"a photograph of {number}" for number in range(_TEXTS)]
    return clock(base, lambda: base.encode(prompts), _TEXTS)


def clock(base: Base, work: Callable[[], object], count: int) -> float:
    """Return how many seconds some work takes for each of `count` things, once it is warm: the median of a few times."""
    work()
    seconds: list[float] = []
    while len(seconds) < _REPEATS or sum(seconds) < _ENOUGH / 4:
        started = time.monotonic()
        work()
        if base.model.device.type == "cuda":
            torch.cuda.synchronize(base.model.device)
        seconds.append(time.monotonic() - started)
        if sum(seconds) > _ENOUGH:
            break
    return statistics.median(seconds) / count


def peak_memory(base: Base) -> int | None:
    """Return the most bytes that this process has held so far: of the card where the base is on one, else of the machine."""
    if base.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(base.model.device)
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
