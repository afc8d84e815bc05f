"""The bar of a training: its estimate counts the walks of trajectories that are still to come."""

from __future__ import annotations

from esd_lora.bars import Bar
from esd_lora.recipe import AUTO, TrainSpec
from esd_lora.train_state import TrainState
from esd_lora.wording import printable


class StepBar(Bar):
    """A bar of steps, whose estimate counts the walks of trajectories that are still to come.

    Args:
        spec: Says how many steps there are, and after how many trajectories are walked.
        state: Knows how long walks took.
        desc: Label.
    """

    def __init__(self, spec: TrainSpec, state: TrainState, desc: str):
        self._spec, self._state, self._walked = spec, state, 0
        form = "{desc}: {n_fmt}/{total_fmt} at most |{bar}| {elapsed}, at most {remaining} left{postfix}"
        super().__init__(
            total=spec.most_steps,
            initial=state.step,
            desc=printable(desc),
            unit="step",
            bar_format=form if spec.steps == AUTO else None,
        )

    def update(self, n: float | None = 1) -> bool | None:
        """Count a step."""
        if self._first is None:
            self._walked = len(self._state.walks)  # what was walked before the first step ended is in no estimate
        return super().update(n)

    def rate(self) -> float:
        """Return the steps in a second from now on, 0 while there are too few to tell."""
        plain = super().rate()
        left = (self.total or 0) - self.n
        if not plain or left <= 0 or self._first is None:
            return plain
        walks, units = self._state.walks, self.n - self._first[0]
        step = max(units / plain - sum(walks[self._walked :]), 0) / units
        every = self._spec.walk_every
        to_come = -(-self.total // every) - -(-self.n // every)
        return left / (left * step + to_come * sum(walks) / len(walks)) if step or to_come else plain
