"""Evaluations as the page makes and shows them: command lines, what a suite takes, numbers, pairs of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from esd_lora.erasers.measured import TITLES, Number, worst_line
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.picture_files import open_painted
from esd_lora.evaluation.report.comparing import PAGE_NAME, REPORT_NAME, Painted, Pair, painted_otherwise
from esd_lora.evaluation.report.report import Report
from esd_lora.evaluation.suites.suite_files import load_suite, suite_names
from esd_lora.files import read_bounded
from esd_lora.pictures import data_uri
from esd_lora.ui.markup import Cell, Shown, figures, picture_rows, table
from esd_lora.ui.stacks import Weighted, check_weighted
from esd_lora.wording import in_one_line

if TYPE_CHECKING:
    from esd_lora.bases.base import Base
    from esd_lora.estimates.estimate import Estimate

Filter: TypeAlias = Literal["all", "judged differently", "painted differently"]
"""Which pairs of pictures are shown."""
UNLIKE = 0.02
"""Mean distance of pixels from which on two pictures count as painted differently: 0.02 is 5 of 255."""
PAIRS_AT_ONCE = 12
_MOST_OPENED = 2000  # pairs whose pictures are opened to see how far they are apart
_LARGEST_PAGE = 2**25  # bytes of a report's page that is shown in a frame; forty pictures of four models come to a third
_SIDE = 256  # pixels of a picture on the page
_DIFFERS = {"target": -1, "paraphrase": -1, "neighbour": 1, "general": 1}
"""Role to whether a rate there should be low or high after erasing."""


def suites() -> dict[str, str]:
    """Return the suites that ship with the package: name to what it measures."""
    return {name: load_suite(name).description for name in suite_names()}


def evaluate_command(
    erasers: Sequence[Weighted], base: str, suite: str, out: Path, *, limit: int | None = None, prompts: str | None = None
) -> list[str]:
    """Return the arguments of `esd-lora` that measure erasers on a base.

    Args:
        erasers: What is on together; none measures the base alone.
        base: The base.
        suite: Name of a suite, or its file.
        out: Directory of the evaluation; one that was stopped is gone on with.
        limit: Most pictures of each prompt set.
        prompts: File for a suite that takes one.

    Raises:
        EsdLoraError: If the choice of erasers is none, or there is no base or suite.
    """
    check_weighted(erasers, 0)
    if not base or not suite:
        raise EsdLoraError(f"nothing to measure {'with: choose a suite' if base else 'on: choose a base'}.")
    options = [f"--limit={limit}"] if limit else []
    options += [f"--prompts={prompts}"] if prompts else []
    return [
        "evaluate",
        *(eraser.argument() for eraser in erasers),
        f"--base={base}",
        f"--suite={suite}",
        *options,
        f"--out={out}",
    ]


class Size(NamedTuple):
    """What an evaluation takes."""

    pictures: int
    models: list[str]
    """Names of what paints them."""
    estimate: Estimate
    not_run: dict[str, str]
    """What will not be measured, and why."""

    def sentence(self) -> str:
        """Return it in a sentence or two."""
        return f"{self.pictures:,} pictures of {' and '.join(self.models)}. {self.estimate.sentence()}"


def measure_size(
    erasers: Sequence[Weighted], base: Base, suite: str, out: Path, *, limit: int | None = None, prompts: str | None = None
) -> Size:
    """Return what an evaluation takes on a loaded base: some pictures are painted and scored to time it.

    Raises:
        EsdLoraError: As `evaluate` does where something cannot be loaded or does not fit.
    """
    from esd_lora.erasers.stacking import Strength
    from esd_lora.estimates.pictures import estimate_evaluation
    from esd_lora.evaluation.preparing import prepare_evaluation

    check_weighted(erasers, 0)
    loaded = load_suite(suite, prompt_file=prompts)
    places, weights = [eraser.place for eraser in erasers], [Strength(eraser.weight) for eraser in erasers]
    prepared = prepare_evaluation(base, loaded, out, erasers=places, weights=weights, limit=limit)
    estimate = estimate_evaluation(prepared)
    models = [variant.name for variant in prepared.variants]
    return Size(estimate.most.pictures, models, estimate, prepared.plan.not_run)


def title_of(folder: Path, home: Path) -> str:
    """Return what an evaluation is called in a list: where it lies, its suite, what was erased, and its day.

    Args:
        folder: The evaluation.
        home: Below which it lies.
    """
    try:
        report = Report.load(folder)
    except EsdLoraError:
        return f"{folder.relative_to(home)}: damaged"
    day = datetime.fromtimestamp((folder / REPORT_NAME).stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    erased = ", ".join(report.concepts) or "the base alone"
    return in_one_line(f"{folder.relative_to(home)}: {erased}, {report.suite}, {day}")


def summary(report: Report) -> str:
    """Return the result of an evaluation in a few lines of HTML: a number for each role, what was hurt most."""
    rows: list[list[str | Cell]] = []
    last = "erased" if "erased" in report.variants else next(reversed(report.variants), "")
    for role, title in TITLES.items():
        for metric, number in list(report.variants.get(last, {}).get(role, {}).items())[:1]:
            before = report.variants.get("base", {}).get(role, {}).get(metric) if last != "base" else None
            beside = before.text().partition(" (")[0] if before else ""
            rows.append([f"{title} ({metric})", number.text(), beside, _verdict(role, number), str(number.of)])
    head = ["prompts", f"{last}, with its interval", "base", "beside the base", "pictures"]
    parts = [table(f"{', '.join(report.concepts) or 'The base alone'}, by {report.suite}", head, rows)] if rows else []
    lines = {"Hurt most": worst_line(report.worst).partition(": ")[2]} if report.worst else {}
    lines |= {f"Not run: {name}": reason for name, reason in report.not_run.items()}
    lines |= {} if rows else {"Measured": "nothing: no detector ran"}
    return "\n".join([*parts, *([figures(lines)] if lines else [])])


def _verdict(role: str, number: Number) -> str | Cell:
    """Return the difference from the base in words, and by colour, where its interval leaves out zero."""
    difference = number.difference
    if difference is None:
        return ""
    text = number.difference_text()
    if number.hits is None or difference.low <= 0 <= difference.high:
        return Cell(text if number.hits is None else f"{text}: no difference that is sure", "soft")
    better = difference.value * _DIFFERS[role] > 0
    return Cell(f"{text}: {'better' if better else 'worse'}", "good" if better else "bad")


def page_of(folder: Path) -> str:
    """Return the page that an evaluation wrote, to be shown in a frame.

    Raises:
        EsdLoraError: If there is none, or it is too large for one.
    """
    file = folder / PAGE_NAME
    try:
        return read_bounded(file, _LARGEST_PAGE).decode("utf-8", "replace")
    except OSError as error:
        raise EsdLoraError(f"there is no page {file} ({error.strerror}). Run the evaluation again.") from error


def is_sensitive(report: Report) -> bool:
    """Return whether pictures of an evaluation are blurred: so says its suite, or it is none of the package's own."""
    return report.suite not in suite_names() or load_suite(report.suite).sensitive


