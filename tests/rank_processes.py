"""Starts functions as the ranks of one run, as `torchrun` does it, from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        *("torch", "accelerate", "peft", "transformers.models.clip.modeling_clip"),
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        *("esd_lora.training", "esd_lora.sampling", "esd_lora.evaluation.evaluating", "esd_lora.cli"),
    ]
)
LONGEST = 600
"""Seconds after which ranks count as hung."""


class Ended(NamedTuple):
    """How a rank ended."""

    code: int | None
    """Exit code, or the negative number of the signal that ended it; `None` where it hung."""
    text: str
    """What it printed."""
    result: Any
    """What the function returned, `None` where it did not."""


def run_ranks(count: int, folder: Path, work: Callable[..., Any], *arguments: object) -> list[Ended]:
    """Run a function in as many ranks, or in a process of its own where the count is 1, and return how each ended.

    Args:
        count: Number of ranks.
        folder: For what they print.
        work: A function of a module.
        arguments: Its arguments.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    files = [folder / f"rank_{number}.txt" for number in range(count)]
    ranks: list[Any] = []
    for number, file in enumerate(files):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        ranks.append(_FORKS.Process(target=_run, args=(place if count > 1 else {}, file, work, arguments)))
        ranks[-1].start()
    for each in ranks:
        each.join(LONGEST)
    codes = [each.exitcode for each in ranks]
    for each in ranks:
        each.kill()
        each.join()
    results = [file.with_suffix(".pickle") for file in files]
    return [
        Ended(code, file.read_text("utf-8"), pickle.loads(result.read_bytes()) if code == 0 else None)
        for code, file, result in zip(codes, files, results, strict=True)
    ]


def _run(place: dict[str, int], file: Path, work: Callable[..., Any], arguments: Sequence[object]) -> None:
    import torch

    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    printed = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(printed, sys.__stdout__.fileno())
    os.dup2(printed, sys.__stderr__.fileno())
    file.with_suffix(".pickle").write_bytes(pickle.dumps(work(*arguments)))
