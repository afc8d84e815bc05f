"""Fingerprints of what the commands make on the built-in base: SHA-256 of tensors, and of an evaluation's numbers.

    python tests/golden/fingerprints.py before.json        # then change the code
    python tests/golden/fingerprints.py after.json && diff before.json after.json

The hashes belong to one machine, one version of torch and one thread; what is compared is two states of the code there. The
commands are called as a user calls them, so that moving code about does not change this file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

VOLATILE = {"date", "seconds", "versions", "created", "torch", "path", "commit"}
"""Keys of an evaluation's record that differ from run to run."""


def run(*arguments: object) -> None:
    """Run one command of the command line."""
    from esd_lora.cli import main

    main([str(argument) for argument in arguments], standalone_mode=False)


def tensors(place: Path) -> str:
    """Return one SHA-256 over name, shape, dtype and bytes of every tensor in the safetensors files of a place."""
    files = sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name)
                digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def document(file: Path) -> str:
    """Return the SHA-256 of a JSON file without the values that differ from run to run."""

    def stable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: stable(inner) for key, inner in sorted(value.items()) if key not in VOLATILE}
        return [stable(inner) for inner in value] if isinstance(value, list) else value

    return hashlib.sha256(json.dumps(stable(json.loads(file.read_text("utf-8")))).encode()).hexdigest()


def fingerprints(
    folder: Path, *, steps: int = 20, scopes: tuple[str, ...] = ("xattn", "noxattn", "full"), seed: int = 0
) -> dict[str, str]:
    """Return name to fingerprint of everything that is made.

    Args:
        folder: Where to make it; empty.
        steps: Of every training and of harmonising.
        scopes: To train in, with the presets `paper` and `fast`.
        seed: Of the trainings.
    """
    torch.set_num_threads(1)
    brief = ["-s", f"train.steps={steps}", "-s", f"train.seed={seed}", "-s", "train.preview_every=0"]
    few = ["-s", "train.trajectories=8", "-s", "train.preserve_trajectories=16"]
    result: dict[str, str] = {}
    for preset, more in (("paper", []), ("fast", few)):
        for scope in scopes:
            out = folder / f"{preset}-{scope}"
            run("train", preset, "--concept", "a cat", "--scope", scope, *brief, *more, "--device", "cpu", "-o", out)
            result[f"train {preset} {scope}"] = tensors(out)
    cat, style = folder / f"fast-{scopes[0]}", folder / "style"
    run("train", "emoji-twemoji", *brief, *few, "--device", "cpu", "-o", style, "--kohya")
    result["train emoji-twemoji"] = tensors(style / "pytorch_lora_weights.safetensors")
    result["train --kohya"] = tensors(style / "kohya")
    both = [cat, f"{style}:0.8,mid=0.5"]
    run("stack", *both, "-o", folder / "summed")
    run("stack", *both, "-o", folder / "small", "--energy", "0.99")
    run("stack", *both, "-o", folder / "fused", "--base", "emoji", "--device", "cpu")
    run("stack", *both, "-o", folder / "cut", "--base", "emoji", "--device", "cpu", "--rank", "6", "--lam", "0.3")
    run("stack", *both, "-o", folder / "harmonised", "--base", "emoji", "--device", "cpu", "--harmonise", steps)
    for name in ("summed", "small", "fused", "cut", "harmonised"):
        result[f"stack {name}"] = tensors(folder / name)
    run("merge", *both, "--base", "emoji", "-o", folder / "merged", "--verify")
    result["merge"] = tensors(folder / "merged")
    run("extract", "--base", "emoji", "--tuned", folder / "merged", "--rank", "4", "-o", folder / "extracted")
    result["extract"] = tensors(folder / "extracted")
    for layout in ("kohya", "diffusers"):
        run("export", folder / "summed", "--layout", layout, "-o", folder / f"{layout}.safetensors")
        run("import", folder / f"{layout}.safetensors", "-o", folder / f"from-{layout}")
        result[f"export {layout}"] = tensors(folder / f"{layout}.safetensors")
        result[f"import {layout}"] = tensors(folder / f"from-{layout}")
    run("export", folder / "summed", "--layout", "peft", "-o", folder / "peft")
    result["export peft"] = tensors(folder / "peft")
    few_pictures, others = ["--base", "emoji", "--limit", "8", "--device", "cpu"], ["--against", "negative-prompt,sld"]
    run("evaluate", cat, "--suite", "emoji-object", *few_pictures, *others, "-o", folder / "measured")
    run("evaluate", *both, "--suite", "emoji-demo", *few_pictures, "--stack", "-o", folder / "together")
    for name in ("measured", "together"):
        result[f"evaluate {name}"] = document(folder / name / "summary.json")
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        Path(sys.argv[1]).write_text(json.dumps(fingerprints(Path(place)), indent=1) + "\n", "utf-8")
