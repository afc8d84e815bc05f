"""The doctor: each thing that can be wrong is findings, with what to do, and nothing is said that is nobody's business."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner, Result

from esd_lora import doctor
from esd_lora.cli import main

TOKEN = "hf_" + "x" * 20


@pytest.fixture(autouse=True)
def well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is wrong, whatever this one has."""
    usage = SimpleNamespace(total=10**12, used=0, free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(doctor, "_MEMORY", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def run(*options: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *options])


def problems() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine() if not finding.ok}


def test_all_is_well() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert {line.split(maxsplit=1)[0] for line in result.stdout.splitlines()} == {"ok"}
    assert f"torch {torch.__version__}" in result.stdout
    assert "HF_HUB_OFFLINE is set" in result.stdout


def test_as_json_with_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10**4)
    result = run("--json")
    assert result.exit_code == 1
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert findings["cpu"]["ok"] is False
    assert "OMP_NUM_THREADS" in findings["cpu"]["remedy"]
    assert findings["python"] == {"name": "python", "ok": True, "state": findings["python"]["state"], "remedy": None}


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "no-such-package>=1", "none; extra == '8bit'", "click"])
    findings = problems()
    assert findings.keys() == {"torch", "no-such-package"}
    assert findings["torch"].state == f"{torch.__version__}, and >=99 is needed"
    assert findings["torch"].remedy == "Run: pip install 'torch>=99'."
    assert findings["no-such-package"].line().startswith("PROBLEM  no-such-package: not installed. Run: pip install")


@pytest.mark.parametrize(
    ("code", "state"), [("raise ImportError('operator torchvision::nms does not exist')", "does not fit"), ("", "fits")]
)
def test_torchvision_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, state: str) -> None:
    (tmp_path / "torchvision.py").write_text(code, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    as_usual = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "torchvision" else as_usual(name))
    finding = next(finding for finding in doctor.examine() if finding.name == "torchvision")
    assert state in finding.state
    assert finding.ok == (not code)
    assert ("nms does not exist" in finding.state) == bool(code)


def test_configuration_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def finding() -> doctor.Finding:
        return next(finding for finding in doctor.examine() if finding.name == "configuration")

    assert finding().state == "no file, by ESD_LORA_CONFIG; nothing is set"
    file = tmp_path / "config.toml"
    file.write_text('base = "sd15"\ndevice = "mps"\n', "utf-8")
    monkeypatch.setenv("ESD_LORA_CONFIG", str(file))
    monkeypatch.setenv("ESD_LORA_DEVICE", "cpu")
    assert finding().ok
    assert finding().state == f"{file}; base sd15 ({file}), device cpu (ESD_LORA_DEVICE)"
    file.write_text('bsae = "sd15"\n', "utf-8")
    assert not finding().ok
    assert "has 'bsae' (did you mean 'base'?)" in finding().state


def test_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 2**30))
    monkeypatch.setattr(doctor, "_MEMORY", 2**60)
    findings = problems()
    assert findings.keys() == {"Hub cache", "memory"}
    assert "2.0 GiB free" in findings["Hub cache"].state
    assert "8 GiB or more" in findings["Hub cache"].remedy


def test_the_hub_s_cache_is_weighed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    states = {finding.name: finding.state for finding in doctor.examine()}
    assert states["Hub cache"].startswith(f"nothing yet in {tmp_path / 'none'}, ")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    states = {finding.name: finding.state for finding in doctor.examine()}
    assert states["Hub cache"].startswith(f"0.0 GiB in {tmp_path}, ")


def online(monkeypatch: pytest.MonkeyPatch, head: Callable[..., Any]) -> dict[str, doctor.Finding]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    return {finding.name: finding for finding in doctor.examine()}


def test_hub_that_answers_and_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    urls: list[str] = []
    assert "answers in" in online(monkeypatch, lambda url, **_: urls.append(url))["Hub"].state
    assert urls == [huggingface_hub.constants.ENDPOINT], "nothing else is asked"

    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    finding = online(monkeypatch, unreachable)["Hub"]
    assert "Name or service not known" in finding.state
    assert "HF_HUB_OFFLINE=1" in finding.remedy


def test_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    result = run()
    assert "Hub token: there is one" in result.output
    assert TOKEN not in result.output
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "Hub token: none; " in run().output


def test_card_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "is a build without CUDA and sees no card" in problems()["cuda"].state


def test_dtype_that_a_device_lacks() -> None:
    finding = doctor._speed(torch.device("meta"))
    assert "float32 fails (" in finding.state
    assert finding.remedy
