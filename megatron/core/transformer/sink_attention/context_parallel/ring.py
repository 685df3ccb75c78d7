# Copyright (c) 2026, the megatron-core gptoss authors.

"""Keys and values go round the ring of ranks; each rank merges what it has of each.

In step j a rank has the keys of rank r-j, and those of r-j-1 are on their way while it computes.
Of a rank before it sees the first chunk, with both of its own; of a rank after it both chunks, with
its second alone: the half that the causal mask hides is never computed. Partial results are merged
in fp32 (fp64 for fp64), and the sink comes last, once.

In the backward keys and values go round again, and behind them, one step later, the sums of their
gradients in fp32, which are home after the last step.
"""

import torch
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.context_parallel.chunk_attention import (
    Piece,
    PieceAttention,
    finish_,
    merge_,
    sink_gradient_here,
)
from megatron.core.transformer.sink_attention.context_parallel.collectives import to_next
from megatron.core.transformer.sink_attention.context_parallel.layout import chunk_ranges


class RingAttention(torch.autograd.Function):
    """query [2c, b, np, hn], key and value [2c, b, ng, hn] of this rank (or without b), sink."""

    @staticmethod
    def forward(ctx, query, key, value, sink, kernels: PieceAttention, group: ProcessGroup):
        cp = group.size()
        kv = torch.stack([key, value])
        for step in range(cp):
            coming = to_next(kv, group) if step < cp - 1 else None
            rows, keys, piece = _step(step, query.shape[0], group)
            k, v = kv[:, keys]
            part = kernels.forward(query[rows], k, v, piece)
            if step == 0:
                lse = part[1].contiguous()
                out = torch.empty(query.shape, dtype=lse.dtype, device=query.device)
                out.copy_(part[0])
            else:
                merge_(out[rows], lse[..., rows], *part)
            kv = coming.wait() if coming else None
        finish_(out, lse, sink)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sink, out, lse)
        ctx.kernels, ctx.group = kernels, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, sink, out, lse = ctx.saved_tensors
        kernels, group = ctx.kernels, ctx.group
        cp = group.size()
        kv = torch.stack([key, value])
        sums = None  # of the gradients of the keys at hand, on their way from the rank before
        for step in range(cp):
            coming = to_next(kv, group) if step < cp - 1 else None
            rows, keys, piece = _step(step, query.shape[0], group)
            k, v = kv[:, keys]
            dq_i, dk_i, dv_i = kernels.backward(
                query[rows], k, v, out[rows], lse[..., rows], dout[rows], piece
            )
            if sums is None:  # the own piece: all rows, all keys
                dq = dq_i.to(lse.dtype).contiguous()
                total = torch.stack([dk_i, dv_i]).to(lse.dtype)
            else:
                dq[rows] += dq_i
                total = sums.wait()
                total[0, keys] += dk_i
                total[1, keys] += dv_i
            sums = to_next(total, group)
            kv = coming.wait() if coming else None
        dsink = sink_gradient_here(ctx, out, lse, dout, sink)
        dk, dv = sums.wait().to(key.dtype)
        return dq.to(query.dtype), dk, dv, dsink, None, None


def _step(step: int, local: int, group: ProcessGroup) -> tuple[slice, slice, Piece]:
    """Rows of the query and of the keys at hand, and their piece."""
    rank, cp, length = group.rank(), group.size(), local // 2
    source = (rank - step) % cp
    mine, theirs = (chunk_ranges(r, cp, local * cp) for r in (rank, source))
    everything = slice(0, local)
    if source == rank:
        return everything, everything, Piece(mine, mine, causal=True)
    if source < rank:
        return everything, slice(0, length), Piece(mine, theirs[:1])
    return slice(length, local), everything, Piece(mine[1:], theirs)
