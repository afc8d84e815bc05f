"""Evaluating end to end: painting and scoring go on where they stopped, and say the same twice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.cli import main
from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.erasers.measured import Interval, worst_line
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation import scoring
from esd_lora.evaluation.cases import read_cases
from esd_lora.evaluation.detectors.detector import NotRun, Picture, Score
from esd_lora.evaluation.evaluating import evaluate, score_pictures
from esd_lora.evaluation.report import attaching
from esd_lora.evaluation.report.attaching import attach
from esd_lora.evaluation.report.report import Report
from esd_lora.evaluation.suites.suite_files import Suite, load_suite
from esd_lora.formats.inspecting import inspect_file
from esd_lora.pictures import read_samples
from random_erasers import eraser_on

SUITE = """description: Brightness of toy pictures.
prompts:
  all:
    role: general
    templates: ["a photo of a {class}"]
    fill: {class: [cat, dog, "<script>x"]}
    label: "{class}"
    count: 2
detectors:
  bright: {kind: "test_evaluating:Brightness", threshold: 100}
  again: {kind: "test_evaluating:Brightness", threshold: 0, roles: [target]}
  absent: {kind: "test_evaluating:Absent"}
steps: 2
"""


OWN = ["test_evaluating:Brightness", "test_evaluating:Absent"]
"""The code that the suite names."""
ALLOWED = [word for name in OWN for word in ("--allow-code", name)]


class Brightness:
    """A detector that everyone can check: whether a picture's mean is above a threshold, and what it is."""

    scored = 0

    def __init__(self, threshold: float):
        self.threshold = threshold

    def record(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        Brightness.scored += len(pictures)
        means = [float(np.asarray(picture.image).mean()) for picture in pictures]
        return [Score({"bright": mean > self.threshold, "mean": mean}) for mean in means]


class Absent:
    def __init__(self):
        raise NotRun("no weights; give detectors.absent.path")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "toy.yaml"
    file.write_text(SUITE)
    return file


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(base: Base, suite: Path | Suite, out: Path, **settings: Any) -> Report:
    return evaluate(base, suite, out, progress=False, **{"allow_code": OWN, **settings})


def test_numbers_are_those_of_the_pictures(base: Base, suite: Path, tmp_path: Path, cat_dir: Path) -> None:
    out = tmp_path / "out"
    report = run(base, suite, out, erasers=[cat_dir])
    pictures = {path.parent.name + path.stem: np.asarray(Image.open(path)).mean() for path in out.rglob("*.png")}
    assert len(pictures) == 12
    assert pictures["baseall-00000"] != pictures["erasedall-00000"]
    target, general = report.variants["erased"]["target"], report.variants["erased"]["general"]
    cats = [pictures[f"erasedall-0000{i}"] for i in range(2)]
    assert target["bright.mean"].value == pytest.approx(np.mean(cats), abs=1e-5)
    assert target["bright.bright"].hits == sum(mean > 100 for mean in cats)
    assert target["again.bright"].hits == 2
    assert general["bright.mean"].of == 4
    assert "again.bright" not in general
    before = [pictures[f"baseall-0000{i}"] for i in range(2)]
    assert target["bright.mean"].difference is not None
    assert target["bright.mean"].difference.value == pytest.approx(np.mean(cats) - np.mean(before), abs=1e-5)
    assert report.not_run == {"absent": "no weights; give detectors.absent.path"}
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert lines[0]["prompt"] == "a photo of a cat"
    assert lines[0]["scores"]["bright"]["values"]["bright.mean"] == pytest.approx(pictures["baseall-00000"])
    record = report.record
    assert record["base"]["id"] == Path(base.id).name
    assert record["variants"]["erased"]["erasers"][0]["concepts"] == ["a cat"]
    assert record["sampler"] == {"scheduler": "DDIMScheduler", "steps": 2, "guidance": 7.5}
    assert record["detectors"]["bright"] == {"threshold": 100}
    assert record["code"] == sorted(OWN)
    assert "erased" in (out / "table.md").read_text()
    assert Report.load(out) == Report.load(out / "summary.json") == report
    assert (out / "summary.json").read_text("utf-8") == report.to_json()
    summary = json.loads(report.to_json())
    assert summary["stack"] == {}
    assert list(summary) == [
        *("suite", "concepts", "variants", "labels", "worst", "layout", "stack", "distances", "not_run", "record", "gates")
    ]


def test_a_report_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    for content in (None, "not JSON", "[]", '{"suite": "mine"}'):
        if content is not None:
            file.write_text(content)
        with pytest.raises(
            EsdLoraError, match=r"no report can be read from .*summary\.json .*Expected an evaluation's directory"
        ):
            Report.load(file if content is None else tmp_path)


def test_an_evaluation_that_measured_nothing_is_written(base: Base, tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(re.sub(r"  (bright|again): .*\n", "", SUITE))
    report = run(base, file, tmp_path / "out", limit=1)
    assert report.variants == {}
    assert list(report.not_run) == ["absent"]
    assert "no weights; give" in (tmp_path / "out" / "report.html").read_text()


def test_a_loaded_suite_is_recorded_by_its_name(base: Base, suite: Path, tmp_path: Path) -> None:
    """Else the same evaluation would be another one."""
    by_path = run(base, suite, tmp_path / "out", limit=1)
    assert by_path.suite == "toy"
    assert run(base, load_suite(suite, allow_code=OWN), tmp_path / "out", limit=1) == by_path


def test_two_runs_leave_the_same_files(base: Base, suite: Path, tmp_path: Path, cat_dir: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(base, suite, first, erasers=[cat_dir])
    run(base, suite, second, erasers=[cat_dir])
    assert files(first) == files(second)


def test_interrupted_run_goes_on(
    base: Base, suite: Path, tmp_path: Path, cat_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(base, suite, whole, erasers=[cat_dir])
    monkeypatch.setattr(scoring, "_BATCH", 4)  # so pairs are painted
    paint, painted = base.pipe.__class__.__call__, 0

    def counted(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal painted
        painted += len(kwargs["prompt"])
        if painted == 8:
            raise KeyboardInterrupt
        return paint(pipe, *args, **kwargs)

    monkeypatch.setattr(base.pipe.__class__, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run(base, suite, out, erasers=[cat_dir])
    assert len(list(out.rglob("*.png"))) == 6
    Brightness.scored = 0
    run(base, suite, out, erasers=[cat_dir])
    assert painted == 8 + 6, "only what was missing is painted"
    assert files(out) == files(whole)
    assert Brightness.scored == 12 + 4
    scores = out / "scores" / "bright.jsonl"
    lines = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(lines[:5]) + lines[5][:7])  # as if killed in the middle of a line
    run(base, suite, out, erasers=[cat_dir])
    assert Brightness.scored == 12 + 4 + 8
    assert files(out) == files(whole)


def test_another_evaluation_is_not_written_over(base: Base, suite: Path, tmp_path: Path, cat_dir: Path) -> None:
    out = tmp_path / "out"
    run(base, suite, out, erasers=[cat_dir])
    before = files(out)
    with pytest.raises(EsdLoraError, match="holds another evaluation: variants differ"):
        run(base, suite, out, erasers=[cat_dir], weights=[0.5])
    with pytest.raises(EsdLoraError, match="limit, cases differ"):
        run(base, suite, out, erasers=[cat_dir], limit=2)
    assert files(out) == before
    assert run(base, suite, out, limit=2, force=True).variants["base"]["general"]["bright.mean"].of == 2
    assert len(list(out.rglob("*.png"))) == 2
    photo = tmp_path / "mine" / "images" / "photo.png"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"mine")
    with pytest.raises(EsdLoraError, match="already exists and is not empty"):
        run(base, suite, tmp_path / "mine")
    run(base, suite, tmp_path / "mine", limit=1, force=True)
    assert photo.read_bytes() == b"mine", "a folder that no evaluation made"


def test_models_of_one_name_are_refused(base: Base, tiny_dir: Path, suite: Path, tmp_path: Path, cat_dir: Path) -> None:
    """Their pictures would lie in one folder, and the second's would be taken for painted."""
    other = shutil.copytree(tiny_dir, tmp_path / "other" / "erased")
    with pytest.raises(EsdLoraError, match="two models would be called 'erased'"):
        run(base, suite, tmp_path / "out", erasers=[cat_dir], against=[str(other)])
    with pytest.raises(EsdLoraError, match="two models would be called 'negative-prompt'"):
        run(base, suite, tmp_path / "out", concepts=["a cat"], against=["negative-prompt"] * 2)
    with pytest.raises(EsdLoraError, match="2 weights and 1 erasers: give a weight for each eraser"):
        run(base, suite, tmp_path / "out", erasers=[cat_dir], weights=[1.0, 2.0])
    assert not (tmp_path / "out").exists()


def test_each_gate_is_told_by_itself(base: Base, suite: Path, tmp_path: Path) -> None:
    gates = ["base.general.bright.mean>1", "base.general.bright.mean>1000"]  # one begins like the other
    with pytest.raises(EsdLoraError, match=r"failed:\n  base\.general\.bright\.mean>1: "):
        run(base, suite, tmp_path / "out", limit=2, fail_if=gates)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["gates"]
    assert [gate["failed"] for gate in found] == [True, False]


def test_other_threshold_looks_again_at_the_same_pictures(base: Base, suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(base, suite, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    second = run(base, suite, out, settings={"detectors.bright.threshold": 256})
    assert first.variants["base"]["general"]["bright.bright"].hits
    assert second.variants["base"]["general"]["bright.bright"].hits == 0
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}


def test_settings_of_a_detector_are_checked(base: Base, suite: Path, tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match=r"has no setting 'treshold' \(did you mean 'threshold'\?\)\. It takes: threshold\."):
        run(base, suite, tmp_path / "out", settings={"detectors.bright.treshold": 1})


def test_pictures_as_a_whole(base: Base, suite: Path, tmp_path: Path, cat_dir: Path) -> None:
    out, over = tmp_path / "out", {"distances": {"efficientnet": {}, "fid": {}}}
    report = run(base, suite, out, erasers=[cat_dir], settings=over)
    assert list(report.distances["efficientnet"]) == ["erased"]
    assert report.distances["efficientnet"]["erased"].value > 0
    assert report.distances["efficientnet"]["erased"].of == 4
    assert "set `path` to inception" in report.not_run["fid"]
    assert "Frechet distance on EfficientNet-Lite0 features" in (out / "report.html").read_text()
    features = list((out / "features").iterdir())
    assert len(features) == 2
    over["distances"]["efficientnet"]["reference"] = str(out / "images" / "base")
    beside = run(base, suite, out, erasers=[cat_dir], settings=over).distances["efficientnet"]
    assert beside["base"].value < beside["erased"].value, "photos that are the base's pictures and two more"
    over["distances"]["efficientnet"]["reference"] = str(tmp_path)
    with pytest.raises(EsdLoraError, match="has 0 pictures"):
        run(base, suite, out, erasers=[cat_dir], settings=over)


def test_members_alone_and_together(base: Base, suite: Path, tmp_path: Path, cat_dir: Path, car_dir: Path) -> None:
    out = tmp_path / "out"
    over = {"prompts.all.fill.class": ["cat", "car", "dog"], "prompts.all.label": "{class}", "layout": "erased-and-others"}
    report = run(base, suite, out, erasers=[cat_dir, car_dir, cat_dir], stack=True, settings=over)
    assert list(report.variants) == ["base", "erased", "1-a-cat", "2-a-car", "3-a-cat", "first-2"]
    found, labels = report.stack, report.labels
    assert found is not None
    assert found.metric == "bright.bright"
    assert [member.name for member in found.members] == ["a cat", "a car", "a cat"]
    assert found.members[1].alone == labels["car"]["2-a-car"]["bright.bright"]
    assert found.members[1].together == labels["car"]["erased"]["bright.bright"]
    assert found.matrix[0][1] == labels["cat"]["2-a-car"]["bright.bright"]
    assert [number and number.of for number in found.kept] == [2, 2, 2, 2]
    assert found.kept[2] is not None
    assert found.kept[2].hits == report.variants["first-2"]["general"]["bright.bright"].hits
    assert Report.load(out) == report
    assert list(report.layout) == ["1-a-cat", "2-a-car", "3-a-cat", "average"]
    row = report.layout["2-a-car"]
    rest = [labels[name]["2-a-car"]["bright.bright"] for name in ("cat", "dog")]
    assert row["erased class, base"] == labels["car"]["base"]["bright.bright"].value
    assert row["erased class, erased"] == labels["car"]["2-a-car"]["bright.bright"].value
    assert row["other classes, erased"] == sum(number.hits or 0 for number in rest) / sum(number.of for number in rest)
    assert "| 2-a-car |" in (out / "table.md").read_text().partition("| average |")[0]
    pictures = {path.relative_to(out / "images").as_posix(): path.read_bytes() for path in out.rglob("images/*/*.png")}
    assert pictures["1-a-cat/all-00000.png"] == pictures["3-a-cat/all-00000.png"] != pictures["first-2/all-00000.png"]
    with Image.open(out / "stack.png") as image:
        assert image.width > image.height
    assert "## Alone and together" in (out / "table.md").read_text()
    assert "<polyline" in (out / "report.html").read_text()
    with pytest.raises(EsdLoraError, match="two erasers or more, and 1 are given"):
        run(base, suite, tmp_path / "one", erasers=[cat_dir], stack=True)


def test_page_escapes_everything_and_asks_for_nothing(base: Base, suite: Path, tmp_path: Path) -> None:
    run(base, suite, tmp_path / "out", settings={"sensitive": True})
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;x" in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count('<label class="veil">') == 6
    assert "default-src 'none'" in page


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page in")
def test_page_opens_in_a_browser(base: Base, suite: Path, tmp_path: Path, cat_dir: Path) -> None:
    run(base, suite, tmp_path / "out", erasers=[cat_dir], settings={"sensitive": True})
    page, picture = tmp_path / "out" / "report.html", tmp_path / "page.png"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [*command, "--window-size=1200,900", f"--screenshot={picture}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    colours = Image.open(picture).convert("RGB").getcolors(1200 * 900)
    assert colours is not None
    assert len(colours) > 50, "pictures and bars are there, not an empty page"
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<img") == 12
    assert "&lt;script&gt;x" in done.stdout
    assert "<script" not in done.stdout


def ways_of(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "ways").rglob("images/*/*.png"))


def test_comparing_with_a_negative_prompt_and_another_base(base: Base, tiny_dir: Path, suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(base, suite, out, concepts=["a cat"], against=["negative-prompt", str(tiny_dir)])
    assert list(report.variants) == ["base", "negative-prompt", tiny_dir.name]
    pictures = {path.relative_to(out / "images").as_posix(): path.read_bytes() for path in out.rglob("*.png")}
    assert pictures["base/all-00000.png"] == pictures[f"{tiny_dir.name}/all-00000.png"]
    assert pictures["base/all-00000.png"] != pictures["negative-prompt/all-00000.png"]
    assert report.variants[tiny_dir.name]["general"]["bright.mean"].difference == Interval(value=0, low=0, high=0)
    ways = ["sld-max", "sld-weak", "black-list", "safety-checker"]
    blocked = run(base, suite, tmp_path / "ways", concepts=["a cat"], against=ways)
    assert "safety-checker" not in blocked.variants
    assert "the base has no directory safety_checker" in blocked.not_run["safety-checker"]
    assert blocked.record["variants"]["sld-max"]["concept"] == "cat"
    assert blocked.record["variants"]["sld-weak"]["warmup_steps"] == 1, "15 of 50 steps, of 2"
    found = {
        path.relative_to(tmp_path / "ways" / "images").as_posix(): np.asarray(Image.open(path)) for path in ways_of(tmp_path)
    }
    assert (found["black-list/all-00000.png"] == 0).all()
    assert (found["black-list/all-00002.png"] == found["base/all-00002.png"]).all()
    assert (found["sld-max/all-00002.png"] != found["base/all-00002.png"]).any()
    with pytest.raises(EsdLoraError, match=r"'negative-promt' \(did you mean 'negative-prompt'\?\)"):
        run(base, suite, tmp_path / "b", concepts=["a cat"], against=["negative-promt"])
    with pytest.raises(EsdLoraError, match="needs something to block"):
        run(base, suite, tmp_path / "c", against=["negative-prompt"])


def test_pictures_made_elsewhere(base: Base, suite: Path, tmp_path: Path, cat_dir: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    ours = run(base, suite, out, erasers=[cat_dir])
    shutil.copytree(out / "images", elsewhere)
    (elsewhere / "base" / "all-00000.png").rename(elsewhere / "base" / "00000_0.png")  # as ESD's scripts number them
    theirs = score_pictures(elsewhere, suite, tmp_path / "scored", concepts=["a cat"], allow_code=OWN, progress=False)
    assert theirs.variants == ours.variants
    (elsewhere / "erased" / "all-00003.png").unlink()
    with pytest.raises(EsdLoraError, match=r"erased lacks 1 of 6 pictures \(all-00003\.png\)"):
        score_pictures(elsewhere, suite, tmp_path / "more", concepts=["a cat"], allow_code=OWN, progress=False)


def test_damaged_picture_is_told_and_made_anew(base: Base, suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(base, suite, out)
    before, damaged = files(out), out / "images" / "base" / "all-00001.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    shutil.rmtree(out / "scores")
    with pytest.raises(EsdLoraError, match=r"all-00001\.png is damaged"):
        run(base, suite, out)
    damaged.unlink()
    run(base, suite, out)
    assert files(out) == before


def test_attached_numbers_travel_with_the_eraser(
    base: Base, suite: Path, tmp_path: Path, cat_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = shutil.copytree(cat_dir, tmp_path / "cat")
    before = Eraser.load(mine)
    report = run(base, suite, tmp_path / "out", erasers=[mine])
    attach(mine, tmp_path / "out")
    after = Eraser.load(mine)
    assert after.header.evaluation.variants == report.variants
    assert str(tmp_path) not in after.header.model_dump_json(exclude={"base", "recipes"})
    assert all((after.pairs[m].down == before.pairs[m].down).all() for m in before.pairs)
    assert "| target | erased | bright.mean |" in (mine / "README.md").read_text()
    assert "measured  suite toy, 20" in "\n".join(inspect_file(mine).lines())
    again = run(base, suite, tmp_path / "out", erasers=[mine])
    assert again == report, "numbers in the header change no tensor"
    assert not (mine / "samples").exists()
    attach(mine, report, tmp_path / "out")
    shown = read_samples(mine / "samples")
    assert [prompt for prompt, _, _ in shown] == ["a photo of a cat"] * 2 + ["a photo of a dog", "a photo of a <script>x"]
    with Image.open(shown[0][1]) as image, Image.open(tmp_path / "out" / "images" / "erased" / "all-00000.png") as painted:
        assert image.tobytes() == painted.tobytes()
    content = (mine / WEIGHTS_NAME).read_bytes()
    monkeypatch.setattr(
        attaching, "datetime", Mock(**{"datetime.now.return_value.date.return_value.isoformat.return_value": "2099"})
    )
    attach(mine, again)
    assert (mine / WEIGHTS_NAME).read_bytes() == content, "on another day the same numbers are no news"
    with pytest.raises(EsdLoraError, match=r"not of .* as it is now"):
        attach(mine, run(base, suite, tmp_path / "base", limit=1))
    with pytest.raises(EsdLoraError, match="at another strength"):
        attach(mine, run(base, suite, tmp_path / "half", erasers=[mine], weights=[0.5], limit=1))


@pytest.fixture(scope="module")
def emoji() -> Base:
    return load_base("emoji")


def test_built_in_suite_with_its_judge(emoji: Base, tmp_path: Path) -> None:
    wreck = eraser_on(emoji.model, ["mid_block.attentions.0.transformer_blocks.0.attn2.to_v"], "a cat", seed=1)
    settings: dict[str, Any] = {"erasers": [wreck], "weights": [30.0], "limit": 4}
    with pytest.warns(UserWarning, match="does not say which weights"):
        report = run(emoji, Path("emoji-object"), tmp_path / "out", **settings)
    base, erased = report.variants["base"], report.variants["erased"]
    assert base["target"]["accuracy"].value == 1
    assert base["general"]["accuracy"].value == 1
    assert erased["general"]["accuracy"].value < 1
    assert report.labels["cat"]["base"]["accuracy"].of == 8
    assert base["neighbour"]["accuracy"].of >= 4
    near = {case.prompt for case in read_cases(tmp_path / "out" / "cases.jsonl") if case.id.startswith("nearest")}
    assert "a dog" in near, "the text encoder puts it next to the cat"
    assert report.worst
    for lost in report.worst.values():
        assert lost["erased"]["accuracy"].value < lost["base"]["accuracy"].value
    line = worst_line(report.worst)
    assert line in (tmp_path / "out" / "table.md").read_text()
    assert line in (tmp_path / "out" / "report.html").read_text()


def invoke(*args: object) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_command(tiny_dir: Path, suite: Path, tmp_path: Path, cat_dir: Path) -> None:
    out, mine = tmp_path / "out", shutil.copytree(cat_dir, tmp_path / "cat")
    command = ["evaluate", mine, "--base", tiny_dir, "--suite", suite, "--device", "cpu", *ALLOWED, "-o", out]
    result = invoke(*command, "--attach", "--against", "negative-prompt", "--fail-if", "erased.bright.mean>300")
    assert result.exit_code == 0, result.output
    assert "| negative-prompt | bright.mean |" in (out / "table.md").read_text()
    assert re.search(r"^ prompts about it +bright .* base ", result.stdout, re.MULTILINE), (
        "the first rate, without its detector"
    )
    assert len(result.stdout.splitlines()) < 10
    assert f"look at {out / 'report.html'}" in result.stdout
    assert "not run: absent: no weights" in result.stderr
    assert f"allowed to run code of its own: {', '.join(OWN)}\n" in result.stderr
    assert json.loads((out / "evaluation.json").read_text())["code"] == sorted(OWN)
    assert Eraser.load(mine).header.evaluation is not None
    result = invoke(*command, "--against", "negative-prompt", "--fail-if", "erased.bright.mean>1")
    assert result.exit_code == 1
    assert "the evaluation is written, and failed:\n  erased.bright.mean>1: it is" in result.stderr
    assert json.loads((out / "summary.json").read_text())["gates"] == [{"gate": "erased.bright.mean>1", "failed": True}]


def test_faults_of_the_command(tiny_dir: Path, suite: Path, tmp_path: Path, cat_dir: Path) -> None:
    out = tmp_path / "out"
    for args, message in {
        ("--suite", suite): "give --base, or --score-only",
        ("--suite", suite, "--base", tiny_dir, "--score-only", tmp_path): "leave out erasers, --base and --against",
        ("--suite", suite, "--base", tiny_dir, "--attach"): "--attach writes into one eraser, and 0 are given",
        (cat_dir / WEIGHTS_NAME, "--suite", suite, "--base", tiny_dir, "--attach"): "is no directory of an eraser",
        ("--suite", suite, "--base", tiny_dir, "--prompts", suite, *ALLOWED): "this suite takes no prompt file",
        ("--suite", "nudty", "--base", tiny_dir): "no suite 'nudty'",
        ("--suite", suite, "--base", tiny_dir, "--fail-if", "accuracy", *ALLOWED): "expected VARIANT",
        (cat_dir, "--suite", suite, "--base", tiny_dir, "--concept", "zebra", *ALLOWED): "no prompt of this suite is about",
        ("--suite", suite, "--score-only", tmp_path / "none", *ALLOWED): "has no directories",
    }.items():
        result = invoke("evaluate", *args, "-o", out)
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert not out.exists(), message


@pytest.mark.parametrize("layout", [None, "erased-and-others", "ua-ira-cra"])
@pytest.mark.parametrize("stack", [False, True])
def test_no_detector_runs(base: Base, tmp_path: Path, cat_dir: Path, layout: str | None, stack: bool) -> None:
    """Pictures are painted, everything is written, and it says that nothing was measured."""
    prompts = {"all": {"role": "general", "templates": ["a {c}"], "fill": {"c": ["cat", "dog"]}, "label": "{c}", "count": 2}}
    suite = Suite(description="Nothing.", prompts=prompts, detectors={"clip": {}}, layout=layout, steps=1)
    members = [cat_dir, cat_dir] if stack else [cat_dir]
    own = Eraser.load(cat_dir).save(tmp_path / "own")
    report = run(base, suite, tmp_path / "out", erasers=[own] if not stack else members, stack=stack)
    assert report.variants == {}
    assert report.stack is None
    assert list(report.not_run) == ["clip"]
    table, page = ((tmp_path / "out" / name).read_text("utf-8") for name in ("table.md", "report.html"))
    for text in (table, page):
        assert "Nothing was measured: no detector ran." in text
        assert "no CLIP is given" in text
    assert "|" not in table  # no table without a row
    assert "<th>" not in page
    assert page.count("<img") == (16 if stack else 8)
    if not stack:
        attach(own, report)
        card = (own / "README.md").read_text("utf-8")
        assert "Nothing was measured: no detector ran." in card
    assert Report.load(tmp_path / "out") == report
    with pytest.raises(EsdLoraError, match=r"erased has no accuracy on target prompts; measured: none"):
        run(
            base, suite, tmp_path / "out", erasers=[own] if not stack else members, stack=stack, fail_if=["erased.accuracy>0.1"]
        )
