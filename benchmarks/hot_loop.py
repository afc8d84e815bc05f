"""Prints how close training is to the machine's limit: a walk and a step beside the bare network, and what a step is made of.

    python benchmarks/hot_loop.py [--base emoji|sd15] [--device cpu] [--compile] [--out out/hot_loop]

*Bare* is the base's own network called in a plain loop in the same dtype and batch: forward without gradients for a walk, and
forward with backward down to its input for a step, no LoRA on it. Everything is measured in turn, round after round, and the
medians are compared; FLOP are counted by torch and stand beside a large matrix product, measured in the same run. `sd15` is a
U-Net of that size with random weights, on latents of 256 x 256 pixels. Shares are of time inside operators, by
`torch.profiler`; *python and the rest* is time in which no operator ran. `--compile` instead compares the network as it is with
its weights in `channels_last`, and with its repeated blocks compiled as well, one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

import torch
from tables import add_publish, show
from torch.utils.flop_counter import FlopCounterMode

from esd_lora.adapter import adapter_disabled, add_adapter
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.recipe_files import load_recipe
from esd_lora.teacher import refill
from esd_lora.training import prepare_prompts, run_steps, start

ROUNDS, STEPS = 5, 10
SIZES: dict[str, dict[str, Any]] = {
    "emoji": {"train.trajectories": 16, "train.preserve_trajectories": 16, "train.trajectory_steps": 4},
    "sd15": {
        **{"train.trajectories": 1, "train.preserve_trajectories": 1, "train.trajectory_steps": 2, "train.resolution": 256},
        **{"train.batch_size": 1, "train.preserve_batch": 1, "train.null_batch": 0},
    },
}
KINDS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::linear", "aten::matmul", "mkldnn_linear"),
    "convolutions": ("conv",),
    "attention": ("attention",),
    "normalisation": ("norm",),
}


def recipe_for(size: str, base: str) -> Any:
    """Return a recipe in which nothing is left to be measured: its steps are all that runs."""
    fixed = {"train.steps": STEPS, "train.lr": 1e-3, "train.preserve_weight": 1.0, "train.refresh_every": 1000, "eta": 1.0}
    return load_recipe("fast", {**fixed, **SIZES[size], "closed_form": None, "anchor": None}, concepts=["a cat"], base=base)


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes, until its device is done."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Loop:
    """A training that is about to begin, with the bare network beside it.

    Args:
        size: Of `SIZES`.
        device: Of both.
        folder: For what has to be written.
    """

    def __init__(self, size: str, device: str, folder: Path):
        source = "emoji" if size == "emoji" else str(written(size, folder))
        self.base, self.bare = (load_base(source, device=device, dtype=torch.float32, vae=False) for _ in range(2))
        self.recipe = recipe_for(size, source)
        self.teacher, *_, self.guard, _ = prepare_prompts(self.base, self.recipe, ())
        spec = self.teacher.spec
        parameters = add_adapter(self.base, self.base.family.modules(self.base.model, self.recipe.scope), self.recipe.lora, 0)
        self.state = start(self.teacher, parameters, {}, None, ())
        self.shapes = [self.bare.latent_shape((spec.resolution,) * 2 if spec.resolution else None)]
        self.batch = spec.batch_size + (spec.preserve_batch if self.teacher.preserved else 0) + spec.null_batch
        self.sent = self.batches_of_a_walk()

    def batches_of_a_walk(self) -> list[int]:
        """Return how many latents a refill sends through the network, call by call."""
        sizes: list[int] = []
        predict = self.base.predict

        def counting(x_t: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
            sizes.append(len(x_t))
            return predict(x_t, t, condition)

        self.base.predict = counting  # type: ignore[method-assign]
        self.refill()
        del self.base.predict
        return sizes

    def refill(self) -> None:
        """Walk all trajectories of a refresh."""
        refill(self.teacher, 0, self.shapes)

    def inputs(self, base: Base, count: int) -> tuple[Any, ...]:
        """Return latents, times and a condition for `count` pictures."""
        device = base.model.device
        known = base.encode(["a dog"])
        condition = {name: value.expand(count, *value.shape[1:]).contiguous() for name, value in known.items()}
        return torch.randn(count, *self.shapes[0], device=device), torch.full((count,), 500, device=device), condition

    def bare_walk(self) -> None:
        """Call the bare network as often and in the batches that a refill does."""
        with torch.inference_mode():
            for count in self.sent:
                self.bare.family.predict(self.bare.pipe, *self.walk_inputs[count])

    def bare_step(self) -> None:
        """Go forward and backward through the bare network once, in the batch of a step."""
        x_t, t, condition = self.step_inputs
        self.bare.family.predict(self.bare.pipe, x_t.requires_grad_(), t, condition).square().mean().backward()

    def steps(self) -> list[float]:
        """Return how long each of some steps takes, but for the first, which walks."""
        moments: list[float] = []
        self.state.step, self.state.stopped = 0, False
        run_steps(self.teacher, self.state, [lambda _: moments.append(time.perf_counter()) or False], guard=self.guard)
        return [after - before for before, after in itertools.pairwise(moments)]

    def measure(self) -> dict[str, float]:
        """Return the median seconds of everything."""
        self.walk_inputs = {count: self.inputs(self.bare, count) for count in set(self.sent)}
        self.step_inputs = self.inputs(self.bare, self.batch)
        square = torch.randn(2048, 2048, device=self.base.model.device)
        times: defaultdict[str, list[float]] = defaultdict(list)
        for _ in range(ROUNDS + 1):
            times["product"].append(seconds(lambda: square @ square))
            times["bare walk"].append(seconds(self.bare_walk))
            times["walk"].append(seconds(self.refill))
            times["bare step"].append(statistics.median(seconds(self.bare_step) for _ in range(STEPS - 1)))
            times["step"].append(statistics.median(self.steps()))
        return {name: statistics.median(each[1:]) for name, each in times.items()}


def compare_compiled(loop: Loop, publish: bool) -> None:
    """Print how fast the student's network is as it is, in another memory format, and compiled."""
    base = loop.base
    inputs = loop.inputs(base, loop.batch)

    def forward() -> None:
        with torch.no_grad(), adapter_disabled(base):
            base.predict(*inputs)

    def step() -> None:
        base.predict(*inputs).square().mean().backward()

    changes: dict[str, Callable[[], object]] = {
        "as it is": lambda: None,
        "channels_last": lambda: base.model.to(memory_format=torch.channels_last),
        "and blocks compiled": lambda: base.model.compile_repeated_blocks(),
    }
    rows: list[list[str]] = []
    for name, change in changes.items():
        change()
        first = seconds(forward) + seconds(step)
        times = [statistics.median(seconds(work) for _ in range(STEPS)) for work in (forward, step)]
        rows.append([name, *(f"{each:.3f}" for each in times), f"{first - sum(times):.0f}"])
    head = ["network", "forward, s", "forward and backward, s", "more at first, s"]
    note = f"{torch.get_num_threads()} threads, batches of {loop.batch}."
    show("compiled", head, rows, note, publish=publish)


