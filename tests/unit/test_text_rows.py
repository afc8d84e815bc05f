"""Rows of text: their moments are sums over batches of prompts, of which one at a time is in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from esd_lora import text_rows
from esd_lora.memory import counting
from esd_lora.text_rows import second_moment

WIDTH, TOKENS = 16, 512


def rows(prompts: list[str]) -> Tensor:
    """As many rows as Wan's encoder gives, of each prompt its own."""
    generators = [torch.Generator().manual_seed(int(prompt)) for prompt in prompts]
    return torch.stack([torch.randn(TOKENS, WIDTH, generator=each, dtype=torch.float64) for each in generators])


def test_moment_of_many_prompts_takes_the_rows_of_one_batch() -> None:
    prompts = [str(i) for i in range(8 * text_rows._AT_ONCE + 3)]
    with counting() as count:
        moment = second_moment(rows, prompts)
    whole = rows(prompts).flatten(0, 1)
    torch.testing.assert_close(moment, whole.T @ whole / len(whole), rtol=1e-12, atol=1e-12)
    batch = text_rows._AT_ONCE * TOKENS * WIDTH * 8
    assert count.peak < 3.5 * batch  # the next one with its single prompts, and the last
