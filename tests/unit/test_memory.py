"""Bytes of tensors: they are counted as they come and go, and on the meta device as anywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esd_lora.adapter import add_adapter
from esd_lora.bases.base import Base
from esd_lora.bases.outlines import outline_base
from esd_lora.memory import counting
from esd_lora.recipe import LoraSpec
from toys import TOYS, load_toy, save_toy, with_toy_size

MEBI = 2**20


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_come_and_go(device: str) -> None:
    before = torch.zeros(MEBI, dtype=torch.uint8, device=device)
    with counting() as count:
        first = torch.zeros(MEBI, dtype=torch.uint8, device=device)
        view = first.view(2, -1)[0]
        assert count.live == MEBI, "a view is no further storage"
        second = first + 1
        second.add_(before)
        assert count.live == 2 * MEBI, "nor is a result in place"
        del first
        assert count.live == 2 * MEBI, "the view holds it"
        del view
        assert (count.live, count.peak) == (MEBI, 2 * MEBI)
    del second
    assert count.live == 0


def test_what_the_backward_pass_needs_is_held_until_then() -> None:
    weight = torch.zeros(1024, 1024, device="meta", requires_grad=True)
    with counting() as count:
        loss = (torch.zeros(256, 1024, device="meta") @ weight).relu().square().sum()
        assert count.live == 2 * MEBI + 4, "the product's input, its output rectified, and the loss"
        loss.backward()
        assert count.live == 4 * MEBI + 4, "the gradient alone is left"


def test_attention_counts_as_fused_kernels_do_it() -> None:
    query = torch.zeros(2, 8, 4096, 64, device="meta", dtype=torch.bfloat16)
    with counting() as count:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert count.peak == query.nbytes + 2 * 8 * 4096 * 4, "its output, and a number for each query and head"


def step_bytes(base: Base, checkpointing: bool) -> int:
    parameters = add_adapter(base, base.family.modules(base.model, "full"), LoraSpec(rank=2, alpha=2), 0)
    if checkpointing:
        base.model.enable_gradient_checkpointing()
    shapes, device = base.family.condition_shapes(base.pipe), base.model.device
    condition = {name: torch.ones(4, *shape, device=device) for name, shape in shapes.items()}
    if base.family.takes_guidance(base.pipe):
        condition["guidance"] = torch.ones(4, device=device)
    with counting() as count:
        x_t, t = torch.zeros(4, *base.latent_shape(), device=device), torch.full((4,), 500, device=device)
        base.predict(x_t, t, condition).square().mean().backward()
    assert any(parameter.grad is not None for parameter in parameters)
    return count.peak


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", TOYS)
def test_a_step_without_weights_takes_what_one_with_them_takes(name: str, checkpointing: bool, tmp_path: Path) -> None:
    folder = save_toy(name, tmp_path)
    real, outline = load_toy(folder), with_toy_size(outline_base(str(folder), dtype=torch.float32))
    if hasattr(real.pipe, "tokenizer"):
        outline.pipe.tokenizer = real.pipe.tokenizer  # a toy's ends sooner than the pipeline's call
    counted, planned = step_bytes(real, checkpointing), step_bytes(outline, checkpointing)
    assert planned == pytest.approx(counted, rel=0.05)
    assert counted > MEBI / 8
