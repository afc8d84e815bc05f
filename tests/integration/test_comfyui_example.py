"""The folder of the ComfyUI nodes: what it imports, what it says of itself, and its example in both of ComfyUI's formats."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import comfy_stand_in
import esd_lora
from comfy_cases import CORE, EXAMPLE, EXAMPLES, NODES, PUBLISHED, WITHOUT_NODES
from esd_lora.erasers.stacking import Strength
from esd_lora.families import family_named

Definitions = dict[str, tuple[dict[str, str], tuple[str, ...], set[str]]]


@pytest.fixture
def known(tmp_path: Path) -> Iterator[Definitions]:
    """Every class in the example: inputs by name, outputs, and the inputs that may be left out."""
    with comfy_stand_in.loaded_nodes(tmp_path) as nodes:
        yield definitions(nodes)


def test_nodes_import_neither_esd_lora_nor_diffusers() -> None:
    """Whoever copies the folder has torch, safetensors and ComfyUI."""
    outside: set[str] = set()
    for file in NODES.glob("*.py"):
        assert file.read_text("utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                outside |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                outside.add(str(node.module).partition(".")[0])
    assert outside - sys.stdlib_module_names == {"torch", "safetensors", "comfy", "folder_paths"}


def test_folder_says_what_it_is() -> None:
    metadata = tomllib.loads((NODES / "pyproject.toml").read_text("utf-8"))
    assert metadata["project"]["version"] == esd_lora.__version__
    assert metadata["project"]["dependencies"] == []
    assert metadata["tool"]["comfy"]["DisplayName"]
    assert (NODES / "LICENSE").read_bytes() == (NODES.parents[1] / "LICENSE").read_bytes()


def rows_after(heading: str) -> list[list[str]]:
    """Return the cells of a table of docs/comfyui.md, by the beginning of its head."""
    text = (NODES.parents[1] / "docs" / "comfyui.md").read_text("utf-8")
    table = text[text.index(f"| {heading}") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_page_says_what_was_counted() -> None:
    counts = [re.findall(r"\d+", " ".join(row[1:3])) for row in rows_after("model |")]
    counted = (PUBLISHED | WITHOUT_NODES).values()
    assert [tuple(map(int, numbers)) for numbers in counts] == [(k, k, core, own) for k, own, core in counted]


def test_page_names_blocks_as_the_models_do() -> None:
    """The extension LoRA Block Weight counts the original's blocks: IN04 is input_blocks.4."""
    kinds = {"IN": "input_blocks", "OUT": "output_blocks", "MID": "middle_block"}
    compared = 0
    for blocks, *cells in rows_after("its blocks"):
        for family, cell in zip(("sd", "sdxl"), cells, strict=True):
            modules = {layer.name: module for module, layer in family_named(family).original_layers().items()}
            for kind, number in re.findall(r"([A-Z]+)(\d*)", blocks) if cell.startswith("`") else ():
                place = f"{kinds[kind]}.{int(number)}" if number else kinds[kind]
                module = modules[f"{place}.1.transformer_blocks.0.attn2.to_k"]
                assert Strength(1, {cell.strip("`"): 0}).at(module) == 0, (kind, number, cell)
                compared += 1
    assert compared == 16 + 11


def definitions(nodes: ModuleType) -> Definitions:
    """Return ComfyUI's nodes in the example, and the new ones as they define themselves."""
    known: Definitions = {name: (inputs, outputs, set[str]()) for name, (inputs, outputs) in CORE.items()}
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()
        every = {**inputs["required"], **inputs.get("optional", {})}
        types = {each: "COMBO" if isinstance(kind[0], list) else kind[0] for each, kind in every.items()}
        known[name] = (types, node.RETURN_TYPES, set(inputs.get("optional", {})))
    return known


def fits(output: str, kind: str) -> bool:
    return kind in ("*", output)


def test_example_in_the_api_s_format(known: Definitions) -> None:
    graph = json.loads((EXAMPLES / "api" / f"{EXAMPLE}.json").read_text("utf-8"))
    assert set(known) == {node["class_type"] for node in graph.values()}
    for node in graph.values():
        types, _, optional = known[node["class_type"]]
        assert types.keys() - optional <= node["inputs"].keys() <= types.keys()
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source, slot = value
                assert fits(known[graph[source]["class_type"]][1][slot], types[name]), (node, name)
            else:
                expected = {"COMBO": str, "STRING": str, "INT": int, "FLOAT": (int, float)}[types[name]]
                assert isinstance(value, expected), (node, name)


def test_example_in_the_page_s_format(known: Definitions) -> None:
    """Every class, input and link exists, each link stands at both of its ends, and widgets hold what the other format says."""
    graph = json.loads((EXAMPLES / f"{EXAMPLE}.json").read_text("utf-8"))
    api = json.loads((EXAMPLES / "api" / f"{EXAMPLE}.json").read_text("utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    (note,) = (node for node in nodes.values() if node["type"] == "Note")
    assert "What to change" in note["widgets_values"][0]
    assert {str(id_) for id_ in nodes} - {str(note["id"])} == set(api)
    for link, source, slot, target, place, kind in graph["links"]:
        entry, output = nodes[target]["inputs"][place], nodes[source]["outputs"][slot]
        assert entry["link"] == link
        assert link in output["links"]
        assert known[nodes[source]["type"]][1][slot] == output["type"] == kind
        assert fits(kind, known[nodes[target]["type"]][0][entry["name"]])
        assert api[str(target)]["inputs"][entry["name"]] == [str(source), slot]
    wired = sum(isinstance(value, list) for node in api.values() for value in node["inputs"].values())
    assert len({link for link, *_ in graph["links"]}) == len(graph["links"]) == wired
    for node in nodes.values():
        if node is note:
            continue
        types = known[node["type"]][0]
        widgets = [name for name, kind in types.items() if kind in ("COMBO", "STRING", "INT", "FLOAT")]
        values = [value for value in node["widgets_values"] if value != "fixed"]  # what a seed does after a run
        assert len(values) == len(widgets), node["type"]
        for name, value in zip(widgets, values, strict=True):
            if not isinstance(written := api[str(node["id"])]["inputs"][name], list):
                assert written == value
