"""Prints what one batched sample evaluation of the built-in base costs, beside the VAE's decoding of one picture.

python benchmarks/sample_evaluation.py
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from esd_lora.families import load_base

BATCH, REPEATS = 32, 20


def main() -> None:
    torch.set_num_threads(2)
    base = load_base("emoji")
    x_t, t = torch.randn(BATCH, *base.family.latent_shape(base.pipe)), torch.full((BATCH,), 500)
    condition = base.encode(["a cat in noto style"] * BATCH)
    evaluate = lambda: base.predict(x_t, t, condition)  # noqa: E731
    decode = lambda: base.pipe.vae.decode(x_t).sample  # noqa: E731
    for label, call in (("U-Net, a sample evaluation", evaluate), ("VAE, a decoded picture", decode)):
        with torch.no_grad():
            call()
            times = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                call()
                times.append((time.perf_counter() - started) / BATCH * 1000)
        print(f"{label}: median {sorted(times)[REPEATS // 2]:.2f} ms, fastest {min(times):.2f} ms (batch {BATCH}, 2 threads)")


if __name__ == "__main__":
    main()
