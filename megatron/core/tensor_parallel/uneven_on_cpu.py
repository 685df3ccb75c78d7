# Copyright (c) 2026, the megatron-core gptoss authors.

"""All-gather and reduce-scatter with unequal split sizes for CPU tensors.

NCCL supports unequal tensors in all_gather and reduce_scatter; gloo does not, but its all-to-all
supports unequal splits. Expert dispatch needs them: expert-tensor-parallel ranks have different
numbers of tokens.
"""

from typing import List

import torch


def all_gather_uneven(input_: torch.Tensor, split_sizes: List[int], group) -> torch.Tensor:
    """All-gather tensors of unequal length.

    Args:
        input_: [split_sizes[rank], ...].
        split_sizes: length of each rank's tensor.
    Returns:
        [sum(split_sizes), ...].
    """
    output = input_.new_empty(sum(split_sizes), *input_.shape[1:])
    # All-to-all sends every rank its own copy.
    copies = input_.repeat(group.size(), *[1] * (input_.dim() - 1))
    torch.distributed.all_to_all_single(
        output,
        copies,
        output_split_sizes=list(split_sizes),
        input_split_sizes=[input_.size(0)] * group.size(),
        group=group,
    )
    return output


def reduce_scatter_uneven(input_: torch.Tensor, split_sizes: List[int], group) -> torch.Tensor:
    """Reduce-scatter with unequal split sizes; sums in rank order, so it is deterministic.

    Args:
        input_: [sum(split_sizes), ...].
        split_sizes: length of each rank's part.
    Returns:
        [split_sizes[rank], ...].
    """
    length = split_sizes[group.rank()]
    parts = input_.new_empty(group.size(), length, *input_.shape[1:])
    torch.distributed.all_to_all_single(
        parts.flatten(0, 1),
        input_.contiguous(),
        output_split_sizes=[length] * group.size(),
        input_split_sizes=list(split_sizes),
        group=group,
    )
    return parts.sum(dim=0)
