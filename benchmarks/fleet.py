"""Prints the tables of docs/fleet.md: what a second worker brings, what the driver costs, and what kills do to a fleet.

    python benchmarks/fleet.py [--out out/fleet] [--requests 1000] [--kills 20] [--only throughput,shape,kills] [--publish]

`throughput` runs a list of made-up names, and the built-in base's own objects among them, by `instant` on the built-in base,
with one and with two one-thread workers; nothing is measured and no picture is painted, so the driver has most to do. `shape`
does the same with fewer (`--shaped-requests 40`) on Stable Diffusion 1.5's U-Net with random weights, whose keys and values
read text that is 768 wide from a text encoder of one layer: what a request solves is of real size, what it encodes is not.
`kills` runs a shorter list twice: once undisturbed, once with workers killed at random times and the driver once; then both
hold the same, tensor by tensor, and every request ended as done once.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

import psutil
from tables import ROOT, add_publish, show

sys.path.insert(0, str(ROOT / "tests"))

from esd_lora.built_in import domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.fleet.running import read_events
from esd_lora.fleet.status import folder_of

SYLLABLES = ("ba", "do", "fe", "gu", "ka", "li", "mo", "ne", "pu", "ra", "si", "to", "ve", "wi", "zu")


def write_requests(file: Path, count: int) -> list[str]:
    """Write a list of objects, the built-in base's own first, the rest made-up names; return the ids."""
    generator = random.Random(0)
    names = [f"a {name}" for name in domain("emoji")["objects"]][:count]
    while len(names) < count:
        name = f"a {''.join(generator.choices(SYLLABLES, k=4))}"
        names += [name] if name not in names else []
    ids = [f"r{number:05d}" for number in range(count)]
    lines = [f"{one},{name},object" for one, name in zip(ids, names, strict=True)]
    file.write_text("\n".join(["id,concept,kind", *lines]) + "\n")
    return ids


def write_shaped(folder: Path) -> str:
    """Write the base of `shape` unless it is there, and return its path."""
    if not (folder / "model_index.json").is_file():
        import torch
        from real_size import fill
        from transformers import CLIPTextConfig, CLIPTextModel

        from published_denoisers import denoiser
        from tiny import tiny_pipeline, tiny_tokenizer

        pipe = tiny_pipeline()
        wide = {"hidden_size": 768, "intermediate_size": 768, "num_attention_heads": 12, "max_position_embeddings": 77}
        encoder = CLIPTextModel(CLIPTextConfig(**{**pipe.text_encoder.config.to_dict(), **wide}))
        pipe.register_modules(unet=fill(denoiser("sd15"), torch.float32), text_encoder=encoder, tokenizer=tiny_tokenizer(77))
        pipe.save_pretrained(folder)
    return str(folder)


