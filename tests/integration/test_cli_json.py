"""Every command's `--json`: one object on standard output, of the shape that docs/json.md says, and nothing else there."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import jsonschema
import pytest
from click.testing import CliRunner

import loopback_hub
from esd_lora.cli import main
from esd_lora.doctor import Finding
from esd_lora.erasers.eraser import Eraser
from esd_lora.fleet import release as releasing
from esd_lora.fleet.records import Entry, Record
from esd_lora.fleet.status import Status
from loopback_hub import LoopbackHub
from tiny import tiny_pipeline

PROJECT = Path(__file__).parents[2]
hub = loopback_hub.hub  # the fixture
json_page = SimpleNamespace(**runpy.run_path(str(PROJECT / "benchmarks" / "json_page.py")))
COMMANDS: dict[str, click.Command] = dict(json_page.commands())
QUICK = {"steps": 2, "trajectories": 2, "trajectory_steps": 2, "preserve_trajectories": 1, "preview_every": 0, "lr": 1e-3}
SETTINGS = " ".join(f"-s train.{key}={value}" for key, value in QUICK.items())
SUITE = """description: Sizes of toy pictures.
prompts: {all: {role: general, templates: ["a {class}"], fill: {class: [cat, dog]}, label: "{class}", count: 1}}
detectors: {}
steps: 2
"""
RUNS = {
    "train": f"train --concept @a_cat --base {{tiny}} {SETTINGS} --kohya -o {{out}}",
    "generate": "generate @a_cat @a_dog -n 2 --compare --base {tiny} --steps 2 --eraser {cat} -o {out}",
    "generate --dry-run": "generate @a_cat --base {tiny} --steps 2 --dry-run -o {out}",
    "stack": "stack {cat} {car}:0.5 --report -o {out}",
    "stack of a base": "stack {cat} {car} --base {tiny} --keep {keep} --keep-state -o {out}",
    "stack --dry-run": "stack {cat} {car} --dry-run -o {out}",
    "merge": "merge {cat} --base {tiny} -o {out}",
    "merge --verify": "merge {cat} --base {tiny} --verify -o {out}",
    "merge --dry-run": "merge {cat} --base {tiny} --dry-run -o {out}",
    "evaluate": "evaluate {cat} --base {tiny} --suite {suite} -o {out}",
    "inspect": "inspect {cat}",
    "inspect a stack": "inspect {manifest}",
    "diff": "diff {cat} {car}",
    "export": "export {cat} --layout kohya -o {out}.safetensors",
    "import": "import {kohya} -o {out}",
    "extract": "extract --base {tiny} --tuned {tuned} --rank 2 -o {out}",
    "catalog": "catalog --no-cache {erasers}",
    "recipes list": "recipes list",
    "recipes show": "recipes show sd/van-gogh",
    "recipes copy": "recipes copy fast -o {out}.yaml",
    "recipes check": "recipes check fast sd/van-gogh fuse harmonise concepts/tench",
    "recipes schema": "recipes schema",
    "requests add": "requests add {requests} -r {out}",
    "requests list": "requests list -r {registry}",
    "requests decide": "requests decide r2 -r {registry} --refuse --reason no",
    "requests withdraw": "requests withdraw r3 -r {registry}",
    "requests overdue": "requests overdue -r {registry}",
    "completion": "completion fish",
}
ELSEWHERE = {"push", "pull", "search", "fleet", "release", "demo", "doctor"}
"""Commands that have a test of their own below."""


def one_object(command: str, *words: object, code: int = 0) -> dict[str, Any]:
    """Run a command with `--json`, hold what it prints against the schema of its result, and return it."""
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == code, result.output
    printed = json.loads(result.stdout)
    jsonschema.validate(printed, json_page.schema_of(COMMANDS[command]))
    return printed


@pytest.fixture(scope="module")
def places(tiny_dir: Path, cat_dir: Path, car_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands are given."""
    folder = tmp_path_factory.mktemp("json")
    tuned = tiny_pipeline()
    tuned.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data.add_(0.1)
    tuned.save_pretrained(folder / "tuned")
    (folder / "keep").write_text("a house\na tree in the rain\n")
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "requests.csv").write_text("id,concept,kind,due\nr1,a cat,object,2020-01-01\nr2,a dog,object,\nr3,ink,style,\n")
    erasers = folder / "erasers"
    for source in (cat_dir, car_dir):
        shutil.copytree(source, erasers / source.name)
    run = CliRunner().invoke
    for words in (
        ["requests", "add", folder / "requests.csv", "-r", folder / "registry"],
        ["stack", erasers / "cat", erasers / "car", "-o", erasers / "both.yaml"],
        ["export", cat_dir, "--layout", "kohya", "-o", folder / "kohya.safetensors"],
    ):
        assert run(main, [*map(str, words)]).exit_code == 0
    named = {path.stem: path for path in folder.iterdir()}
    return {**named, "tiny": tiny_dir, "cat": cat_dir, "car": car_dir, "manifest": erasers / "both.yaml"}


