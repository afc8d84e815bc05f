"""What is seen of the work: stages, bars whose estimates mean something, and a clock where nothing else is."""

from __future__ import annotations

import io
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tqdm.auto import tqdm

from esd_lora import bars
from esd_lora.bars import Bar, Pulse, lines_between_bars, undisturbed, watchable, watched
from esd_lora.cli.printing import say
from esd_lora.progress import Advance, advance, shown_by, stage
from esd_lora.recipe_files import load_recipe
from esd_lora.step_bar import StepBar
from esd_lora.trajectory import walk


class Terminal(io.StringIO):
    """A standard error that people look at."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return a terminal that stands in the place of standard error; no fixture, as pytest has its own there in each phase."""
    terminal = Terminal()
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test moves by hand."""
    hand = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(bars.time, "monotonic", lambda: hand.now)
    return hand


class Heard:
    """A display that remembers what it heard."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float | None, str]] = []
        self.done: dict[str, float] = {}

    @contextmanager
    def __call__(self, desc: str, total: float | None, unit: str) -> Generator[Advance]:
        self.stages.append((desc, total, unit))
        self.done[desc] = 0

        def further(units: float) -> None:
            self.done[desc] += units

        yield further


def test_nobody_hears_of_a_stage_unless_a_display_is_given() -> None:
    heard = Heard()
    with stage("unheard"):
        advance()
    with shown_by(heard), stage("outer", 4, "unit"):
        advance()
        with stage("inner"):
            advance(2)
        with shown_by(None), stage("hidden"):
            advance(100)
        advance()
    advance(7)
    assert heard.stages == [("outer", 4, "unit"), ("inner", None, "it")]
    assert heard.done["inner"] == 2
    assert heard.done["outer"] == 2 + 100, "what nobody shows counts where it is done"


def test_every_point_of_a_walk_counts() -> None:
    class Scheduler:
        timesteps = torch.arange(5)

        def step(self, prediction: torch.Tensor, _t: object, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(prev_sample=x - prediction)

    heard = Heard()
    condition = {"prompt_embeds": torch.zeros(3, 1)}
    with shown_by(heard), stage("walking", 15, "point"):
        walk(lambda x, *_: 0 * x, Scheduler(), torch.zeros(3, 2), condition, condition, guidance=3.0)
    assert heard.done == {"walking": 15}


def test_no_estimate_before_it_means_something(clock: SimpleNamespace) -> None:
    """The first unit pays for what is done once: 100 seconds, and 1 for each of the others."""
    with Bar(total=60, mininterval=0) as bar:
        assert bar.rate() == 0
        clock.now += 100
        bar.update()
        for _ in range(2):
            clock.now += 1
            bar.update()
        assert bar.rate() == 0, "too few to tell"
        assert "<?" in str(bar)
        clock.now += 1
        bar.update()
        assert bar.rate() == pytest.approx(1.0)
        assert "<00:56" in str(bar)


def spec_of(**settings: object) -> SimpleNamespace:
    return load_recipe("paper", {f"train.{name}": value for name, value in settings.items()}, concepts=["a cat"]).train


@pytest.mark.parametrize(
    ("refresh_every", "walks", "left"),
    [
        (100, [30.0], 18 * 1.0),  # walked once, before the first step: nothing of that is in what is left
        (10, [30.0], 18 * 1.0 + 2 * 30.0),  # two walks to come, each like the one before
        (1, [2.0], 18 * (1.0 + 2.0)),
    ],
)
def test_estimate_counts_walks_to_come(clock: SimpleNamespace, refresh_every: int, walks: list[float], left: float) -> None:
    state = SimpleNamespace(step=0, walks=[walks[0]])
    with StepBar(spec_of(steps=24, refresh_every=refresh_every), state, "erasing") as bar:
        clock.now += walks[0] + 5
        bar.update()
        for _ in range(5):
            if refresh_every == 1:
                state.walks.append(walks[0])
                clock.now += walks[0]
            clock.now += 1
            bar.update()
        assert bar.n == 6
        assert (bar.total - bar.n) / bar.rate() == pytest.approx(left)


def test_training_of_unknown_length_says_at_most() -> None:
    spec = load_recipe("fast", concepts=["a cat"]).train
    with StepBar(spec, SimpleNamespace(step=0, walks=[]), "erasing a cat") as bar:
        assert "0/450 at most" in str(bar)
        assert "at most ? left" in str(bar)


def test_stages_are_seen_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(bars, "_DELAY", -1.0)
    for stream, progress, seen in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with watched(progress), stage("loading \x1b[31mred", 3, "part"):
            advance()
        assert ("loading \\x1b[31mred" in stream.getvalue()) == seen
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert watchable()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not watchable()


def test_clock_stands_where_no_bar_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    pulse = Pulse("train: at work")
    pulse.look(pulse._began + 0.1)
    assert terminal.getvalue() == "", "not at once"
    pulse.look(pulse._began + 10)
    assert "train: at work ... 00:" in terminal.getvalue()
    Pulse.current = pulse
    try:
        with Bar(total=3, desc="painting"):
            assert pulse._clock is None, "a bar takes the place of the clock"
            before = terminal.getvalue()
            pulse.look(pulse._began + 20)
            assert "painting" in terminal.getvalue()[len(before) :], "drawn anew, so that time is seen to pass"
            assert "at work" not in terminal.getvalue()[len(before) :]
        with undisturbed():
            pulse.look(pulse._began + 1000)
            assert pulse._clock is None, "a person types"
    finally:
        pulse.hide()
        Pulse.current = None
    assert not list(tqdm._instances)


def test_lines_are_printed_between_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    with Bar(total=3, desc="painting"):
        say("warning: a line", err=True)
    text = terminal.getvalue()
    assert "\rwarning: a line\n" in text, "at the begin of a line of its own"
    with lines_between_bars():
        pass


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    say("plain", colour="green")
    assert capsys.readouterr().out == "plain\n", "no terminal"
    for variable, text in (("", "\x1b[32mgood\x1b[0m\n"), ("1", "good\n")):
        monkeypatch.setenv("NO_COLOR", variable)
        monkeypatch.setattr(sys, "stdout", Terminal())
        say("good", colour="green")
        assert sys.stdout.getvalue() == text
