# Copyright (c) 2026, the megatron-core gptoss authors.

"""Keys and values gathered from all ranks; their gradients reduce-scattered.

While they come, the rank's own two chunks attend to one another. Of the other chunks, in the order
of the sequence and without the two of its own, rank r's first chunk sees the first r and its second
all up to itself, 2*cp-2-r: one full piece each. So every query is in two pieces (rank 0's first
chunk in one), which are merged, together with the sink, in fp32 in one pass.

What was gathered is freed after the forward and gathered again in the backward. dk and dv are
summed over the ranks in fp32 (fp64 for fp64).
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.context_parallel.chunk_attention import (
    Piece,
    PieceAttention,
    finish_,
    merge_,
    sink_gradient_here,
)
from megatron.core.transformer.sink_attention.context_parallel.collectives import (
    Pending,
    all_gather,
    reduce_scatter,
)
from megatron.core.transformer.sink_attention.context_parallel.layout import chunk_ranges


class AllGatherAttention(torch.autograd.Function):
    """query [2c, b, np, hn], key and value [2c, b, ng, hn] of this rank (or without b), sink."""

    @staticmethod
    def forward(ctx, query, key, value, sink, kernels: PieceAttention, group: ProcessGroup):
        coming = _gather(key, value, group)
        own = _own(query, group)
        out, lse = kernels.forward(query, key, value, own)
        out, lse = out.contiguous(), lse.contiguous()
        keys, values = _others(coming, group)
        if group.rank() == 0:  # its first chunk has no other keys
            finish_(out[: len(out) // 2], lse[..., : len(out) // 2], sink)
        for rows, piece, num in _pieces(query, group):
            part = kernels.forward(query[rows], keys[:num], values[:num], piece)
            merge_(out[rows], lse[..., rows], *part, sink)
        ctx.save_for_backward(query, key, value, sink, out, lse)
        ctx.kernels, ctx.group = kernels, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, sink, out, lse = ctx.saved_tensors
        kernels, group = ctx.kernels, ctx.group
        coming = _gather(key, value, group)
        own = _own(query, group)
        dq, dk, dv = kernels.backward(query, key, value, out, lse, dout, own)
        sums = _Sums(dk, dv, lse.dtype, group)
        dq = dq.contiguous()
        keys, values = _others(coming, group)
        for rows, piece, num in _pieces(query, group):
            dq_i, dk_i, dv_i = kernels.backward(
                query[rows],
                keys[:num],
                values[:num],
                out[rows],
                lse[..., rows],
                dout[rows],
                piece,
            )
            dq[rows] += dq_i  # the one addition that a row gets: rounded once, as from fp32
            sums.add(dk_i, dv_i)
        del keys, values
        going = sums.home()
        dsink = sink_gradient_here(ctx, out, lse, dout, sink)
        dk, dv = going.wait().to(key.dtype)
        return dq, dk, dv, dsink, None, None


def _own(query: Tensor, group: ProcessGroup) -> Piece:
    ranges = chunk_ranges(group.rank(), group.size(), query.shape[0] * group.size())
    return Piece(ranges, ranges, causal=True)


def _pieces(query: Tensor, group: ProcessGroup) -> list[tuple[slice, Piece, int]]:
    """Rows of query, the piece, and how many of the others' keys it takes; all in the first."""
    rank, cp, length = group.rank(), group.size(), query.shape[0] // 2
    first, second = chunk_ranges(rank, cp, query.shape[0] * cp)
    before, between = (0, first[0]), (first[1], second[0])
    if rank == cp - 1:  # nothing between the two chunks: one set of keys for both
        return [(slice(0, 2 * length), Piece((first, second), (before,)), rank * length)]
    keys = (before, between) if rank else (between,)
    pieces = [(slice(length, None), Piece((second,), keys), (2 * cp - 2 - rank) * length)]
    if rank:
        pieces.append((slice(0, length), Piece((first,), (before,)), rank * length))
    return pieces


def _gather(key: Tensor, value: Tensor, group: ProcessGroup) -> Pending:
    return all_gather(torch.stack([key, value]), group)


def _others(coming: Pending, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values before this rank's second chunk, but for its first, in order."""
    gathered = coming.wait().unflatten(2, (2, -1))  # [cp, k and v, chunk of two, c, ...]
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


class _Sums:
    """What this rank adds to the gradients of all keys and values, [cp, k and v, 2c, ...]."""

    def __init__(self, dk: Tensor, dv: Tensor, dtype: torch.dtype, group: ProcessGroup):
        self.group, self.empty = group, True
        shape = (group.size(), 2, *dk.shape)
        self.total = torch.empty(shape, dtype=dtype, device=dk.device)
        self.chunks = self.total.unflatten(2, (2, -1))
        self.chunks[: group.rank(), :, 1] = 0  # after this rank's second chunk
        self.total[group.rank(), 0], self.total[group.rank(), 1] = dk, dv

    def add(self, *grads: Tensor) -> None:
        """Gradients of the first so many of the others' keys and values; of all, to begin with."""
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

    def home(self) -> Pending:
        return reduce_scatter(self.total, self.group)
