"""What ranks exchange: nothing in a process of its own, and the same on all of them otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esd_lora.bases.loading import choose_device
from esd_lora.pictures import even_batches
from esd_lora.ranks import add_up, anywhere, copy_from_main, count, from_main, gather, is_main, merge, rank, share
from rank_processes import run_ranks


def test_process_of_its_own_keeps_what_it_has() -> None:
    rows = torch.arange(5)
    assert (count(), rank(), is_main()) == (1, 0, True)
    assert torch.equal(share(rows), rows)
    assert gather(rows, 5) is rows
    add_up([rows])
    copy_from_main([rows])
    assert torch.equal(rows, torch.arange(5))
    assert from_main(lambda: "made") == "made"
    assert merge({"a": 1}) == {"a": 1}
    assert [anywhere(True), anywhere(False)] == [True, False]


def test_number_of_machines_is_no_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (count(), rank(), is_main()) == (1, 0, True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert (count(), rank(), is_main()) == (4, 3, False)


def _exchange() -> None:
    choose_device("cpu")
    mine, number = rank(), count()
    for total in range(1, 2 * number + 2):
        rows = torch.arange(total * 2.0).reshape(total, 2)
        own = share(rows)
        assert len(own) == (total - mine + number - 1) // number
        assert torch.equal(gather(own, total), rows)
    tensors = [torch.tensor(mine + 1.0), torch.full((2, 3), mine, dtype=torch.float64), torch.nn.Parameter(torch.ones(2))]
    add_up(tensors)
    assert float(tensors[0]) == sum(range(1, number + 1))
    assert torch.equal(tensors[1], torch.full((2, 3), sum(range(number)), dtype=torch.float64))
    assert tensors[2].tolist() == [number, number]
    own = [torch.tensor([mine, mine])]
    copy_from_main(own)
    assert own[0].tolist() == [0, 0]
    assert from_main(lambda: f"made by {mine}") == "made by 0"
    assert merge({mine: str(mine)}) == {each: str(each) for each in range(number)}
    assert anywhere(mine == number - 1)
    assert not anywhere(False)


def test_ranks_exchange_rows_sums_and_messages(tmp_path: Path) -> None:
    ended = run_ranks(3, tmp_path, _exchange)
    assert [each.code for each in ended] == [0, 0, 0], ended


@pytest.mark.parametrize("most", [1, 2, 7, 32])
def test_batches_are_even_and_do_not_depend_on_ranks(most: int) -> None:
    for number in range(100):
        batches = even_batches(number, most)
        assert [i for batch in batches for i in batch] == list(range(number))
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= most
        assert min(sizes) >= min(number, -(-most // 2))
