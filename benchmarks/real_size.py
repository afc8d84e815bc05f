"""Trains on denoisers of published size with random weights: reading them, a training step, memory and the eraser's size.

    python benchmarks/real_size.py [--only sd15,sd21,sdxl,sd3,sd35-medium,sana,pixart-sigma,lumina2,kolors,flux2-klein-4b,
        z-image,wan-1.3b] [--out out/real_size] [--no-instant]

SD 1.5, SD 2.1 and SDXL are whole models, written as single-file checkpoints in float16 and read back; the others are
diffusers directories with the real transformer and text encoders of the right width but one layer. Weights are random, so
nothing is learnt about erasure: what is checked is that every shape fits, from the file to the eraser in plain diffusers, and
that gradients reach the layers (in the last block of Stable Diffusion 3 a query of the text stream reaches no output).
Each model runs in a process of its own, in bfloat16, on latents of 256 x 256 pixels. `instant` is the closed form beside the
package's whole keep list, an anchor chosen and all text encoded, once the base is loaded; what it takes beside the loaded base
is the most memory that the process had meanwhile, without what it had before (Linux counts that).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


import torch
from tables import add_publish, show
from torch import nn

SINGLE = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}
"""Models that are whole, and the configuration that ships for them."""
OTHERS = ("sd3", "sd35-medium", "sana", "pixart-sigma", "lumina2", "kolors", "flux2-klein-4b", "z-image", "wan-1.3b")
"""Models with shallow text encoders and no VAE."""
SETTINGS = {
    "train.steps": 3,
    "train.trajectories": 1,
    "train.preserve_trajectories": 1,
    "train.trajectory_steps": 2,
    "train.resolution": 256,
    "train.preview_every": 0,
    "train.checkpoint_every": 0,
    "train.probe_every": 0,
    "train.lr": 1e-3,
    "train.preserve_weight": 1.0,
    "eta": 0.0,
}
"""Nothing is left to be measured, nor probed for the bar: on random weights there is nothing to measure."""


def fill(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a model from the meta device with small random weights and plain normalisation."""
    model = nn.Module.to(model, dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, (1 / parameter[0].numel()) ** 0.5, generator=generator)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)  # a weight of one dimension is a norm's
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
        elif buffer.is_floating_point():
            buffer.normal_(0, 1, generator=generator)
    return model


def write_single_file(name: str, folder: Path) -> Path:
    """Write a whole SD model as one float16 checkpoint."""
    from types import SimpleNamespace

    import original_checkpoints
    from published_denoisers import build_component, shipped_config

    parts = shipped_config(SINGLE[name])
    with torch.device("meta"):
        models = {part: build_component(parts, part) for part in parts if part.startswith(("unet", "vae", "text_encoder"))}
    pipe = SimpleNamespace(**{part: fill(model, torch.float16) for part, model in models.items()})
    predicts = {"modelspec.prediction_type": "v" if name == "sd21" else "epsilon"}
    return original_checkpoints.save_checkpoint(pipe, folder / f"{name}.safetensors", predicts)


def write_directory(name: str, folder: Path) -> Path:
    """Write a diffusers directory with the whole denoiser, and text encoders of the width it reads."""
    import diffusers
    from transformers import (
        Gemma2Config,
        Gemma2Model,
        Qwen3ForCausalLM,
        Qwen3Model,
        T5Config,
        T5EncoderModel,
        UMT5Config,
        UMT5EncoderModel,
    )

    import toys
    from published_denoisers import denoiser

    transformer, tokenizer = fill(denoiser(name), torch.bfloat16), toys.byte_tokenizer()
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=4096, d_ff=64, d_kv=8, num_heads=2, num_layers=1))
    sizes = {"hidden_size": 2304, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    gemma = Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **sizes, **heads))
    if name == "kolors":
        glm, tokenizer = toys.chat_glm(hidden_size=4096, ffn_hidden_size=64, kv_channels=8, num_attention_heads=2, num_layers=2)
        pipe = diffusers.KolorsPipeline(None, glm, tokenizer, transformer, toys.kolors_scheduler())
    elif name == "sana":
        scheduler = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        pipe = diffusers.SanaPipeline(tokenizer, gemma, None, transformer, scheduler)
    elif name == "pixart-sigma":
        scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
        pipe = diffusers.PixArtSigmaPipeline(tokenizer, t5, None, transformer, scheduler)
    elif name == "lumina2":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
        pipe = diffusers.Lumina2Pipeline(transformer, scheduler, None, gemma, tokenizer)
    elif name == "flux2-klein-4b":
        tokenizer = toys.qwen3_tokenizer()
        qwen = toys.qwen3(Qwen3ForCausalLM, tokenizer, 27, 2560)  # whose 9th, 18th and 27th layers are read
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        pipe = diffusers.Flux2KleinPipeline(scheduler, None, qwen, tokenizer, transformer)
    elif name == "z-image":
        tokenizer, scheduler = toys.qwen3_tokenizer(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = diffusers.ZImagePipeline(scheduler, None, toys.qwen3(Qwen3Model, tokenizer, 2, 2560), tokenizer, transformer)
    elif name.startswith("wan"):
        sizes = {"d_model": 4096, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_layers": 1}
        encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes))
        scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        pipe = diffusers.WanPipeline(tokenizer, encoder, None, scheduler, transformer)
    else:
        clips = (toys.clip(True, 1024), toys.tiny_tokenizer()) * 2
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, None, *clips, t5, tokenizer)
    pipe.to(torch.bfloat16).save_pretrained(folder / name)
    return folder / name


