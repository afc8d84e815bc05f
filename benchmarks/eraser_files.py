"""Work on eraser files at the size of published models: seconds and memory, each beside an alternative where there is one.

    python benchmarks/eraser_files.py [--only merge,copying,files,fusing,sampling] [--rounds 7] [--out out/eraser_files]

Weights are random, layers and shapes those of Stable Diffusion 1.5 and SDXL, so nothing is said about erasure. `merge` merges
into a float32 U-Net of SD 1.5 in one file (3.4 GB) and into whole float16 checkpoints, in turn with `cp` of the same file, and
with `cp` and `sync`, since a merged file is on the disk before it has its name: the ratio is to the latter, the median of those
within a round. CPU seconds of a merge and of `cp` and `sync` say what other work on the machine hides. `copying` is the copy
within a merge alone. `files` does everything else that is done with eraser files. `fusing` finds the closed form of ten erasers
of cross-attention on SD 1.5, and of ten of keys and values on SDXL, beside the package's keep list: what the base itself takes,
denoising and encoding text, is told apart, and latents are of 256 x 256 pixels, because of larger ones no more rows count.
`sampling` asks a U-Net of SD 1.5's size for predictions with ten erasers on: fused into one stack, as one adapter of ten times
the rank, and as ten adapters under diffusers' `set_adapters`, each in turn with the bare base in the same process.

Memory is what a step needs at its peak beyond what the process held before it (VmHWM of a fresh process).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tables import add_publish, show
from timing import timed
from tqdm import tqdm, trange

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

FAMILY = {"sd15": "sd", "sdxl": "sdxl"}
ERASERS, RANK = 10, 4
PAIRS = 8  # of predictions a round
PARTS = (
    "hashing the base",
    "copying untouched",
    "reading touched",
    "adding and rounding",
    "looking for NaN",
    "writing touched",
    "waiting for the disk",
)
"""What a merge does."""


def field(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, and peak bytes beyond what is held now."""
    Path("/proc/self/clear_refs").write_text("5")  # has VmHWM start anew
    before, started = field("VmRSS"), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - started, "memory": field("VmHWM") - before}


def write_erasers(model: str, folder: Path) -> None:
    """Ten erasers of all layers, ten of cross-attention, with random factors of rank 4 and the size of trained ones."""
    import torch

    from esd_lora.erasers.eraser import Eraser, LoraPair
    from published_denoisers import denoiser
    from random_erasers import build_header
    from toy_denoisers import layers_of

    unet = denoiser(model)
    layers = dict(unet.named_modules())
    for scope in ("full", "xattn"):
        for i in range(ERASERS):
            generator = torch.Generator().manual_seed(i)
            pairs: dict[str, LoraPair] = {}
            for module in layers_of(FAMILY[model], unet, scope):
                out, *rest = layers[module].weight.shape
                down = torch.randn(RANK, *rest, generator=generator) * 0.02
                pairs[module] = LoraPair(down, torch.randn(out, RANK, *[1] * (len(rest) - 1), generator=generator) * 0.02)
            # Some hash for every layer, that a merge may do the work of comparing it.
            header = build_header(f"concept {i}", family=FAMILY[model], scope=scope, base_hashes=dict.fromkeys(pairs, "0" * 16))
            Eraser(pairs, header).save(folder / f"{model}-{scope}-{i}")


def write_unet(folder: Path) -> None:
    """SD 1.5's U-Net in float32 under the original names."""
    import torch
    from real_size import fill
    from safetensors.torch import save_file

    import original_checkpoints
    from published_denoisers import denoiser

    save_file(
        {n: t.contiguous() for n, t in original_checkpoints.unet(fill(denoiser("sd15"), torch.float32)).items()},
        folder / "unet.safetensors",
    )