def chosen_pairs(
    pairs: Sequence[Pair], which: Filter, role: str = "", *, progress: Callable[[float], object] = lambda _: None
) -> list[Pair]:
    """Return the pairs of pictures that a filter lets through, those that are painted differently the most different first.

    Args:
        pairs: From `pair_pictures`.
        which: The filter.
        role: Only prompts of this role in the first evaluation; all unless given.
        progress: Called with the share that is done while pictures are compared.

    Raises:
        EsdLoraError: If a picture cannot be read, or there are too many to open all.
    """
    chosen = [pair for pair in pairs if role in ("", pair.first.role)]
    if which == "judged differently":
        return [pair for pair in chosen if pair.judged_differently]
    if which == "all":
        return chosen
    if len(chosen) > _MOST_OPENED:
        raise EsdLoraError(
            f"{len(chosen):,} pairs of pictures would be opened, more than {_MOST_OPENED:,}. Choose a kind of prompt, or"
            " another filter."
        )
    distances: list[float] = []
    for number, pair in enumerate(chosen):
        progress(number / len(chosen))
        distances.append(pair.distance())
    order = sorted(range(len(chosen)), key=lambda i: -distances[i])
    return [chosen[i] for i in order if distances[i] >= UNLIKE]


def show_pairs(pairs: Sequence[Pair], names: tuple[str, str], *, veiled: bool = False) -> str:
    """Return pictures of two erasers in HTML, with the base's between them, a row for each prompt and seed.

    Args:
        pairs: As many as are shown.
        names: What to call the first and the second.
        veiled: Whether pictures are blurred until they are clicked.

    Raises:
        EsdLoraError: If a picture cannot be read.
    """
    rows: list[tuple[str, str, list[Shown]]] = []
    for pair in pairs:
        columns = {names[0]: pair.first, "base": pair.base, names[1]: pair.second}
        roles = " and ".join(dict.fromkeys((pair.first.role, pair.second.role)))
        shown = [_shown(title, picture, pair.prompt) for title, picture in columns.items() if picture]
        rows.append((pair.prompt, f"seed {pair.seed}, {roles}", shown))
    return picture_rows(rows, veiled=veiled)


def _shown(title: str, picture: Painted, prompt: str) -> Shown:
    image = open_painted(picture.file)
    small = max(image.size) < _SIDE
    words = [
        f"{name}: {('no', 'yes')[value] if isinstance(value, bool) else f'{value:.3g}'}"
        for name, value in picture.values.items()
    ]
    caption = "; ".join([*([picture.seen] if picture.seen else []), *words[:2]])
    return Shown(title, data_uri(image, _SIDE), caption, f"{title}: {prompt}", small)


def differences(first: Path, second: Path) -> str:
    """Return a sentence about what differs between two evaluations beside their erasers; empty where nothing does.

    Raises:
        EsdLoraError: If one cannot be read.
    """
    words = painted_otherwise(Report.load(first), Report.load(second))
    return f"These two differ in {' and '.join(words)}, too: not all that differs is the erasers' doing." if words else ""
