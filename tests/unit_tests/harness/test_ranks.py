# Copyright (c) 2026, the megatron-core gptoss authors.

"""The rank pool: results, reuse, and failures that are reported instead of a hang."""

import os
import time

import pytest
import torch

from tests.harness.ranks import RankFailure

pytestmark = pytest.mark.ranks(3)


def add_ranks(offset: float) -> float:
    value = torch.tensor([offset + torch.distributed.get_rank()])
    torch.distributed.all_reduce(value)
    return value.item()


def process_id() -> int:
    return os.getpid()


def raise_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("the culprit")
    torch.distributed.barrier()


def exit_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(7)
    torch.distributed.barrier()


def sleep_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        time.sleep(600)


def test_ranks_are_used_again_with_any_world_size(ranks):
    assert ranks.run(add_ranks, 1.0, world_size=3) == [6.0] * 3
    before = ranks.run(process_id, world_size=2)
    assert ranks.run(add_ranks, offset=0.5, world_size=2) == [2.0] * 2
    assert ranks.run(process_id, world_size=2) == before


def test_failures_are_told_and_ranks_replaced(ranks):
    with pytest.raises(RankFailure, match=r"^Rank 1 of 2 failed.(.|\n)*the culprit"):
        ranks.run(raise_on_rank_one, world_size=2)
    with pytest.raises(RankFailure, match=r"^Rank 1 of 2 died with exit code 7"):
        ranks.run(exit_on_rank_one, world_size=2)
    with pytest.raises(RankFailure, match=r"Ranks \[1\] did not return within 8 s(.|\n)*sleep_on"):
        ranks.run(sleep_on_rank_one, world_size=2, timeout=8)
    assert ranks.run(add_ranks, 0.0, world_size=2) == [1.0] * 2


def test_world_size_above_the_pool_is_refused(ranks):
    with pytest.raises(ValueError, match="world_size is 4, but this pool has 3 ranks"):
        ranks.run(process_id, world_size=4)