def merge_steps(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Merges into one file, in turn with `cp`, and proves the last result."""
    import warnings

    warnings.simplefilter("ignore")  # the erasers are of no weights in particular
    from esd_lora.weights.merging import merge
    from esd_lora.weights.verifying import verify

    model = "sdxl" if name == "sdxl" else "sd15"
    source, out, copy = folder / f"{name}.safetensors", folder / "merged.safetensors", folder / "copy.safetensors"
    found: dict[str, Any] = {"size": source.stat().st_size}
    for scope in ("xattn", "full"):
        eraser = folder / f"{model}-{scope}-0"
        times: dict[str, list[float]] = {"cp": [], "cp and sync": [], "merge": []}
        work: dict[str, list[float]] = {what: [] for what in times}
        memory = 0.0
        for i in trange(rounds, desc=f"{name} {scope}"):
            for what in sorted(times, reverse=bool(i % 2)):
                for file in (out, copy):
                    file.unlink(missing_ok=True)
                os.sync()
                before = sum(os.times()[:4])
                if what.startswith("cp"):
                    started = time.perf_counter()
                    subprocess.run(["cp", source, copy], check=True)
                    if what == "cp and sync":  # on the disk, as a merged file is before it has its name
                        subprocess.run(["sync", copy], check=True)
                    times[what].append(time.perf_counter() - started)
                else:
                    step = measured(lambda eraser=eraser: merge([eraser], source, out, progress=False))
                    times[what].append(step["seconds"])
                    memory = max(memory, step["memory"])
                work[what].append(sum(os.times()[:4]) - before)
        proof = measured(lambda eraser=eraser: verify(out, source, [eraser]))
        middle = {what: statistics.median(values) for what, values in times.items()}
        ratios = [ours / theirs for ours, theirs in zip(times["merge"], times["cp and sync"], strict=True)]
        found[scope] = {**middle, "ratio": statistics.median(ratios), "memory": memory, "verify": proof}
        found[scope]["work"] = {what: statistics.median(values) for what, values in work.items()}
        found[scope]["ranges"] = {what: [min(values), max(values)] for what, values in times.items()}
        out.unlink()
        found[scope]["profile"] = profile_merge(eraser, source, out)
    for file in (out, copy):
        file.unlink(missing_ok=True)
    return found


def profile_merge(eraser: Path, source: Path, out: Path) -> dict[str, float]:
    """CPU seconds of one merge by what it does, threads added up."""
    from esd_lora import files
    from esd_lora.weights import merging, streaming

    spent = dict.fromkeys(PARTS, 0.0)
    places = (merging, streaming, streaming, streaming, streaming, streaming, files)
    names = ("hash_weight", "_copy", "_read", "_add", "all_finite", "_write", "sync")
    with ExitStack() as stack:
        for part, owner, name in zip(PARTS, places, names, strict=True):
            stack.enter_context(timed(spent, part, owner, name, time.thread_time))
        before = time.process_time()
        merging.merge([eraser], source, out, progress=False)
        whole = time.process_time() - before
    spent["adding and rounding"] -= sum(spent[part] for part in ("reading touched", "looking for NaN", "writing touched"))
    return {**spent, "all else": whole - sum(spent.values())}


def copying_steps(folder: Path, rounds: int) -> dict[str, float]:
    """CPU seconds of having the kernel copy all tensors, by where its turns begin.

    The file is read anew first, from front to back; if its pages came in otherwise, their pieces may be too small to matter.
    """
    from esd_lora.erasers.tensor_files import read_header
    from esd_lora.weights.streaming import _TURN

    source, out = folder / "sd15.safetensors", folder / "copy.safetensors"
    start, size = read_header(source).start, source.stat().st_size
    with source.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        hashlib.file_digest(file, "sha256")
    seconds: dict[str, list[float]] = {"with the tensors": [], "at multiples of 8 MiB": []}
    for i in trange(rounds, desc="copying"):
        for where in sorted(seconds, reverse=bool(i % 2)):
            out.unlink(missing_ok=True)
            os.sync()
            with source.open("rb") as old, out.open("wb") as new:
                new.truncate(size)
                begun, at = time.process_time(), start
                while at < size:
                    turn = _TURN - at % _TURN if where != "with the tensors" else _TURN
                    at += os.copy_file_range(old.fileno(), new.fileno(), min(turn, size - at), at, at)
                seconds[where].append(time.process_time() - begun)
    out.unlink()
    return {where: statistics.median(values) for where, values in seconds.items()}


def file_steps(model: str, folder: Path) -> dict[str, dict[str, float]]:
    """Everything else, on erasers of all layers."""
    import warnings

    warnings.simplefilter("ignore")
    from esd_lora.erasers.eraser import Eraser
    from esd_lora.erasers.stacking import compress, stack
    from esd_lora.formats.exporting import export
    from esd_lora.formats.importing import import_lora
    from esd_lora.formats.inspecting import diff, inspect_file
    from esd_lora.fusing.interference import measure_interference
    from esd_lora.weights.extracting import extract
    from esd_lora.weights.merging import merge

    paths = [folder / f"{model}-full-{i}" for i in range(ERASERS)]
    source, tuned = folder / f"{model}.safetensors", folder / f"{model}-tuned.safetensors"
    members = [Eraser.load(path) for path in paths]
    stacked = stack(members)
    kohya = folder / "kohya.safetensors"
    steps: dict[str, Callable[[], Any]] = {
        f"load {ERASERS} erasers": lambda: [Eraser.load(path) for path in paths],
        f"stack {ERASERS}": lambda: stack(members),
        f"compress {ERASERS * RANK} to rank 8": lambda: compress(stacked, rank=8),
        "save": lambda: stacked.save(folder / "stacked"),
        "export to kohya": lambda: export(stacked, kohya, layout="kohya", force=True),
        "import from kohya": lambda: import_lora(kohya),
        "inspect": lambda: inspect_file(folder / "stacked"),
        "diff": lambda: diff(folder / "stacked", kohya),
        "interference of 10, files alone": lambda: measure_interference(members),
        "merge": lambda: merge([paths[0]], source, tuned, force=True, progress=False),
        f"extract at rank {RANK}": lambda: extract(source, tuned, rank=RANK, progress=False),
    }
    if model == "sd15":  # of SDXL's size it takes more than an hour here

        def on_base() -> None:
            from esd_lora.bases.loading import load_base

            measure_interference(members[:2], base=load_base(source, vae=False))

        steps["interference of 2, on the base"] = on_base
    found = {name: measured(step) for name, step in tqdm(steps.items(), desc=model)}
    tuned.unlink()
    return found


def fusing_steps(model: str, folder: Path) -> dict[str, Any]:
    """The closed form on a whole base: seconds of the base's own work, of the rest, evaluations, memory."""
    import warnings
    from unittest.mock import patch

    warnings.simplefilter("ignore")
    from esd_lora.bases.base import Base
    from esd_lora.bases.loading import load_base
    from esd_lora.erasers.eraser import Eraser
    from esd_lora.fusing.closed_form import fuse
    from esd_lora.fusing.moments import Moment

    members = [Eraser.load(folder / f"{model}-xattn-{i}") for i in range(ERASERS)]
    dtype = "float32" if model == "sd15" else "bfloat16"
    base = load_base(folder / f"{model}.safetensors", vae=False, dtype=dtype)
    if model == "sdxl":
        text = base.family.reads_text
        members = [Eraser({m: p for m, p in e.pairs.items() if text(m)}, e.header) for e in members]
    spent = {"predict": 0.0, "encode": 0.0, "add": 0.0}
    evaluations: list[int] = []
    small = patch.object(Base, "latent_shape", lambda _: (4, 32, 32))
    with ExitStack() as stack:
        for owner, name in ((Base, "predict"), (Base, "encode"), (Moment, "add")):
            stack.enter_context(timed(spent, name, owner, name))
        stack.enter_context(small)
        found = measured(lambda: evaluations.append(fuse(members, base).header.fusions[-1].evaluations))
    found |= {"denoising": spent["predict"] - spent["add"], "encoding": spent["encode"], "evaluations": evaluations[0]}
    return {**found, "own": found["seconds"] - found["denoising"] - found["encoding"], "layers": len(members[0].pairs)}


def sampling_steps(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a guided prediction at 256 x 256 pixels, and the median ratio to the bare base's right before or after it."""
    import copy

    import torch
    from real_size import fill

    from esd_lora.adapter import AppliedStack
    from esd_lora.erasers.eraser import Eraser
    from esd_lora.erasers.stacking import stack
    from published_denoisers import denoiser

    base: Any = fill(denoiser("sd15"), torch.float32)
    members = [Eraser.load(folder / f"sd15-xattn-{i}") for i in range(ERASERS)]
    stacked = stack(members)
    x_t, t, text = torch.randn(2, 4, 32, 32), torch.tensor([500, 500]), torch.randn(2, 77, 768)

    @torch.no_grad()
    def predict(unet: Any) -> float:
        started = time.perf_counter()
        unet(x_t, t, encoder_hidden_states=text)
        return time.perf_counter() - started

    class Loaded:
        def __init__(self, unet: Any):
            self.layers = dict(unet.named_modules())

        def weights(self, pairs: dict[str, Any]) -> Any:
            return ((path, self.layers[path].weight) for path in pairs)

    def fused(unet: Any) -> None:
        AppliedStack(Loaded(unet), stacked).set_strength(1.0)  # type: ignore[arg-type]

    def adapters(erasers: list[Eraser]) -> Callable[[Any], None]:
        def load(unet: Any) -> None:
            for i, eraser in enumerate(erasers):
                state = {key.removeprefix("unet."): tensor for key, tensor in eraser.state_dict().items()}
                unet.load_lora_adapter(state, adapter_name=f"esd_{i}", prefix=None)
            unet.set_adapters([f"esd_{i}" for i in range(len(erasers))])

        return load

    ways: dict[str, Callable[[Any], None]] = {
        "base again": lambda _unet: None,  # what the clock itself is worth
        "one fused stack (esd-lora)": fused,
        "one adapter of the stack (load_lora_weights)": adapters([stacked]),
        "ten adapters (set_adapters)": adapters(members),
    }
    found: dict[str, Any] = {}
    for name, put_on in ways.items():
        unet = copy.deepcopy(base)
        put_on(unet)
        predict(base), predict(unet)
        times: list[tuple[float, float]] = []
        for i in trange(PAIRS * rounds, desc=name):
            first = predict(unet) if i % 2 else 0.0
            bare = predict(base)
            times.append((first or predict(unet), bare))
        ratios = [on / off for on, off in times]
        found[name] = {"seconds": statistics.median(on for on, _ in times), "ratio": statistics.median(ratios)}
        quarters = statistics.quantiles(ratios, n=4)
        found[name]["spread"] = [quarters[0], quarters[2]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="merge,copying,files,fusing,sampling")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/eraser_files"))
    add_publish(parser)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        kind, _, name = options.stage.partition(":")
        if kind == "write":
            write_unet(options.out) if name == "unet" else write_erasers(name, options.out)
        elif kind == "checkpoint":
            from real_size import write_single_file

            write_single_file(name, options.out)
        else:
            steps = {
                "merge": lambda: merge_steps(name, options.out, options.rounds),
                "copying": lambda: copying_steps(options.out, options.rounds),
                "files": lambda: file_steps(name, options.out),
                "fusing": lambda: fusing_steps(name, options.out),
                "sampling": lambda: sampling_steps(options.out, options.rounds),
            }
            print(json.dumps(steps[kind]()))
        return

    def stage(name: str) -> Any:
        command = [sys.executable, __file__, "--rounds", str(options.rounds), "--out", str(options.out), "--stage", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        kinds = ("merge", "copying", "files", "fusing", "sampling")
        return json.loads(output.splitlines()[-1]) if name.split(":")[0] in kinds else None

    wanted = options.only.split(",")
    for model in FAMILY:
        if not (options.out / f"{model}-xattn-{ERASERS - 1}").is_dir():
            stage(f"write:{model}")
        if set(wanted) & {"merge", "copying", "files", "fusing"} and not (options.out / f"{model}.safetensors").is_file():
            stage(f"checkpoint:{model}")
    if "merge" in wanted:
        if not (options.out / "unet.safetensors").is_file():
            stage("write:unet")
        columns = ("merge", "cp", "cp and sync")
        head = ["checkpoint", "GB", "scope", "merge s", "cp s", "cp and sync s", "merge / that", "CPU s, merge"]
        head += ["CPU s, cp and sync", "peak MB", "verify s", "verify peak MB"]
        merges: list[list[str]] = []
        shares: list[list[str]] = []
        for name in ("unet", "sd15", "sdxl"):
            found = stage(f"merge:{name}")
            for scope in ("xattn", "full"):
                row, proof = found[scope], found[scope]["verify"]
                seconds = {what: f"{row[what]:.1f} ({low:.1f} to {high:.1f})" for what, (low, high) in row["ranges"].items()}
                work = [f"{row['work'][what]:.2f}" for what in ("merge", "cp and sync")]
                costs = [f"{row['memory'] / 1e6:.0f}", f"{proof['seconds']:.1f}", f"{proof['memory'] / 1e6:.0f}"]
                whole = [seconds[what] for what in columns]
                merges.append([name, f"{found['size'] / 1e9:.1f}", scope, *whole, f"{row['ratio']:.2f}", *work, *costs])
                shares.append([name, scope, *(f"{spent:.2f}" for spent in row["profile"].values())])
        note = f"Random weights; medians of {options.rounds}, and the whole range."
        show("merging", head, merges, note, publish=options.publish)
        show("merging-shares", ["CPU s", "scope", *PARTS, "all else"], shares, publish=options.publish)
    if "copying" in wanted:
        for where, spent in stage("copying:").items():
            print(f"copied by the kernel in {spent:.2f} CPU s where its turns begin {where}")
        print(flush=True)
    if "files" in wanted:
        tables = {model: stage(f"files:{model}") for model in FAMILY}
        print("| all layers, rank 4 | " + " | ".join(f"{m} s | {m} peak MB" for m in tables) + " |\n" + "|---" * 5 + "|")
        for name in tables["sd15"]:
            found = [table.get(name) for table in tables.values()]
            cells = [f"{step['seconds']:.1f} | {step['memory'] / 1e6:.0f}" if step else "not run |" for step in found]
            print(f"| {name} | " + " | ".join(cells) + " |")
        print(flush=True)
    if "fusing" in wanted:
        print(
            "| closed form of ten | layers | s | peak MB | base evaluations | s denoising | s encoding text |\n"
            + "|---" * 7
            + "|"
        )
        for model in FAMILY:
            row = stage(f"fusing:{model}")
            print(
                f"| {model}, {'xattn' if model == 'sd15' else 'xattn-kv'} | {row['layers']} | {row['own']:.0f} |"
                f" {row['memory'] / 1e6:.0f} | {row['evaluations']} | {row['denoising']:.0f} | {row['encoding']:.0f} |",
                flush=True,
            )
        print()
    if "sampling" in wanted:
        print(f"medians of {PAIRS * options.rounds} pairs, and the middle half of their ratios\n")
        title = f"{ERASERS} erasers on SD 1.5's U-Net, xattn, rank {RANK}"
        print(f"| {title} | s a prediction | x the base | middle half |\n" + "|---" * 4 + "|")
        for name, row in stage("sampling:").items():
            low, high = row["spread"]
            print(f"| {name} | {row['seconds']:.2f} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} |")
    if shutil.which("du"):
        print(f"\nfiles are left in {options.out}")


if __name__ == "__main__":
    main()
