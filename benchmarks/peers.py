"""Runs other projects' own code beside ours on the built-in base: what each leaves of a concept, what it keeps, what it costs.

    git clone https://github.com/rohitgandikota/erasing; git clone https://github.com/p1atdev/LECO        # and so on
    OMP_NUM_THREADS=1 python benchmarks/peers.py --esd erasing --leco LECO --uce unified-concept-editing --speed SPEED

Every run has a process and one thread of its own, and the same judge looks at what it made, on prompts that none of them was
made with. What has to differ from a peer's code for it to run here stands in `REPLACED`, and is replaced in memory alone; its
files stay as they are. Seconds are of the processor, without imports and loading the base; memory is the largest that the
process had. Peers that take an anchor or a keep list get the ones that ours takes.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import yaml
from counting import Yardstick, columns
from safetensors.torch import load_file
from tables import add_publish, show

from esd_lora.bases.loading import load_base
from esd_lora.built_in import base_files, domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.evaluation.cases import fill_template
from esd_lora.formats.importing import import_lora
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

FOLDER, SIDE, LATENT_CHANNELS, TEXT_WIDTH, TEXT_LAYERS = str(base_files("emoji")), 64, 8, 96, 2
REPLACED: dict[str, dict[str, dict[str, str]]] = {
    "esd": {
        "esd_sd.py": {
            '"CompVis/stable-diffusion-v1-4"': repr(FOLDER),
            "torch.bfloat16": "torch.float32",
            "height=width=1024": f"height=width={SIDE}",
        }
    },
    "leco": {
        "model_util.py": {
            '"CompVis/stable-diffusion-v1-4"': repr(FOLDER),
            "num_hidden_layers=12 - (clip_skip - 1) if clip_skip is not None else 12": f"num_hidden_layers={TEXT_LAYERS}",
        },
        "train_util.py": {"UNET_IN_CHANNELS = 4": f"UNET_IN_CHANNELS = {LATENT_CHANNELS}"},
        "train_lora.py": {'"cuda:0"': '"cpu"', "unet.enable_xformers_memory_efficient_attention()": "pass"},
    },
    "uce": {"trainscripts/uce_sd_erase.py": {}},
    "speed": {
        "train_erase_null.py": {'"cuda"': '"cpu"', "'cuda'": "'cpu'", "emb_size=768": f"emb_size={TEXT_WIDTH}"}
        | {"from_pretrained(args.sd_ckpt)": "from_pretrained(args.sd_ckpt, torch_dtype=torch.float32)"},
    },
}
"""Peer to its files, the script last, to what is replaced in each."""
ROWS: dict[str, tuple[str, ...]] = {
    "`instant`": ("ours", "instant"),
    "`fast`": ("ours", "fast"),
    "ESD 2025, esd-x, lr 2e-4, 200 steps": ("esd", "2e-4"),
    "LECO, rank 4, lr 1e-3, 200 steps": ("leco", "1e-3"),
    "UCE": ("uce",),
    "SPEED": ("speed", "V"),
    "SPEED, keys and values": ("speed", "KV"),
}
"""Row of the table to peer and settings."""


class Task(NamedTuple):
    """What a row of the table asks for."""

    peer: str
    """Key of `REPLACED`, or `ours`."""
    settings: list[str]
    checkout: Path
    """Checkout of the peer's repository."""
    out: Path
    concept: str
    anchor: str
    """What should appear instead, for those that want one."""
    keep: list[str]
    """What should stay, for those that want that."""
    seed: int


def run_ours(task: Task) -> None:
    """Make an eraser by a preset; anchor and keep list are what it chooses by itself."""
    settings = {"train.seed": task.seed, "train.preview_every": 0}
    recipe = load_recipe(task.settings[0], settings, concepts=[{"name": task.concept, "prompts": [task.concept]}])
    train(recipe, out=task.out, force=True, progress=False)


def run_esd(task: Task) -> None:
    """Run rohitgandikota/erasing, `esd_sd.py`, which erases towards the empty prompt and keeps nothing."""
    arguments = ["--erase_concept", task.concept, "--train_method", "esd-x", "--iterations", 200, "--lr", task.settings[0]]
    run_script("esd", task.checkout, [*arguments, "--device", "cpu", "--save_path", task.out])


def run_leco(task: Task) -> None:
    """Run p1atdev/LECO, `train_lora.py`, which erases towards the empty prompt and keeps nothing.

    Its training methods `xattn` and `selfattn` match no layer; `full` takes every linear of the attention blocks.
    """
    sys.modules["wandb"] = types.ModuleType("wandb")
    task.out.mkdir(parents=True)
    prompts, config = task.out / "prompts.yaml", task.out / "config.yaml"
    prompts.write_text(yaml.safe_dump([{"target": task.concept, "guidance_scale": 1.0, "resolution": SIDE}]))
    config.write_text(
        yaml.safe_dump(
            {
                "prompts_file": str(prompts),
                "pretrained_model": {"name_or_path": FOLDER},
                "network": {"type": "lierla", "rank": 4, "alpha": 1.0, "training_method": "full"},
                "train": {"precision": "float32", "iterations": 200, "lr": float(task.settings[0])},
                "save": {"name": "leco", "path": str(task.out), "per_steps": 1000},
                "logging": {},
                "other": {},
            }
        )
    )
    run_script("leco", task.checkout, ["--config_file", config])


