"""Prints what the built-in base costs: a sample evaluation, a training sample and a decoded picture, in batches of 32.

    python benchmarks/sample_evaluation.py

Everything is measured under three ways for OpenMP threads to wait for each other, in turn and each in a process of its own,
because that is read when torch is loaded: `esd-lora` chooses the first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

BATCH, REPEATS, ROUNDS, THREADS = 32, 12, 2, 2
WAITS = {
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OpenMP's default": {},
}


def measure() -> dict[str, list[float]]:
    """Milliseconds a sample of each kind of work, `REPEATS` times."""
    import torch

    from esd_lora.adapter import add_adapter
    from esd_lora.bases.loading import load_base
    from esd_lora.recipe_files import load_recipe

    torch.set_num_threads(THREADS)
    base = load_base("emoji")
    x_t, t = torch.randn(BATCH, *base.latent_shape()), torch.full((BATCH,), 500)
    condition = base.encode(["a cat in noto style"] * BATCH)

    def times(call: Callable[[], object]) -> list[float]:
        out: list[float] = []
        for _ in range(REPEATS + 2):
            started = time.perf_counter()
            call()
            out.append((time.perf_counter() - started) / BATCH * 1000)
        return out[2:]

    with torch.no_grad():
        found = {
            "sample evaluation": times(lambda: base.predict(x_t, t, condition)),
            "decoded picture": times(lambda: base.pipe.vae.decode(x_t).sample),
        }
    layers = base.family.modules(base.model, "xattn")
    add_adapter(base, layers, load_recipe("fast", concepts=["a cat"]).lora, seed=0)
    found["training sample"] = times(lambda: base.predict(x_t, t, condition).square().mean().backward())
    return found


def main() -> None:
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure()))
        return
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found: dict[str, dict[str, list[float]]] = {wait: {} for wait in WAITS}
    for _ in range(ROUNDS):
        for wait, setting in WAITS.items():
            run = subprocess.run(
                [sys.executable, __file__, "--measure"], env=clean | setting, check=True, capture_output=True, text=True
            )
            for work, times in json.loads(run.stdout).items():
                found[wait].setdefault(work, []).extend(times)
    chosen = found[next(iter(WAITS))]
    for work in chosen:
        print(f"{work} (batch {BATCH}, {THREADS} threads)")
        for wait, kinds in found.items():
            middle = statistics.median(kinds[work])
            ratio = middle / statistics.median(chosen[work])
            print(f"  {wait:<24} median {middle:5.2f} ms, fastest {min(kinds[work]):5.2f} ms, {ratio:.2f} x the first")


if __name__ == "__main__":
    main()
