# Copyright (c) 2026, the megatron-core gptoss authors.

"""All-gather of keys and values; reduce-scatter of their gradients.

During the all-gather the rank's own two chunks attend to one another. Of the chunks of other ranks,
in the order of the sequence, rank r's first chunk sees the first r, and its second chunk all before
itself, 2*cp-2-r: one full chunk pair each. Every query is in two pairs (rank 0's first chunk in
one), which one kernel merges in fp32, together with the sinks.

The gathered keys and values are freed after the forward; the backward gathers them again. dk and dv
are summed over the ranks in fp32 (fp64 for fp64).
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.context_parallel.chunk_attention import (
    ChunkAttention,
    ChunkPair,
    apply_sinks_,
    local_sink_gradient,
    merge_,
)
from megatron.core.transformer.sink_attention.context_parallel.collectives import (
    Pending,
    all_gather,
    reduce_scatter,
)
from megatron.core.transformer.sink_attention.context_parallel.layout import chunk_ranges


class AllGatherAttention(torch.autograd.Function):
    """query [2c, b, np, hn], key, value [2c, b, ng, hn] of this rank (or without b), sinks."""

    @staticmethod
    def forward(ctx, query, key, value, sinks, kernels: ChunkAttention, group: ProcessGroup):
        kv_work = _gather(key, value, group)
        own = _own(query, group)
        out, lse = kernels.forward(query, key, value, own)
        out, lse = out.contiguous(), lse.contiguous()
        keys, values = _others(kv_work, group)
        if group.rank() == 0:  # its first chunk has no other keys
            apply_sinks_(out[: len(out) // 2], lse[..., : len(out) // 2], sinks)
        for rows, pair, num in _chunk_pairs(query, group):
            part = kernels.forward(query[rows], keys[:num], values[:num], pair)
            merge_(out[rows], lse[..., rows], *part, sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.kernels, ctx.group = kernels, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, sinks, out, lse = ctx.saved_tensors
        kernels, group = ctx.kernels, ctx.group
        kv_work = _gather(key, value, group)
        own = _own(query, group)
        dq, dk, dv = kernels.backward(query, key, value, out, lse, dout, own)
        sums = _KeyGradients(dk, dv, lse.dtype, group)
        dq = dq.contiguous()
        keys, values = _others(kv_work, group)
        for rows, pair, num in _chunk_pairs(query, group):
            dq_i, dk_i, dv_i = kernels.backward(
                query[rows],
                keys[:num],
                values[:num],
                out[rows],
                lse[..., rows],
                dout[rows],
                pair,
            )
            dq[rows] += dq_i  # added to once, so rounded as if from fp32
            sums.add(dk_i, dv_i)
        del keys, values
        grad_work = sums.reduce_scatter_grads()
        dsinks = local_sink_gradient(ctx, out, lse, dout, sinks)
        dk, dv = grad_work.wait().to(key.dtype)
        return dq, dk, dv, dsinks, None, None


def _own(query: Tensor, group: ProcessGroup) -> ChunkPair:
    ranges = chunk_ranges(group.rank(), group.size(), query.shape[0] * group.size())
    return ChunkPair(ranges, ranges, causal=True)


def _chunk_pairs(query: Tensor, group: ProcessGroup) -> list[tuple[slice, ChunkPair, int]]:
    """Rows of query, the pair, and how many keys of other ranks it takes, the first pair all."""
    rank, cp, length = group.rank(), group.size(), query.shape[0] // 2
    first, second = chunk_ranges(rank, cp, query.shape[0] * cp)
    before, between = (0, first[0]), (first[1], second[0])
    if rank == cp - 1:  # no chunk between its own two: both see the same keys
        return [(slice(0, 2 * length), ChunkPair((first, second), (before,)), rank * length)]
    keys = (before, between) if rank else (between,)
    pairs = [(slice(length, None), ChunkPair((second,), keys), (2 * cp - 2 - rank) * length)]
    if rank:
        pairs.append((slice(0, length), ChunkPair((first,), (before,)), rank * length))
    return pairs


def _gather(key: Tensor, value: Tensor, group: ProcessGroup) -> Pending:
    return all_gather(torch.stack([key, value]), group)


def _others(kv_work: Pending, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values of other ranks before this rank's second chunk, in order."""
    gathered = kv_work.wait().unflatten(2, (2, -1))  # [cp, k and v, chunk of two, c, ...]
    rank = group.rank()
    return tuple(
        torch.cat(
            [
                gathered[:rank, kv, 0].flatten(0, 1),
                gathered[rank + 1 :, kv, 0].flatten(0, 1),
                gathered[rank + 1 :, kv, 1].flip(0).flatten(0, 1),
            ]
        )
        for kv in (0, 1)
    )


class _KeyGradients:
    """This rank's terms of the gradients of all keys and values, [cp, k and v, 2c, ...]."""

    def __init__(self, dk: Tensor, dv: Tensor, dtype: torch.dtype, group: ProcessGroup):
        self.group, self.empty = group, True
        shape = (group.size(), 2, *dk.shape)
        self.total = torch.empty(shape, dtype=dtype, device=dk.device)
        self.chunks = self.total.unflatten(2, (2, -1))
        self.chunks[: group.rank(), :, 1] = 0  # after this rank's second chunk
        self.total[group.rank(), 0], self.total[group.rank(), 1] = dk, dv

    def add(self, *grads: Tensor) -> None:
        """Add gradients of the leading keys and values of others; the first call covers all."""
        rank, chunks = self.group.rank(), self.chunks
        for kv, grad in enumerate(grads):
            parts = grad.unflatten(0, (-1, chunks.shape[3]))
            if self.empty:
                first, second = parts[rank:].chunk(2) if len(parts) > rank else (parts[:0],) * 2
                chunks[:rank, kv, 0] = parts[:rank]
                chunks[rank + 1 :, kv, 0] = first
                chunks[rank + 1 :, kv, 1] = second.flip(0)
            else:
                chunks[:rank, kv, 0] += parts
        self.empty = False

    def reduce_scatter_grads(self) -> Pending:
        """Sum over the ranks; each gets the gradients of its own keys and values."""
        return reduce_scatter(self.total, self.group)