def run_uce(task: Task) -> None:
    """Run rohitgandikota/unified-concept-editing, `uce_sd_erase.py`, with our anchor and keep list."""
    texts = ["--edit_concepts", task.concept, "--guide_concepts", task.anchor, "--preserve_concepts", ";".join(task.keep)]
    arguments = ["--concept_type", "object", "--expand_prompts", "true", "--model_id", FOLDER, "--device", "cpu"]
    run_script("uce", task.checkout, [*texts, *arguments, "--save_dir", task.out, "--exp_name", "uce"])


def run_speed(task: Task) -> None:
    """Run Ouxiang-Li/SPEED, `train_erase_null.py`, with our anchor and keep list."""
    from scipy.cluster.vq import kmeans2

    def kmeans(X: torch.Tensor, num_clusters: int, **_options: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: N803
        centers, labels = kmeans2(X.numpy(), num_clusters, seed=task.seed, minit="++")
        return torch.from_numpy(labels), torch.from_numpy(centers)

    class Column(list[str]):
        def unique(self) -> types.SimpleNamespace:
            return types.SimpleNamespace(tolist=lambda: list(dict.fromkeys(self)))

    def read_csv(path: str) -> dict[str, Column]:
        with Path(path).open(newline="") as file:
            return {"keep": Column(row["keep"] for row in csv.DictReader(file))}

    sys.modules["kmeans_pytorch"] = types.ModuleType("kmeans_pytorch")
    sys.modules["kmeans_pytorch"].kmeans = kmeans  # type: ignore[attr-defined]
    sys.modules["pandas"] = types.ModuleType("pandas")
    sys.modules["pandas"].read_csv = read_csv  # type: ignore[attr-defined]
    task.out.mkdir(parents=True)
    with (task.out / "keep.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["keep"], *([text] for text in task.keep)])
    texts = ["--target_concepts", task.concept, "--anchor_concepts", task.anchor, "--params", task.settings[0]]
    places = ["--sd_ckpt", FOLDER, "--retain_path", task.out / "keep.csv", "--heads", "keep", "--save_path", task.out]
    run_script("speed", task.checkout, [*texts, *places, "--file_name", "speed", "--seed", task.seed])


RUNS: dict[str, Callable[[Task], None]] = {
    "ours": run_ours,
    "esd": run_esd,
    "leco": run_leco,
    "uce": run_uce,
    "speed": run_speed,
}


def run_script(peer: str, checkout: Path, arguments: Sequence[object]) -> None:
    """Run a peer's script as its command line would, with what `REPLACED` says replaced in memory.

    Args:
        peer: Key of `REPLACED`.
        checkout: Of its repository.
        arguments: Of the script.
    """
    sys.path.insert(0, str(checkout))
    os.chdir(checkout)
    *modules, script = REPLACED[peer]
    for name in modules:
        module = types.ModuleType(Path(name).stem)
        sys.modules[module.__name__] = module
        exec(compile(replaced_text(peer, checkout, name), name, "exec"), module.__dict__)
    sys.argv = [script, *map(str, arguments)]
    exec(compile(replaced_text(peer, checkout, script), script, "exec"), {"__name__": "__main__"})


def replaced_text(peer: str, checkout: Path, name: str) -> str:
    """Return the text of a peer's file with what has to be replaced."""
    text = (checkout / name).read_text("utf-8")
    for old, new in REPLACED[peer][name].items():
        if old not in text:
            sys.exit(f"{checkout / name} holds no {old}: another version than the one that this was written for.")
        text = text.replace(old, new)
    return text


class Meter:
    """Counts seconds of the processor that loading takes, and latents through every U-Net."""

    def __init__(self) -> None:
        self.loading, self.latents, self._depth = 0.0, 0, 0

    def start(self) -> None:
        """Watch whatever this process loads and predicts from now on."""
        from diffusers import DiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        for loader in (DiffusionPipeline, UNet2DConditionModel, CLIPTextModel, CLIPTokenizer):
            loader.from_pretrained = self._timed(loader.from_pretrained.__func__)
        forward = UNet2DConditionModel.forward

        def counted(unet: Any, sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self.latents += len(sample)
            return forward(unet, sample, *arguments, **options)

        UNet2DConditionModel.forward = counted

    def _timed(self, load: Callable[..., Any]) -> Any:
        def timed(cls: type, *arguments: Any, **options: Any) -> Any:
            started, self._depth = time.process_time(), self._depth + 1
            try:
                return load(cls, *arguments, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.loading += time.process_time() - started

        return classmethod(timed)


def child(options: argparse.Namespace) -> None:
    """Make what one row asks for, in this process, and write what it cost."""
    torch.set_num_threads(1)
    given = json.loads(options.child)
    task = Task(**{**given, "checkout": Path(given["checkout"]), "out": Path(given["out"])})
    for module in ("diffusers.loaders", "diffusers.pipelines.stable_diffusion", "esd_lora.closed_form"):
        importlib.import_module(module)
    meter = Meter()
    meter.start()
    torch.manual_seed(task.seed)
    importlib.import_module("random").seed(task.seed)
    started = time.process_time()
    RUNS[task.peer](task)
    cost = {
        "seconds": time.process_time() - started - meter.loading,
        "latents": meter.latents,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "size": max(file.stat().st_size for file in task.out.rglob("*") if file.suffix in (".safetensors", ".pt")),
    }
    (task.out / "cost.json").write_text(json.dumps(cost))


def made(out: Path, peer: str) -> Eraser | dict[str, torch.Tensor]:
    """Return what a run made: an eraser, or weights that replace the base's."""
    if peer == "ours":
        return Eraser.load(out)
    if peer == "leco":
        return import_lora(out / "leco_last.safetensors", family="sd")
    file = next(file for file in out.iterdir() if file.suffix in (".safetensors", ".pt"))
    weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return {name: weight.float() for name, weight in weights.items()}


def row(yardstick: Yardstick, out: Path, label: str, checkout: Path, name: str, seed: int, anchor: str) -> dict[str, Any]:
    """Return what one row left, kept and cost for one object.

    Args:
        yardstick: Of the built-in base.
        out: Where everything is kept.
        label: Key of `ROWS`.
        checkout: Of the peer.
        name: Of the object.
        seed: Of the training.
        anchor: What should appear instead.
    """
    peer, *settings = ROWS[label]
    place = (out / f"{'-'.join(ROWS[label])}-{name}-{seed}").resolve()
    concept, keep = fill_template("{a}", name), [text for text in domain("emoji")["keep"] if name not in text.split()]
    if not (place / "cost.json").exists():
        task = Task(peer, settings, checkout.resolve(), place, concept, anchor, keep, seed)
        command = [sys.executable, __file__, "--child", json.dumps(task._asdict(), default=str)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        ended = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(f"{label}: {ended.stderr[-2000:]}")
    cost = json.loads((place / "cost.json").read_text())
    pairs = [pair for each in Eraser.load(out / f"ours-instant-{name}-{seed}").header.concepts for pair in each.pairs]
    without = sorted({prompt for prompt, _ in pairs})
    result = made(place, peer)
    if isinstance(result, Eraser):
        return {**yardstick.measure([result], [name], [], without), **cost}
    return {**yardstick.measure_weights(result, anchor, [name], without), **cost}


MEASURES = {
    "object_left": "left",
    "object_left_high": "at high guidance",
    "kept": "kept",
    "kept_unlisted": "kept, in no list",
    "kept_bare": "kept, no style named",
    "kept_nearest": "kept, nearest",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in REPLACED:
        parser.add_argument(f"--{peer}", type=Path, help="checkout of its repository; without it, it is left out")
    parser.add_argument("--out", type=Path, default=Path("out/peers"))
    parser.add_argument("--concepts", default="cat,rocket,pizza")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    add_publish(parser)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    base = load_base("emoji")
    yardstick = Yardstick(base, options.out / "measured")
    table: list[list[str]] = []
    for label, (peer, *_) in ROWS.items():
        checkout = options.out if peer == "ours" else getattr(options, peer)
        if checkout is None:
            continue
        cells: list[Mapping[str, Any]] = []
        for name in options.concepts.split(","):
            for seed in map(int, options.seeds.split(",")):
                measure = partial(row, yardstick, options.out, label, checkout, name, seed)
                cells.append(measure(anchor_of(options.out, name, seed) if peer != "ours" else ""))
        shown = columns(cells, MEASURES)
        mean = {key: sum(cell[key] for cell in cells) / len(cells) for key in ("seconds", "latents", "memory", "size")}
        costs = [f"{mean['seconds']:.1f}", f"{mean['latents']:.0f}", f"{mean['memory']:.2f}", f"{mean['size'] / 1000:.0f}"]
        table.append([label, *shown, *costs])
    head = ["erased by", *MEASURES.values(), "CPU s", "latents", "GiB", "kB"]
    note = f"{options.concepts}; training seeds {options.seeds}; each in a process and on one thread of its own; mean (worst)."
    show("peers", head, table, note, publish=options.publish)


def anchor_of(out: Path, name: str, seed: int) -> str:
    """Return the anchor that ours chose, for peers that want one."""
    concept = Eraser.load(out / f"ours-instant-{name}-{seed}").header.concepts[0]
    return dict(concept.pairs)[fill_template("{a}", name)]


if __name__ == "__main__":
    main()