def written(size: str, folder: Path) -> Path:
    """Return the file of a model with random weights, written unless it is there."""
    from real_size import write_single_file

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{size}.safetensors"
    return file if file.exists() else write_single_file(size, folder)


def flop(call: Callable[[], object]) -> int:
    """Return how many floating-point operations a call takes, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def shares(call: Callable[[], object]) -> dict[str, float]:
    """Return what a call's time goes into: shares of operators by kind, and of no operator at all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        took = seconds(call)
    kinds = dict.fromkeys([*KINDS, "other operators"], 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::") or event.key.startswith("mkldnn"):
            kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "other operators")
            kinds[kind] += event.self_cpu_time_total / 1e6 / took
    return {**kinds, "python and the rest": 1 - sum(kinds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(SIZES), default="emoji")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compare with the compiled network instead")
    parser.add_argument("--out", type=Path, default=Path("out/hot_loop"))
    add_publish(parser)
    options = parser.parse_args()
    loop = Loop(options.base, options.device, options.out)
    if options.compile:
        compare_compiled(loop, options.publish)
        return
    times = loop.measure()
    machine = 2 * 2048**3 / times["product"]
    work = {"bare walk": flop(loop.bare_walk), "bare step": flop(loop.bare_step)}
    work |= {"walk": work["bare walk"], "step": (flop(loop.steps) - work["bare walk"]) / STEPS}
    rows: list[list[str]] = []
    for name in ("bare walk", "walk", "bare step", "step"):
        rate, bare = work[name] / times[name], times[f"bare {name.removeprefix('bare ')}"]
        rows.append([name, f"{times[name]:.3f}", f"{bare / times[name]:.0%}", f"{rate / 1e9:,.0f}", f"{rate / machine:.0%}"])
    of = f"{options.base}, {torch.get_num_threads()} threads, on {options.device}"
    note = f"{of}; a product of 2048 x 2048 runs at {machine / 1e9:,.0f} GFLOP/s. Medians of {ROUNDS} rounds."
    head = ["", "seconds", "of the bare network's speed", "GFLOP/s", "of the product's"]
    show(f"hot-loop-{options.base}", head, rows, note, publish=options.publish)
    table = {"walk": shares(loop.refill), "step": shares(loop.steps)}
    cells = [[name, *(f"{value:.0%}" for value in row.values())] for name, row in table.items()]
    show(f"hot-loop-{options.base}-shares", ["", *table["walk"]], cells, f"{of}.", publish=options.publish)


if __name__ == "__main__":
    main()
