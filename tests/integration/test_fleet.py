"""Fleets and releases on the built-in base: from a list of requests to a model, and what is done again and what is not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from esd_lora.fleet.jobs import Job, Plan, Settings
from esd_lora.fleet.records import last_record, sign
from esd_lora.fleet.release import ERASER, MEASURED, MODEL, PUBLISHED, release
from esd_lora.fleet.request import Request
from esd_lora.fleet.running import run_fleet
from esd_lora.fleet.status import LOGS, folder_of, read_status
from esd_lora.fleet.working import Outcome, Worker

CAT = Request(id="r1", concept="a cat", kind="object")
PIZZA = Request(id="r2", concept="a pizza", kind="object")
STYLE = Request(id="r3", concept="twemoji", kind="style", private=True)
SETTINGS = Settings("emoji", recipe=("instant",), overrides={"train.preview_every": 0}, suite_settings={"steps": 2}, limit=1)
"""Pictures of two steps show nothing, and are there as soon."""


class Here:
    """Works on jobs in this process, with the real worker, and remembers which."""

    def __init__(self) -> None:
        self.worked_on: list[str] = []

    def __call__(self, plan: Plan, out: Path) -> Here:
        self.worker = Worker(plan, out)
        return self

    def run(self, jobs: deque[Job], begun: Callable[[Job], None]) -> Iterator[Outcome]:
        while jobs:
            begun(job := jobs.popleft())
            self.worked_on.append(job.request.id)
            yield self.worker.work(job)


def released(listed: list[Request], out: Path, **options: object) -> list[str]:
    """Make a release, and return the ids that were worked on."""
    engine = Here()
    release(listed, Plan.of(listed, SETTINGS), out, engine, progress=False, **options)  # type: ignore[arg-type]
    return engine.worked_on


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a release's eraser."""
    return Eraser.load(out / PUBLISHED / ERASER).state_dict()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of three requests. Tests only read it."""
    out = tmp_path_factory.mktemp("release")
    assert released([CAT, PIZZA, STYLE], out) == ["r1", "r2", "r3"]
    return out


def test_a_release_has_its_model_card_and_manifest(first: Path) -> None:
    published = first / PUBLISHED
    record = last_record(first)
    assert record is not None
    assert record.number == 1
    assert {*record.requests} == {"r1", "r2", "r3"}
    assert {*record.figures} == {"object", "style"}
    assert all({"left", "kept"} <= figures.keys() for figures in record.figures.values())
    assert (published / MODEL / "model_index.json").is_file()
    card = (published / "README.md").read_text()
    assert "added r1, r2, r3; withdrawn none" in card
    assert "| r1 | a cat | object |" in card
    assert "| r3 | r3 | style |" in card
    hashes = json.loads((published / "manifest.json").read_text())["sha256"]
    assert hashes.keys() == {
        file.relative_to(published).as_posix()
        for file in published.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    assert hashes["README.md"] == hashlib.sha256(card.encode()).hexdigest()


def test_a_private_name_is_in_nothing_that_is_published(first: Path) -> None:
    files = [
        file
        for file in (first / PUBLISHED).rglob("*")
        if file.is_file() and file.suffix in (".json", ".md", ".yaml", ".safetensors")
    ]
    own = [file for file in files if MODEL not in file.relative_to(first / PUBLISHED).parts or file.name == "README.md"]
    model = [file for file in files if file.name == "diffusion_pytorch_model.safetensors" and "unet" in file.parts]
    assert own
    assert model
    for file in (*own, *model):
        head = file.read_bytes()
        if file.suffix == ".safetensors":
            head = head[: 8 + int.from_bytes(head[:8], "little")]
        assert b"twemoji style" not in head, file
        assert b'"twemoji"' not in head, file


def test_what_stands_is_not_done_again(first: Path, tmp_path: Path) -> None:
    out = shutil.copytree(first, tmp_path / "again")
    before = {file: file.stat().st_mtime_ns for file in (out / PUBLISHED).rglob("*") if file.is_file()}
    assert released([CAT, PIZZA, STYLE], out) == []
    assert before == {file: file.stat().st_mtime_ns for file in (out / PUBLISHED).rglob("*") if file.is_file()}
    record = last_record(out)
    assert record is not None
    assert record.number == 1


@pytest.mark.slow
def test_a_stack_without_a_request_is_the_stack_that_never_had_it(first: Path, tmp_path: Path) -> None:
    out = shutil.copytree(first, tmp_path / "withdrawn")
    assert released([CAT, PIZZA.model_copy(update={"status": "withdrawn"}), STYLE], out) == []
    record = last_record(out)
    assert record is not None
    assert record.number == 2
    assert "withdrawn r2; made anew none" in (out / PUBLISHED / "README.md").read_text()
    never = tmp_path / "never"
    shutil.copytree(first / "fleet", never / "fleet")
    released([CAT, STYLE], never)
    ours, theirs = tensors(out), tensors(never)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6 * float(theirs[name].abs().max()))


def test_one_request_more_is_the_only_work(first: Path, tmp_path: Path) -> None:
    out = shutil.copytree(first, tmp_path / "more")
    fox = Request(id="r4", concept="a ghost", kind="object")
    assert released([CAT, PIZZA, STYLE, fox], out) == ["r4"]
    assert "added r4; withdrawn none; made anew none" in (out / PUBLISHED / "README.md").read_text()


def test_who_became_what_is_to_go_is_made_anew(first: Path, tmp_path: Path) -> None:
    out = shutil.copytree(first, tmp_path / "anchor")
    header = Eraser.load(folder_of(out / "fleet", "r1")).header
    anchor = dict(header.concepts[0].pairs)["a cat"]
    assert anchor
    also = Request(id="r5", concept=anchor, kind="object")
    assert sorted(released([CAT, PIZZA, STYLE, also], out)) == ["r1", "r5"]
    anchors = {text for _, text in Eraser.load(folder_of(out / "fleet", "r1")).header.concepts[0].pairs}
    assert not any(anchor.split()[-1] in text for text in anchors)


def test_a_gate_that_holds_keeps_the_release_back(first: Path, tmp_path: Path) -> None:
    out = shutil.copytree(first, tmp_path / "gate")
    before = {file: file.read_bytes() for file in (out / PUBLISHED).rglob("*") if file.is_file()}
    with pytest.raises(EsdLoraError, match=r"not released: base\.accuracy<2"):
        released([CAT, PIZZA], out, gates=["base.accuracy<2"])
    record = last_record(out)
    assert record is not None
    assert record.number == 1
    assert (out / MEASURED / "object" / "report.html").is_file()
    assert before == {file: file.read_bytes() for file in (out / PUBLISHED).rglob("*") if file.is_file()}
    assert released([CAT, PIZZA], out) == []
    assert "withdrawn r3" in (out / PUBLISHED / "README.md").read_text()


@pytest.mark.slow
def test_a_request_without_an_eraser_keeps_the_release_back(tmp_path: Path) -> None:
    nothing = Request(id="r6", concept="zzz", kind="object")
    with pytest.raises(EsdLoraError, match=r"1 of 2 requests have no eraser \(r6 refused: no prompt of this suite"):
        released([CAT, nothing], tmp_path)
    assert released([CAT, nothing], tmp_path, partial=True) == []
    record = last_record(tmp_path)
    assert record is not None
    assert {*record.requests} == {"r1"}


def test_a_second_recipe_is_tried_where_the_first_is_not_enough(tmp_path: Path) -> None:
    settings = SETTINGS._replace(second=("instant",), not_enough_if=("base.accuracy<2",))
    engine = Here()
    statuses = run_fleet([CAT], Plan.of([CAT], settings), tmp_path, engine, progress=False)
    assert statuses["r1"].state == "done"
    assert statuses["r1"].reason.startswith("base.accuracy<2: it is")


def test_what_breaks_is_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esd_lora.training.train", lambda *_, **__: 1 / 0)
    run_fleet([CAT], Plan.of([CAT], SETTINGS), tmp_path, Here(), attempts=2, progress=False)
    status = read_status(tmp_path, "r1")
    assert status is not None
    assert (status.state, status.attempts, status.reason) == ("failed", 2, "ZeroDivisionError: division by zero")
    assert "Traceback" in (tmp_path / LOGS / "r1.log").read_text()


@pytest.mark.slow
def test_the_command_line_runs_a_fleet_and_says_what_is_wrong(tmp_path: Path) -> None:
    listed = tmp_path / "requests.csv"
    listed.write_text("id,concept,kind\nr1,a cat,object\nr6,zzz,object\n")
    command = ["fleet", str(listed), "--base", "emoji", "-o", str(tmp_path / "out"), "--recipe", "instant", "--pictures", "1"]
    planned = CliRunner().invoke(main, [*command, "--dry-run", "--hourly", "2"])
    assert planned.exit_code == 0, planned.output
    assert "object: 2 requests" in planned.output
    assert "price: " in planned.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(main, [*command, "-s", "train.preview_every=0"])
    assert result.exit_code == 0, result.output
    assert "1 done, 1 refused" in result.output
    assert "r6 refused: no prompt of this suite is about what was erased (zzz)" in result.output
    assert (tmp_path / "out" / "fleet.html").is_file()


@pytest.mark.skipif(shutil.which("gpg") is None, reason="GnuPG is not installed")
def test_a_manifest_is_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("GNUPGHOME", str(home))
    make = ["gpg", "--batch", "--passphrase", "", "--quick-generate-key", "releases@example.org", "ed25519", "sign"]
    subprocess.run(make, check=True, capture_output=True)
    manifest, signature = tmp_path / "manifest.json", tmp_path / "manifest.json.asc"
    manifest.write_text("{}")
    sign(manifest, signature, "releases@example.org")
    verify = ["gpg", "--verify", str(signature), str(manifest)]
    assert subprocess.run(verify, check=False, capture_output=True).returncode == 0
    manifest.write_text("{ }")
    assert subprocess.run(verify, check=False, capture_output=True).returncode != 0
    with pytest.raises(EsdLoraError, match=r"GnuPG does not sign as 'nobody@example\.org'"):
        sign(manifest, tmp_path / "other.asc", "nobody@example.org")
