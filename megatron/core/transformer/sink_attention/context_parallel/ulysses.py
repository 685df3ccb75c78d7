# Copyright (c) 2026, the megatron-core gptoss authors.

"""Ulysses: every rank gets the complete sequence of its share of the heads.

Forward and backward have two all-to-alls each, with attention on one rank between them, in the
order of the sequence. If there are fewer key heads than ranks, each is sent to every rank that has
queries of its group; autograd of the expansion sums their gradients in fp32 on the rank of the key
head.
"""

from typing import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.context_parallel.collectives import all_to_all
from megatron.core.transformer.sink_attention.context_parallel.layout import (
    from_zigzag,
    to_zigzag,
)


def kv_copies(num_heads: int, num_kv_heads: int, ranks: int) -> int:
    """How often each key head is repeated, so that every rank gets those that its queries need.

    Raises:
        ValueError: the number of query heads is not divisible by the ranks.
    """
    if num_heads % ranks:
        raise ValueError(
            f"cp_comm_type: a2a splits {num_heads} query heads over {ranks} ranks, which is not "
            "divisible; use 'all_gather' or 'p2p', or 'a2a+p2p' with fewer ranks in its first "
            "group."
        )
    group, share = num_heads // num_kv_heads, num_heads // ranks
    if share % group == 0:  # complete groups
        return 1
    if group % share == 0:  # a part of one group
        return ranks // num_kv_heads
    return group  # parts of several: every query head gets a key head of its own


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    group: ProcessGroup,
    inner: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """All-to-all, `inner` on the tokens of all the group's ranks, all-to-all back.

    inner gets the group's tokens in the order of the sequence: the complete sequence, or with the
    first of two groups, the two chunks of the second group's zigzag.
    """
    ranks, rank = group.size(), group.rank()
    heads, kv_heads = query.shape[-2], key.shape[-2]
    copies = kv_copies(heads, kv_heads, ranks)
    if copies > 1:
        key, value = (_repeat(x, copies) for x in (key, value))
    q, k, v = SequenceToHeads.apply(query, key, value, group)
    share = heads // ranks
    if sinks is not None:  # its gradient is 0 for the heads of other ranks: each counts once
        sinks = sinks[rank * share : (rank + 1) * share]
    return HeadsToSequence.apply(inner(q, k, v, sinks), group)


def _repeat(x: Tensor, copies: int) -> Tensor:
    return x.unsqueeze(-2).expand(*x.shape[:-1], copies, x.shape[-1]).flatten(-3, -2)


class SequenceToHeads(torch.autograd.Function):
    """Tensors [local tokens, ..., heads, hn] to [tokens, ..., heads / ranks, hn] in one call."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, group = arguments
        ctx.group, ctx.heads = group, [x.shape[-2] for x in tensors]
        return _to_heads(tensors, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return (*_to_sequence(grads, ctx.group), None)


class HeadsToSequence(torch.autograd.Function):
    """[tokens, ..., heads / ranks, hn] to [local tokens, ..., heads, hn]."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _to_sequence([x], group)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _to_heads([grad], ctx.group)[0], None


def _to_heads(tensors, group: ProcessGroup) -> tuple[Tensor, ...]:
    ranks, local = group.size(), tensors[0].shape[0]
    # [ranks, local tokens, ..., heads / ranks, hn], the tensors concatenated along the heads
    parts = [x.unflatten(-2, (ranks, -1)).movedim(-3, 0) for x in tensors]
    sizes = [part.shape[-2] for part in parts]
    sent = torch.cat(parts, dim=-2).flatten(0, 1)
    rows = [local] * ranks
    received = all_to_all(sent, rows, rows, group).wait()
    # cat of slices: each tensor is contiguous and in the order of the sequence
    return tuple(from_zigzag(x, ranks) for x in received.split(sizes, dim=-2))


def _to_sequence(tensors, group: ProcessGroup) -> tuple[Tensor, ...]:
    ranks, local = group.size(), tensors[0].shape[0] // group.size()
    sizes = [x.shape[-2] for x in tensors]
    sent = to_zigzag(torch.cat(tensors, dim=-2), ranks)
    rows = [local] * ranks
    received = all_to_all(sent, rows, rows, group).wait().unflatten(0, (ranks, local))
    parts = received.split(sizes, dim=-2)
    return tuple(x.movedim(0, -3).flatten(-3, -2).contiguous() for x in parts)