def memory(key: str) -> float:
    """Return a figure of this process's memory in GiB, as Linux has it: VmRSS now, VmHWM the most since it was reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return int(lines[key].split()[0]) / 2**20


def measure(name: str, folder: Path, *, instant: bool = True) -> dict[str, Any]:
    """Read the base, train, save, and load the eraser with plain diffusers; return what it took.

    Args:
        name: Of the model.
        folder: Where it was written.
        instant: Whether to solve the closed form as well, minutes where texts are long.
    """
    from peft import PeftModel

    from esd_lora.bases.loading import load_base
    from esd_lora.erasers.eraser import Eraser
    from esd_lora.formats.exporting import export
    from esd_lora.recipe_files import load_recipe
    from esd_lora.training import train

    file = folder / f"{name}.safetensors" if name in SINGLE else folder / name
    started = time.monotonic()
    base = load_base(file, device="cpu", dtype=torch.bfloat16, vae=name in SINGLE)
    read = time.monotonic() - started
    alone = load_recipe("instant", {"train.preview_every": 0}, concepts=["a cat"], base=str(file))
    reading_it = memory("VmHWM")
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the most so far is forgotten
    started, held = time.monotonic(), memory("VmRSS")
    solved = train(alone, base=base).header.solved if instant else None
    seconds = time.monotonic() - started if solved else float("nan")
    beside = memory("VmHWM") - held
    recipe = load_recipe("sd/fast", SETTINGS, concepts=["a cat"], preserve=["a dog"], base=str(file))
    ticks: list[float] = []
    train(recipe, base=base, out=folder / f"{name}-eraser", force=True, on_step=[lambda _: ticks.append(time.monotonic())])
    peak = max(reading_it, memory("VmHWM"))
    eraser = Eraser.load(folder / f"{name}-eraser")
    assert all(pair.up.isfinite().all() for pair in eraser.pairs.values())
    moved = sum(bool(pair.up.any()) for pair in eraser.pairs.values())
    if base.family.pipelines_load_loras:
        base.pipe.load_lora_weights(folder / f"{name}-eraser")
    else:
        PeftModel.from_pretrained(base.model, export(eraser, folder / f"{name}-peft", layout="peft", force=True))
    loaded = sum(hasattr(module, "lora_A") for module in base.model.modules())
    return {
        "family": base.family.name,
        "parameters": sum(p.numel() for n, p in base.model.named_parameters() if "lora_" not in n),
        "prediction": base.prediction_type,
        "read": read,
        "instant": seconds,
        "beside": beside,
        "step": min(b - a for a, b in itertools.pairwise(ticks)),
        "peak": peak,
        "layers": [len(eraser.pairs), moved, loaded],
        "size": (folder / f"{name}-eraser" / "pytorch_lora_weights.safetensors").stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join([*SINGLE, *OTHERS]))
    parser.add_argument("--out", type=Path, default=Path("out/real_size"))
    parser.add_argument("--no-instant", action="store_true", help="leave the closed form out")
    add_publish(parser)
    parser.add_argument("--stage", choices=["write", "measure"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.only.split(",")
    if options.stage == "write":
        (write_single_file if names[0] in SINGLE else write_directory)(names[0], options.out)
        return
    if options.stage == "measure":
        print(json.dumps(measure(names[0], options.out, instant=not options.no_instant)))
        return
    heads = ["model", "family, prediction", "parameters", "layers, trained, in diffusers", "read s", "instant s"]
    heads += ["instant, GiB beside the base", "step s", "peak GiB", "eraser MB"]
    rows: list[list[str]] = []
    for name in names:
        command = [sys.executable, __file__, "--only", name, "--out", str(options.out)]
        command += [*(["--no-instant"] if options.no_instant else []), "--stage"]
        subprocess.run([*command, "write"], check=True)
        output = subprocess.run([*command, "measure"], check=True, stdout=subprocess.PIPE, text=True).stdout
        measured = json.loads(output.splitlines()[-1])
        layers = ", ".join(map(str, measured["layers"]))
        cells = [name, f"{measured['family']}, {measured['prediction']}", f"{measured['parameters']:,}", layers]
        cells += [f"{measured[key]:.1f}" for key in ("read", "instant", "beside", "step", "peak")] + [
            f"{measured['size'] / 1e6:.1f}"
        ]
        print(f"{name}: {measured}", flush=True)
        rows.append(cells)
    note = "Random weights, bfloat16, 256 x 256 pixels, batch 2 + 2, gradient checkpointing."
    show("real-size", heads, rows, note, publish=options.publish)


if __name__ == "__main__":
    main()
