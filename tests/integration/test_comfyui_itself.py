"""The ComfyUI nodes in ComfyUI itself, where the environment variable COMFYUI names a checkout of it.

COMFYUI_PYTHON is an interpreter with what that checkout needs, and with diffusers for the built-in base; this one by default.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import esd_lora
import original_checkpoints
from comfy_cases import (
    CORE,
    EXACT,
    EXAMPLE,
    EXAMPLES,
    FAMILIES,
    LAYERS,
    NODES,
    PUBLISHED,
    WITHOUT_NODES,
    Case,
    largest_difference,
    write_case,
)
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import ErasedConcept
from esd_lora.families import family_named
from esd_lora.formats.exporting import export
from esd_lora.gating import Gate
from published_denoisers import DENOISERS, denoiser
from random_erasers import build_header, eraser_on

COMFYUI = os.environ.get("COMFYUI")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
TESTS = Path(__file__).parents[1]
EMOJI = Path(esd_lora.__file__).parent / "bases" / "emoji" / "pipeline"
pytestmark = pytest.mark.skipif(COMFYUI is None, reason="COMFYUI names no checkout of ComfyUI")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return write_case(request.param, tmp_path_factory.mktemp(request.param))


def on_real_comfyui(folder: Path, **job: Any) -> dict[str, Any]:
    """Run a job of tests/comfy_child.py on the checkout, with a folder's loras as models/loras, and return its result."""
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    command = [PYTHON, str(TESTS / "comfy_child.py"), str(COMFYUI), str(NODES), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text("utf-8"))


def test_weights_are_those_of_a_merge_in_comfyui_itself(case: Case) -> None:
    result = on_real_comfyui(case.folder, job="weights", family=case.family, prefix=case.prefix, chains=case.chains)
    assert result["unexpected"] == []
    for number, expected in enumerate(case.expected):
        assert largest_difference(load_file(case.folder / f"out_{number}.safetensors"), expected) < EXACT, case.chains[number]


@pytest.mark.parametrize("name", [*PUBLISHED, *WITHOUT_NODES])
def test_every_layer_has_a_place_in_comfyui_itself(name: str, tmp_path: Path) -> None:
    """At the size of published models: kohya's names by ComfyUI's own Load LoRA, and both kinds of file by the node, if any."""
    family, model = DENOISERS[name][0], denoiser(name)
    original = getattr(original_checkpoints, family.replace("-", "_"), original_checkpoints.unet)
    header = LAYERS.get(family, {"family": family, "prefix": "transformer", "prediction_type": "flow"})
    eraser = eraser_on(model, family_named(family).modules(model, "full"), rank=1, **header)
    eraser.save(tmp_path / "loras" / "own")
    export(eraser, tmp_path / "loras" / "kohya.safetensors", layout="kohya")
    shapes = {n.removeprefix("model.diffusion_model."): list(t.shape) for n, t in original(model).items()}
    kohya, own, by_core = (PUBLISHED | WITHOUT_NODES)[name]
    nodes = name in PUBLISHED
    files = ("kohya.safetensors", "own/pytorch_lora_weights.safetensors")[: 2 if by_core or not nodes else 1]
    result = on_real_comfyui(tmp_path, job="mapping", family=family, prefix="", shapes=shapes, files=files, nodes=nodes)
    by_node = [{"node": count} if nodes else {} for count in (kohya, own)]
    assert result["files"][files[0]] == {"tensors": 3 * kohya, "core": kohya, "not loaded": 0, **by_node[0]}
    for file in files[1:]:
        assert result["files"][file] == {"tensors": 2 * own, "core": by_core, "not loaded": 2 * (own - by_core), **by_node[1]}