def test_every_command_is_run() -> None:
    run = {name.partition(" --")[0].partition(" of ")[0].partition(" a ")[0] for name in RUNS}
    assert run | ELSEWHERE == COMMANDS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_command_prints_one_object_of_its_shape(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    named = {**places, "out": tmp_path / "out"}
    words = [word.format(**named).replace("@a_", "a ") for word in RUNS[name].split()]
    command = next(
        known for known in sorted(COMMANDS, key=len, reverse=True) if RUNS[name].startswith(f"{known} ") or RUNS[name] == known
    )
    printed = one_object(command, *words)
    assert printed
    if "--dry-run" in words:
        assert printed["lines"]
        assert not (tmp_path / "out").exists()
    for key in ("eraser", "out", "model", "file", "recipe", "page", "kohya"):
        if (
            "--dry-run" not in words
            and printed.get(key)
            and key in json_page.schema_of(COMMANDS[command]).get("properties", {})
        ):
            assert Path(printed[key]).exists(), key


def test_object_says_what_was_made(places: dict[str, Path], tmp_path: Path) -> None:
    painted = one_object(
        "generate",
        "generate",
        "a cat",
        "a dog",
        "-n",
        2,
        "--seed",
        5,
        "--compare",
        "--steps",
        2,
        "--base",
        places["tiny"],
        "-o",
        tmp_path / "p",
    )
    assert [(picture["prompt"], picture["seed"]) for picture in painted["pictures"]] == [
        ("a cat", 5),
        ("a cat", 6),
        ("a dog", 5),
        ("a dog", 6),
    ]
    assert all(Path(picture["file"]).is_file() for picture in painted["pictures"])
    assert painted["sheets"] == [str(tmp_path / "p" / "comparison.png")]
    made = one_object("stack", "stack", f"{places['cat']}:-1", places["car"], "-o", tmp_path / "stack")
    assert made["concepts"] == [{"name": "a cat", "weight": -1.0}, {"name": "a car", "weight": 1.0}]
    assert Eraser.load(made["eraser"]).names == ["a cat", "a car"]


@pytest.fixture
def ada(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The stand-in for the Hub, with somebody signed in."""
    hub.user("ada", "hf_ada_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_ada_secret")
    return hub


@pytest.mark.usefixtures("ada")
def test_hub(cat_dir: Path, tmp_path: Path) -> None:
    base = ["--base-model", "stable-diffusion-v1-5/stable-diffusion-v1-5"]
    push = ["push", cat_dir, "ada/no-cat", *base]
    planned = one_object("push", *push, "--dry-run")
    assert (planned["sent"], planned["url"]) == (False, None)
    refused = CliRunner().invoke(main, [*map(str, push), "--json"])
    assert "leave no place for: add --yes" in json.loads(refused.stdout)["error"]
    assert refused.exit_code == 1
    pushed = one_object("push", *push, "--yes")
    assert pushed["sent"]
    assert pushed["files"].keys() >= {"README.md", "pytorch_lora_weights.safetensors"}
    assert one_object("pull", "pull", "ada/no-cat", "-o", tmp_path / "pulled")["files"]
    assert [each["repo"] for each in one_object("search", "search", "no-cat")["erasers"]] == ["ada/no-cat"]


def test_fleet_and_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these do takes minutes, and has tests of its own; here stand-ins say that they did it."""
    listed = tmp_path / "requests.csv"
    listed.write_text("id,concept,kind\nr1,a cat,object\nr2,zzz,object\n")
    statuses = {
        "r1": Status(id="r1", key="k", state="done"),
        "r2": Status(id="r2", key="k", state="refused", reason="no prompt of this suite is about it"),
    }
    monkeypatch.setattr("esd_lora.fleet.running.run_fleet", lambda *_, **__: statuses)
    run = one_object("fleet", "fleet", listed, "--base", "emoji", "-o", tmp_path / "out")
    assert [request["state"] for request in run["requests"]] == ["done", "refused"]
    entry = Entry.model_construct()
    record = Record.model_construct(number=2, requests={"r1": entry})
    monkeypatch.setattr(releasing, "release", lambda *_, **__: record)
    released = one_object("release", "release", listed, "--base", "emoji", "-o", tmp_path / "out")
    assert (released["number"], released["requests"]) == (2, ["r1"])


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(out: Path, *, force: bool) -> str:  # noqa: ARG001
        (out / "measured").mkdir(parents=True)
        (out / "measured" / "table.md").write_text("| a |")
        return "done"

    monkeypatch.setattr("esd_lora.demo.demo", stand_in)
    assert one_object("demo", "demo", "-o", tmp_path / "out")["table"] == "| a |"


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("python", "3.11"), Finding("cpu", "slow", "Buy another.")]
    monkeypatch.setattr("esd_lora.doctor.examine", lambda _: iter(findings[:1]))
    assert one_object("doctor", "doctor") == {
        "ok": True,
        "findings": [{"name": "python", "ok": True, "state": "3.11", "remedy": None}],
    }
    monkeypatch.setattr("esd_lora.doctor.examine", lambda _: iter(findings))
    assert one_object("doctor", "doctor", code=1)["findings"][1]["remedy"] == "Buy another."


def test_late_requests_fail_with_their_list(places: dict[str, Path]) -> None:
    words = ["requests", "overdue", "-r", places["registry"], "--fail"]
    assert [request["id"] for request in one_object("requests overdue", *words, code=1)["requests"]] == ["r1"]


def test_page_is_what_the_types_say() -> None:
    text = (PROJECT / "docs" / "json.md").read_text("utf-8")
    assert text == json_page.page(), "run python benchmarks/json_page.py"


def test_quiet_in_a_process_of_its_own(tiny_dir: Path, tmp_path: Path) -> None:
    """Bars, warnings, and what other libraries log."""
    train = [sys.executable, "-m", "esd_lora", "train", "--concept", "a cat", "--base", str(tiny_dir), *SETTINGS.split()]
    done = subprocess.run([*train, "--quiet", "-o", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_what_libraries_print_is_no_part_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(_: object) -> Iterator[Finding]:
        sys.stdout.write("a library's own words\n")
        yield Finding("python", "3.11")

    monkeypatch.setattr("esd_lora.doctor.examine", noisy)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert json.loads(result.stdout)["ok"]
    assert result.stderr == "a library's own words\n"
    assert CliRunner().invoke(main, ["doctor", "--quiet"]).output == ""
    assert json.loads(CliRunner().invoke(main, ["doctor", "--quiet", "--json"]).output)["ok"]
