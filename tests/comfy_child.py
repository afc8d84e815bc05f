"""Runs the nodes on a real ComfyUI, in a process of its own: `python comfy_child.py COMFYUI NODES FOLDER JOB`.

It imports nothing of esd-lora, and ComfyUI's `comfy` package and folder_paths are the checkout's own. What it reads in FOLDER
the test has written there, and what it writes there the test compares.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def load_nodes(folder: Path, name: str = "esd_lora_comfyui") -> ModuleType:
    """Return the nodes as ComfyUI loads them: a package from a folder of any name."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_calls(nodes: ModuleType, model: Any, calls: Sequence[Mapping[str, Any]], clip: Any = None) -> tuple[Any, list[str]]:
    """Return the model that a chain of nodes leaves, each called as ComfyUI does it, and their notes."""
    notes: list[str] = []
    for call in calls:
        node = nodes.NODE_CLASS_MAPPINGS[call["node"]]
        inputs = node.INPUT_TYPES()
        defaults = {name: default_of(*each) for name, each in inputs["required"].items() if name not in ("model", "clip")}
        wired = {"clip": clip} if "clip" in inputs["required"] else {}
        model, _, note = getattr(node(), node.FUNCTION)(model=model, **{**defaults, **wired, **call["inputs"]})
        notes.append(note)
    return model, notes


def default_of(kind: Any, options: Mapping[str, Any]) -> Any:
    """Return what a widget holds when a node is new: the first of a list, or its default."""
    return kind[0] if isinstance(kind, list) else options["default"]


FLUX_INPUTS = {"context_in_dim": "txt_in", "vec_in_dim": "vector_in.in_layer"}


def detect(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Return ComfyUI's own reading of a denoiser's configuration; some sizes of Flux it takes as given, which a toy has not."""
    from comfy.model_detection import detect_unet_config  # pyright: ignore[reportMissingImports]

    config = detect_unet_config(dict(weights), prefix)
    if config.get("image_model") == "flux" and (hidden := weights[f"{prefix}img_in.weight"].shape[0]) < 3072:
        widths = {name: weights[f"{prefix}{layer}.weight"].shape[1] for name, layer in FLUX_INPUTS.items()}
        config |= {"hidden_size": hidden, "num_heads": 2, "axes_dim": [4, 6, 6], "out_channels": 4, "in_channels": 4, **widths}
    if config.get("image_model") == "flux2":  # of ComfyUI 0.8, which knows dev alone; Klein has fewer heads of the same width
        config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
    return config


def build(family: str, config: dict[str, Any], device: str = "cpu") -> Any:
    """Return ComfyUI's model of a configuration."""
    from comfy import supported_models  # pyright: ignore[reportMissingImports]

    kind = {
        "sd": supported_models.SD15,
        "sdxl": supported_models.SDXL,
        "sd3": supported_models.SD3,
        "flux": supported_models.Flux,
        "pixart": supported_models.PixArtSigma,
        "lumina2": supported_models.Lumina2,
        "qwen-image": supported_models.QwenImage,
        "flux2": supported_models.Flux2,
        "z-image": supported_models.ZImage,
        "wan": supported_models.WAN22_T2V if config.get("out_dim") == 48 else supported_models.WAN21_T2V,
    }
    return kind[family](config).get_model({}, "", device=device)


def patched_weights(job: Mapping[str, Any], folder: Path, nodes: ModuleType) -> dict[str, Any]:
    """Run chains of nodes on a checkpoint's denoiser, and write the weights as ComfyUI patches them on loading."""
    from comfy.model_patcher import ModelPatcher  # pyright: ignore[reportMissingImports]

    prefix = job["prefix"]
    weights = {name: tensor for name, tensor in load_file(folder / "base.safetensors").items() if name.startswith(prefix)}
    model = build(job["family"], detect(weights, prefix))
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    missing, unexpected = model.diffusion_model.load_state_dict(own, strict=False)
    notes: list[Any] = []
    for number, calls in enumerate(job["chains"]):
        patcher = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
        result, lines = run_calls(nodes, patcher, calls)
        assert not patcher.patches, "the model that is given stays as it is"
        result.patch_model(device_to=torch.device("cpu"))
        state = {name.removeprefix("diffusion_model."): t.clone() for name, t in model.state_dict().items()}
        result.unpatch_model(device_to=torch.device("cpu"))
        save_file(
            {f"{prefix}{name}": tensor for name, tensor in state.items() if name in own}, folder / f"out_{number}.safetensors"
        )
        notes.append(lines)
    return {"notes": notes, "missing": list(missing), "unexpected": list(unexpected)}


def mapping(job: Mapping[str, Any], folder: Path, nodes: ModuleType) -> dict[str, Any]:
    """Count the layers of files that a model of real size has places for, by ComfyUI's own Load LoRA and by the nodes.

    The model has no weights: it is on the meta device.
    """
    import logging

    import comfy.lora  # pyright: ignore[reportMissingImports]
    import comfy.lora_convert  # pyright: ignore[reportMissingImports]
    from comfy.model_patcher import ModelPatcher  # pyright: ignore[reportMissingImports]

    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    prefix = job["prefix"]
    shapes = {f"{prefix}{name}": torch.empty(shape, device="meta") for name, shape in job["shapes"].items()}
    model = build(job["family"], detect(shapes, prefix), "meta")
    patcher = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    result: dict[str, Any] = {}
    for name in job["files"]:
        tensors = comfy.lora_convert.convert_lora(load_file(folder / "loras" / name))
        warned.clear()
        loaded = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model, {}))
        placed = patcher.clone().add_patches(loaded, 1.0)
        result[name] = {
            "tensors": len(tensors),
            "core": len(placed),
            "not loaded": sum("lora key not loaded" in line for line in warned),
        }
        if job["nodes"]:
            patched, _ = run_calls(nodes, patcher, [{"node": "EsdLoadEraser", "inputs": {"eraser": name}}])
            result[name]["node"] = sum(map(len, patched.patches.values()))
    return {"files": result}


def main() -> None:
    comfyui, nodes, folder = (Path(argument).resolve() for argument in sys.argv[1:4])
    sys.path.insert(0, str(comfyui))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options  # pyright: ignore[reportMissingImports]

    comfy.options.enable_args_parsing()
    import folder_paths  # pyright: ignore[reportMissingImports]

    folder_paths.folder_names_and_paths["loras"] = ([str(folder / "loras")], {".safetensors"})
    from comfyui_version import __version__  # pyright: ignore[reportMissingImports]

    job = json.loads((folder / "job.json").read_text("utf-8"))
    result = JOBS[job["job"]](job, folder, load_nodes(nodes))
    (folder / "result.json").write_text(json.dumps({**result, "version": __version__}), "utf-8")


JOBS = {"weights": patched_weights, "mapping": mapping}

if __name__ == "__main__":
    main()
