# Copyright (c) 2026, the megatron-core gptoss authors.

"""The asynchronous collectives of context parallelism.

They run on the group's own stream (NCCL) or thread (gloo): computation between the start and `wait`
overlaps. Rings and halos are an all-to-all in which most parts are empty: one grouped send and
receive on the group's communicator, which cannot deadlock in any order of the ranks.
"""

import contextlib
from collections import Counter
from typing import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# PyTorch 2.13 renames them.
gather_tensor = getattr(torch.distributed, "all_gather_single", None)
gather_tensor = gather_tensor or torch.distributed.all_gather_into_tensor
scatter_tensor = getattr(torch.distributed, "reduce_scatter_single", None)
scatter_tensor = scatter_tensor or torch.distributed.reduce_scatter_tensor

_counters: list[Counter] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Counter]:
    """Count the bytes that this rank receives from other ranks, by collective."""
    counter = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.pop()


def _count(kind: str, elements: int, x: Tensor) -> None:
    for counter in _counters:
        counter[kind] += elements * x.element_size()


class Pending:
    """A result in transfer; keeps the sent tensor alive until it has arrived."""

    def __init__(self, result: Tensor, sent: Tensor, work):
        self._result, self._sent, self._work = result, sent, work

    def wait(self) -> Tensor:
        """Wait on the current stream, and return the result."""
        self._work.wait()
        self._sent = None
        return self._result


def all_gather(x: Tensor, group: ProcessGroup) -> Pending:
    """x of every rank, [ranks, *x.shape]."""
    x, ranks = x.contiguous(), group.size()
    result = x.new_empty((ranks * x.numel(),))
    work = gather_tensor(result, x.view(-1), group=group, async_op=True)
    _count("all_gather", (ranks - 1) * x.numel(), x)
    return Pending(result.view(ranks, *x.shape), x, work)


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Pending:
    """The sum of x[rank] over the ranks; x is [ranks, ...]."""
    x, ranks = x.contiguous(), group.size()
    result = x.new_empty((x[0].numel(),))
    work = scatter_tensor(result, x.view(-1), group=group, async_op=True)
    _count("reduce_scatter", (ranks - 1) * result.numel(), x)
    return Pending(result.view(x.shape[1:]), x, work)


def all_to_all(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup
) -> Pending:
    """Send rows of x to every rank, in the order of the ranks.

    Args:
        x: [rows, ...].
        sent, received: number of rows to and from each rank.
    """
    x = x.contiguous()
    result = x.new_empty((sum(received), *x.shape[1:]))
    row = x[0].numel() if len(x) else result[0].numel() if len(result) else 0
    work = torch.distributed.all_to_all_single(
        result.view(-1),
        x.view(-1),
        [row * n for n in received],
        [row * n for n in sent],
        group=group,
        async_op=True,
    )
    _count("all_to_all", row * (sum(received) - received[group.rank()]), x)
    return Pending(result, x, work)


def to_next(x: Tensor, group: ProcessGroup) -> Pending:
    """Send x to the next rank of the ring; the result is x of the previous rank."""
    rank, ranks = group.rank(), group.size()
    sent, received = [0] * ranks, [0] * ranks
    sent[(rank + 1) % ranks] = received[(rank - 1) % ranks] = len(x)
    return all_to_all(x, sent, received, group)