class Server:
    """A ComfyUI server with the nodes and the built-in base, on a port of its own."""

    def __init__(self, folder: Path):
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (folder / name).mkdir(exist_ok=True)
        shutil.copytree(NODES, folder / "custom_nodes" / "esd-lora")
        shutil.copy(TESTS / "comfy_emoji_base.py", folder / "custom_nodes")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        options = ["--base-directory", str(folder), "--port", str(self._port), "--cpu", "--disable-api-nodes"]
        options += ["--database-url", "sqlite:///:memory:"]
        environment = {"EMOJI_PIPELINE": str(EMOJI), "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
        self._process = subprocess.Popen(
            [PYTHON, "main.py", *options],
            cwd=str(COMFYUI),
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._wait_for("To see the GUI")

    def _wait_for(self, words: str) -> None:
        assert self._process.stdout is not None
        log: list[str] = []
        for line in self._process.stdout:
            log.append(line)
            if words in line:
                return
        raise AssertionError("".join(log[-40:]))

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}") as answer:
            content = answer.read()
        return json.loads(content) if answer.headers["Content-Type"].startswith("application/json") else content

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Run a workflow and return its entry in the history."""
        body = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/prompt", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            number = json.load(answer)["prompt_id"]
        self._wait_for("Prompt executed")
        return self.get(f"/history/{number}")[number]

    def outputs(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Run a workflow and return what its nodes show, by their ids."""
        entry = self.run(graph)
        assert entry["status"]["status_str"] == "success", entry["status"]
        return entry["outputs"]

    def picture(self, output: dict[str, Any]) -> bytes:
        (image,) = output["images"]
        return self.get(f"/view?{urllib.parse.urlencode(image)}")

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def emoji() -> Base:
    return load_base("emoji", device="cpu", vae=False)


@pytest.fixture(scope="module")
def server(emoji: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    layers, loras = emoji.family.modules(emoji.model, "xattn"), folder / "models" / "loras"
    loras.mkdir(parents=True)
    for seed, name in enumerate(("pizza", "car", "cat", "rocket")):
        eraser = eraser_on(emoji.model, layers, f"a {name}", seed=seed, **LAYERS["sd"])
        eraser = Eraser({module: pair.scaled(2**-5, module) for module, pair in eraser.pairs.items()}, eraser.header)
        if name == "rocket":
            export(eraser, loras / "no-rocket.safetensors", layout="kohya")
        else:
            eraser.save(loras / f"no-{name}")
    running = Server(folder)
    yield running
    running.stop()


def example(prompt: str) -> dict[str, Any]:
    """Return the example with the built-in base in place of the checkpoint."""
    graph = json.loads((EXAMPLES / "api" / f"{EXAMPLE}.json").read_text("utf-8"))
    graph["1"] = {"class_type": "EmojiBase", "inputs": {}}
    graph["2"]["inputs"]["value"] = prompt
    graph["8"]["inputs"] |= {"width": 64, "height": 64}
    for sampler in ("9", "10"):
        graph[sampler]["inputs"]["steps"] = 4
    return graph


def test_server_has_the_nodes_of_the_example(server: Server) -> None:
    known = server.get("/object_info")
    for name, (inputs, outputs) in CORE.items():
        every = {**known[name]["input"]["required"], **known[name]["input"].get("optional", {})}
        types = {each: "COMBO" if isinstance(kind[0], list) else kind[0] for each, kind in every.items()}
        assert {each: types[each] for each in inputs} == inputs, name
        assert tuple(known[name]["output"]) == outputs, name
    for name in ("EsdLoadEraser", "EsdStackErasers", "EsdGateByPrompt"):
        assert known[name]["output"] == ["MODEL", "CLIP", "STRING"]
        assert known[name]["category"] == "esd-lora"
    assert server.get("/workflow_templates") == {"esd-lora": [EXAMPLE]}


def test_example_runs_on_the_built_in_base(server: Server) -> None:
    outputs = server.outputs(example("a cat"))
    (loaded,), (stacked,), (gated,) = (outputs[node]["text"] for node in ("15", "16", "17"))
    assert "removes a pizza, at strength 1, mid x 0.5, up.1 x 0" in loaded
    assert [line.partition(":")[0] for line in stacked.splitlines()] == [
        "no-rocket.safetensors",
        "no-car/pytorch_lora_weights.safetensors",
    ]
    assert "the prompt names 'cat' (similarity 1.000, threshold 0.95): on at 100%, removes a cat, at strength 1" in gated
    assert server.picture(outputs["13"]) != server.picture(outputs["14"])


def test_closed_gate_paints_the_base_s_own_picture(server: Server, emoji: Base) -> None:
    """And ComfyUI's text encoder measures what esd-lora measures."""
    graph = example("a tiger of rain")
    graph["5"]["inputs"]["model"] = ["1", 0]  # the gate alone
    outputs = server.outputs(graph)
    (concept,) = (ErasedConcept(name="a cat", pairs=(), eta=None),)
    header = build_header().model_copy(update={"concepts": (concept,)})
    (similarity,) = Gate(emoji, [Eraser({}, header)]).similarities("a tiger of rain")
    assert f"(similarity {similarity:.3f}, threshold 0.95): off, and the model stays as it was." in outputs["17"]["text"][0]
    assert server.picture(outputs["13"]) == server.picture(outputs["14"])


def test_what_does_not_fit_is_said_on_the_node(server: Server) -> None:
    graph = example("a cat")
    graph["3"]["inputs"]["blocks"] = "up.7=0"
    (error,) = (details for kind, details in server.run(graph)["status"]["messages"] if kind == "execution_error")
    assert error["node_type"] == "EsdLoadEraser"
    assert error["exception_message"].startswith(
        "no-pizza/pytorch_lora_weights.safetensors has no layer in 'up.7'. Did you mean"
    )
    assert len(error["exception_message"].splitlines()) == 1