def start(listed: Path, out: Path, workers: int, base: str = "emoji") -> subprocess.Popen[bytes]:
    """Start a fleet, in a process of its own."""
    command = [sys.executable, "-m", "esd_lora", "fleet", str(listed), "--base", base, "-o", str(out), "--recipe", "instant"]
    command += [
        "--suite",
        "object=",
        "-s",
        "train.preview_every=0",
        "--workers",
        str(workers),
        "--threads",
        "1",
        "--attempts",
        "9",
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def watched(fleet: subprocess.Popen[bytes], out: Path) -> dict[str, float]:
    """Wait for a fleet, and return its seconds from the first end to the last, and what its driver took."""
    driver = psutil.Process(fleet.pid)
    memory: dict[int, float] = {}
    spent = begun = 0.0
    began_after = 0.0
    while fleet.poll() is None:
        try:
            ended = sum(1 for _ in read_events(out))
            memory[ended] = driver.memory_info().rss / 1e6
            times = driver.cpu_times()
            spent = times.user + times.system
            if ended and not begun:
                begun, began_after = time.monotonic(), spent
        except psutil.NoSuchProcess:
            break
        time.sleep(0.5)
    if fleet.returncode:
        raise SystemExit(f"the fleet in {out} failed")
    seconds = time.monotonic() - begun
    tenth = min(memory, key=lambda count: abs(count - max(memory) / 10))
    return {
        "seconds": seconds,
        "driver": (spent - began_after) / seconds,
        "memory at a tenth": memory[tenth],
        "memory": memory[max(memory)],
    }


def throughput(out: Path, count: int, *, base: str = "emoji", name: str = "fleet-throughput", publish: bool) -> None:
    """Run the list with one worker and with two."""
    out.mkdir(exist_ok=True)
    listed = out / "requests.csv"
    write_requests(listed, count)
    rows: list[list[str]] = []
    paces: list[float] = []
    for workers in (1, 2):
        run = watched(start(listed, out / f"workers-{workers}", workers, base), out / f"workers-{workers}")
        paces.append((count - 1) / run["seconds"])
        cells = [str(workers), f"{run['seconds']:.0f}", f"{paces[-1]:.2f}", f"{paces[-1] / paces[0]:.2f}"]
        cells += [f"{run['driver']:.1%}", f"{run['memory at a tenth']:.0f}", f"{run['memory']:.0f}"]
        rows.append(cells)
    head = ["workers", "s", "requests a second", "times one worker", "driver's CPU", "driver's MB after a tenth", "at the end"]
    note = f"{count} requests, `instant`, one thread a worker, nothing measured; from the first end to the last."
    show(name, head, rows, note, publish=publish)


def kills(out: Path, count: int, number: int, *, publish: bool) -> None:
    """Run a list undisturbed and disturbed, and compare."""
    listed = out / "few.csv"
    ids = write_requests(listed, count)
    calm, stormy = out / "calm", out / "stormy"
    if start(listed, calm, 2).wait():
        raise SystemExit("the undisturbed fleet failed")
    generator = random.Random(1)
    killed = Counter[str]()
    fleet = begun(listed, stormy)
    while killed["workers"] < number or not killed["driver"]:
        time.sleep(generator.uniform(3, 10))
        if fleet.poll() is not None:
            raise SystemExit(f"the fleet ended after {killed['workers']} kills: give more --requests")
        if killed["workers"] == number // 2 and not killed["driver"]:
            fleet.send_signal(signal.SIGKILL)
            fleet.wait()
            killed["driver"] += 1
            fleet = begun(listed, stormy)
            continue
        workers = [child for child in psutil.Process(fleet.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        if workers:
            generator.choice(workers).kill()
            killed["workers"] += 1
    if fleet.wait():
        raise SystemExit("the disturbed fleet failed")
    done = Counter(str(event["id"]) for event in read_events(stormy) if event["state"] == "done")
    same = sum(hash_of(calm, one) == hash_of(stormy, one) for one in ids)
    rows = [[str(count), str(killed["workers"]), str(killed["driver"]), str(sum(done[one] == 1 for one in ids)), str(same)]]
    head = ["requests", "workers killed", "drivers killed", "done exactly once", "same tensors as undisturbed"]
    note = "`instant`, two one-thread workers, kills at random times. Headers differ in dates and seconds."
    show("fleet-kills", head, rows, note, publish=publish)


def begun(listed: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start a fleet of two workers, and wait until one has ended a job: a base that no worker can load ends a fleet."""
    before = sum(1 for _ in read_events(out))
    fleet = start(listed, out, 2)
    while fleet.poll() is None and sum(1 for _ in read_events(out)) == before:
        time.sleep(0.2)
    return fleet


def hash_of(out: Path, request: str) -> str:
    """Return the SHA-256 of a request's tensors."""
    return hash_tensors(Eraser.load(folder_of(out, request)).state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/fleet"))
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--shaped-requests", type=int, default=40)
    parser.add_argument("--killed-requests", type=int, default=300)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default="throughput,shape,kills")
    add_publish(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if "throughput" in options.only:
        throughput(options.out, options.requests, publish=options.publish)
    if "shape" in options.only:
        out, base = options.out / "shaped", write_shaped(options.out / "sd15-shaped")
        throughput(out, options.shaped_requests, base=base, name="fleet-shape", publish=options.publish)
    if "kills" in options.only:
        kills(options.out, options.killed_requests, options.kills, publish=options.publish)


if __name__ == "__main__":
    main()
