# Copyright (c) 2026, the megatron-core gptoss authors.

"""The output bias of an expert whose weights are split over expert tensor parallelism (ETP).

Each ETP rank computes a partial sum of the expert output, which the token dispatcher sums later.
Each rank holds the complete bias, which would be counted once per rank.
"""

import torch

from megatron.core.utils import get_pg_rank, get_pg_size


class _CountOnce(torch.autograd.Function):
    """The bias on ETP rank 0 and zeros elsewhere; the complete gradient on every rank.

    The ranks have the same gradient of the output, so each computes the complete gradient of the
    bias, and its copies stay equal without a reduction.
    """

    @staticmethod
    def forward(ctx, bias, keep):
        return bias.view_as(bias) if keep else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx, dbias):
        return dbias, None


def count_bias_once(bias, etp_group):
    """This ETP rank's term of the bias, so that the sum over the ranks contains it once.

    Args:
        bias: a tensor, a list of them (one an expert), or None.
        etp_group: the expert tensor parallel group; None without torch.distributed.
    Returns:
        the bias itself with one rank; else tensors of the same shapes, with the complete gradient
        of the bias on every rank.
    """
    if bias is None or get_pg_size(etp_group) == 1:
        return bias
    if isinstance(bias, (list, tuple)):
        return [count_bias_once(one, etp_group) for one in bias]
    return _CountOnce.apply(bias, get_pg_rank(etp_group) == 0)
