# Copyright (c) 2026, the megatron-core gptoss authors.

"""The output bias of an expert whose weights are split over expert tensor parallelism (ETP).

Each ETP rank computes a partial sum of the expert's output, and the token dispatcher adds them up
later. Each rank holds the whole bias, so it would be counted once per rank.
"""

import torch

from megatron.core.utils import get_pg_rank, get_pg_size


class _CountOnce(torch.autograd.Function):
    """The bias on ETP rank 0 and zeros elsewhere; the whole gradient on every rank.

    The ranks see the same gradient of the output. The one of the bias is therefore whole on each
    of them, and its copies stay equal with no reduction.
    """

    @staticmethod
    def forward(ctx, bias, keep):
        return bias.view_as(bias) if keep else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx, dbias):
        return dbias, None


def count_bias_once(bias, etp_group):
    """What this ETP rank adds of the bias, so that the sum over the ranks holds it once.

    Args:
        bias: a tensor, a list of them (one an expert), or None.
        etp_group: the expert tensor parallel group; None without torch.distributed.
    Returns:
        the bias itself where there is one rank only; else something of the same shapes, with the
        gradient of the bias whole on every rank.
    """
    if bias is None or get_pg_size(etp_group) == 1:
        return bias
    if isinstance(bias, (list, tuple)):
        return [count_bias_once(one, etp_group) for one in bias]
    return _CountOnce.apply(bias, get_pg_rank(etp_group) == 0)
