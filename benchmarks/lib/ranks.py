# Copyright (c) 2026, the megatron-core gptoss authors.

"""Values of all ranks of a benchmark; without a process group there is one rank."""

import torch

from megatron.gpt_oss.diagnostics.attention_timing import device


def count() -> int:
    """Number of ranks."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is rank 0."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def over_ranks(value: float) -> list[float]:
    """The value of every rank."""
    if count() == 1:
        return [value]
    own = torch.tensor([value], dtype=torch.float64, device=device())
    everyone = [torch.empty_like(own) for _ in range(count())]
    torch.distributed.all_gather(everyone, own)
    return [x.item() for x in everyone]


def from_first(value: float) -> float:
    """Rank 0's value, so that all ranks make the same decision."""
    return over_ranks(value)[0]


def slowest(times: list[float]) -> list[float]:
    """Times of the slowest rank, by round."""
    values = torch.tensor(times, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values.tolist()
