"""The ComfyUI nodes: weights as esd-lora's own merge gives them, gates as its own, and one sentence where something is wrong.

By the stand-in of tests/comfy_stand_in.py everywhere; by ComfyUI's own `comfy` too where the environment variable COMFYUI names a
checkout, and COMFYUI_PYTHON an interpreter with what that needs (this one by default).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import comfy_stand_in
from comfy_cases import LAYERS, Case, largest_difference, loaded, stacked, write_case
from comfy_child import load_nodes, run_calls

NODES = Path(__file__).parents[2] / "integrations" / "comfyui"
COMFYUI = os.environ.get("COMFYUI")
FAMILIES = tuple(LAYERS)
EXACT = 1e-6


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return write_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return write_case("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture
def nodes_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], ModuleType]]:
    """Loads the nodes beside the stand-in, with a folder as models/loras."""

    def load(loras: Path) -> ModuleType:
        comfy_stand_in.install(monkeypatch, loras)
        return load_nodes(NODES)

    yield load
    for name in [name for name in sys.modules if name.startswith("esd_lora_comfyui")]:
        del sys.modules[name]


def patcher_of(case: Case, predicts: str | None = None) -> comfy_stand_in.ModelPatcher:
    weights = {name.removeprefix(case.prefix): tensor for name, tensor in case.base().items()}
    predicts = predicts or LAYERS[case.family]["prediction_type"]
    return comfy_stand_in.ModelPatcher(comfy_stand_in.build_model(case.family, weights, predicts))


def test_weights_are_those_of_a_merge(case: Case, nodes_on: Callable[[Path], ModuleType]) -> None:
    nodes = nodes_on(case.folder / "loras")
    for chain, expected in zip(case.chains, case.expected, strict=True):
        model = patcher_of(case)
        result, _ = run_calls(nodes, model, chain)
        assert not model.patches, "the model that is given stays as it is"
        actual = {name.replace("diffusion_model.", case.prefix, 1): t for name, t in result.patched_weights().items()}
        assert largest_difference(actual, expected) < EXACT, chain


def on_real_comfyui(folder: Path, **job: Any) -> dict[str, Any]:
    """Run a job of tests/comfy_child.py on the checkout, with a folder's loras as models/loras, and return its result."""
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    child = Path(__file__).parents[1] / "comfy_child.py"
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), str(child), str(COMFYUI), str(NODES), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "not loaded" not in done.stderr.lower(), done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text("utf-8"))


needs_comfyui = pytest.mark.skipif(COMFYUI is None, reason="COMFYUI names no checkout of ComfyUI")


@needs_comfyui
def test_weights_are_those_of_a_merge_in_comfyui_itself(case: Case) -> None:
    result = on_real_comfyui(case.folder, job="weights", family=case.family, prefix=case.prefix, chains=case.chains)
    assert result["unexpected"] == []
    for number, expected in enumerate(case.expected):
        assert largest_difference(load_file(case.folder / f"out_{number}.safetensors"), expected) < EXACT, case.chains[number]
