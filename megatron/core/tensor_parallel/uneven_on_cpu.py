# Copyright (c) 2026, the megatron-core gptoss authors.

"""All-gather and reduce-scatter of parts of unequal length, for tensors on the CPU.

NCCL takes lists of unequal tensors in all_gather and reduce_scatter; gloo refuses them, but has
an all-to-all with unequal splits, from which both are made here. Expert dispatch needs them: the
expert tensor parallel ranks hold different numbers of tokens.
"""

from typing import List

import torch


def all_gather_uneven(input_: torch.Tensor, split_sizes: List[int], group) -> torch.Tensor:
    """[sum(split_sizes), ...]: the rows [split_sizes[rank], ...] of every rank."""
    output = input_.new_empty(sum(split_sizes), *input_.shape[1:])
    # Every rank is sent the same rows.
    rows = input_.repeat(group.size(), *[1] * (input_.dim() - 1))
    torch.distributed.all_to_all_single(
        output,
        rows,
        output_split_sizes=list(split_sizes),
        input_split_sizes=[input_.size(0)] * group.size(),
        group=group,
    )
    return output


def reduce_scatter_uneven(input_: torch.Tensor, split_sizes: List[int], group) -> torch.Tensor:
    """[split_sizes[rank], ...]: the sum over the ranks of their rows for this one.

    Summed in the order of the ranks, so that the result is the same on every run.
    """
    mine = split_sizes[group.rank()]
    parts = input_.new_empty(group.size(), mine, *input_.shape[1:])
    torch.distributed.all_to_all_single(
        parts.flatten(0, 1),
        input_.contiguous(),
        output_split_sizes=[mine] * group.size(),
        input_split_sizes=list(split_sizes),
        group=group,
    )
    return parts.sum(dim=0)
